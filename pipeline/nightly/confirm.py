"""A clean process that loads a published model and says what it answers: `python -m pipeline.nightly.confirm JSON`.

JSON: {path: of the version, root: of the nightly, data: DATASET, samples: how many of the holdout}. Prints {rows,
predicted, confidence}; of a GAN {images: SHA-256 of what fixed latents give, samples}.
"""

import json
import sys

import numpy as np

from pipeline.loading.steps import fixed_batches
from pipeline.nightly import draws, holdout
from pipeline.shards import index
from pipeline.training import weights
from pipeline.training.rank import EVALUATION_BATCH
from pipeline.training.tasks import GanConfig, predict
from pipeline.training.world import World


def main(asked: dict) -> dict:
    model = weights.load(asked["path"])
    if isinstance(model.config, GanConfig):
        return {"images": draws.digest(model.task, len(model.facts.classes)), "samples": draws.SHOWN}
    split = holdout.read(asked["root"]).rows(index.load(asked["data"]))
    rows = np.unique(np.linspace(0, len(split) - 1, asked["samples"]).astype(np.int64))
    part = split.take(rows)
    answers = predict(model.task, model.facts, fixed_batches(part, model.augment, EVALUATION_BATCH), len(part), World())
    return {
        "rows": rows.tolist(),
        "predicted": answers.predicted.tolist(),
        "confidence": answers.confidence.tolist(),
    }


if __name__ == "__main__":
    try:
        print(json.dumps(main(json.loads(sys.argv[1]))))
    except (ValueError, OSError) as error:
        sys.exit(" ".join(str(error).split()))
