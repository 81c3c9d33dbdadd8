"""A GAN's night: what challenger and champion draw from the same latents, held against the holdout's real images."""

import hashlib
from dataclasses import asdict

import numpy as np

from pipeline import registry
from pipeline.evaluation import kid
from pipeline.loading.steps import fixed_batches
from pipeline.nightly import gate, holdout
from pipeline.nightly.night import Night
from pipeline.shards import index
from pipeline.training import weights
from pipeline.training.rank import EVALUATION_BATCH, restored
from pipeline.training.run import Run
from pipeline.training.tasks import Task, draw_images

IMAGES = 2000  # compared at most
SHOWN = 64  # drawn again by the clean process


def score(night: Night, opened: Run, newest: bool) -> dict:
    """{look, samples, checkpoint, decision, images: SHA-256 of the first draws}; see `kid` for what is measured."""
    config = night.config
    frozen = holdout.read(config.root)
    rows = frozen.rows(index.load(config.data))
    look = holdout.look(config.root, night.tick)
    take = np.unique(np.linspace(0, len(rows) - 1, IMAGES).astype(np.int64))
    part, real, labels = rows.take(take), [], []
    for batch in fixed_batches(part, opened.config.augment, EVALUATION_BATCH):
        kept = batch.weights.numpy() > 0
        real.append(batch.images.numpy()[kept])
        labels.append(batch.labels.numpy()[kept])
    wanted = np.maximum(np.concatenate(labels), 0)  # as many of each class as there are real ones
    task, manifest = restored(opened, newest=newest)
    mine, shown = kid.features(draw_images(task, wanted, seed=0)), kid.features(np.concatenate(real))

    def against(version: str | None) -> kid.KidDifference:
        if version is None:
            return kid.kid_difference(shown, None, mine)
        other = weights.load(registry.version_path(config.registry, config.name, version))
        return kid.kid_difference(shown, kid.features(draw_images(other.task, wanted, seed=0)), mine)

    now = night.champion
    anchor = against(now.anchor) if now.anchor not in (None, now.version) else None
    size = sum(map(len, weights.files(opened.config.task, task).values())) / 1e6
    decision = gate.decide_gan(config.gate, look, against(now.version), anchor, size_mb=size)
    return {
        "look": look,
        "samples": len(part),
        "checkpoint": manifest.name,
        "decision": asdict(decision),
        "images": digest(task, len(opened.facts.classes)),
    }


def digest(task: Task, classes: int) -> str:
    """SHA-256 of what fixed latents give, hex."""
    labels = np.arange(SHOWN) % max(1, classes)
    return hashlib.sha256(draw_images(task, labels.astype(np.int64), seed=0).tobytes()).hexdigest()


def hold_against(night: Night, said: dict) -> dict:
    """{samples}. RuntimeError if a clean process drew other images than the run."""
    if said["images"] != night.results["score"]["images"]:
        raise RuntimeError("the published generator does not draw what the run's does. It is not promoted")
    return {"samples": said["samples"]}
