"""Scores a run and puts its record on one page: what `evaluate` and `demo` do alike."""

import dataclasses
import json

import numpy as np

from pipeline import storage
from pipeline.evaluation import classification, report
from pipeline.loading.augment import Augment
from pipeline.loading.steps import Reader
from pipeline.shards import index
from pipeline.training import checkpoint, fit, ledger
from pipeline.training.resources import Resources
from pipeline.training.run import Run
from pipeline.training.tasks import Predictions

Sections = list[tuple[str, str]]
_SHOWN = 24  # samples of each kind


def evaluate(opened: Run, data: str, split: str, resources: Resources) -> tuple[dict, Predictions]:
    """Scores, written into the run with its report page; Ray must run if the resources ask for workers."""
    answers, checkpoint = fit.evaluate(opened, data, split, resources)
    scores = classification.score(answers.labels, answers.predicted, answers.confidence, list(opened.facts.classes))
    scores |= {"loss": answers.loss, "split": split, "data": data, "run": opened.path, "checkpoint": checkpoint}
    storage.write(storage.join(opened.path, f"evaluation-{split}.json"), json.dumps(scores, indent=1).encode())
    sections = classifier(opened, data, split, scores, answers)
    page = report.page(f"Run {storage.name(opened.path)}", data, sections)
    storage.write(storage.join(opened.path, "report.html"), page.encode())
    return scores, answers


def standing(opened: Run, split: str) -> dict | None:
    """The scores `evaluate` wrote of the run's best checkpoint, if they are of that one."""
    path, best = storage.join(opened.path, f"evaluation-{split}.json"), checkpoint.best(opened.path)
    if best is None or not storage.exists(path):
        return None
    scores = json.loads(storage.read(path))
    return scores if scores["checkpoint"] == best.name else None


def classifier(opened: Run, data: str, split: str, scores: dict, answers: Predictions) -> Sections:
    """Headline, curves, confusion matrix, per-class numbers, right and wrong samples, facts."""
    rows = checkpoint.read_metrics(opened.path)
    head = [
        ("accuracy", f"{scores['accuracy']:.2%}"),
        (f"{split} samples", f"{scores['samples']:,}"),
        ("macro F1", f"{scores['macro_f1']:.3f}"),
        ("epochs", f"{rows[-1]['epoch']:.1f}"),
    ]
    wrong = np.flatnonzero(answers.labels != answers.predicted)
    right = np.flatnonzero(answers.labels == answers.predicted)
    wrong = wrong[np.argsort(-answers.confidence[wrong], kind="stable")][:_SHOWN]
    right = right[np.argsort(answers.confidence[right], kind="stable")][:_SHOWN]
    shown = np.concatenate([wrong, right])
    pictures = images_of(index.load(data), split, shown)
    classes = list(opened.facts.classes)
    return [
        ("", report.headline(head)),
        ("Training", curves(rows)),
        *goodput(opened),
        ("Confusion", report.confusion_matrix(scores["confusion"], classes)),
        ("Classes", report.per_class(scores["per_class"])),
        (
            "Samples",
            report.sample_predictions(
                pictures, answers.labels[shown], answers.predicted[shown], answers.confidence[shown], classes
            ),
        ),
        ("Run", report.facts(configuration(opened))),
        ("Dataset", report.facts(dataset_facts(index.load(data)))),
    ]


def goodput(opened: Run, heading: str = "Goodput") -> Sections:
    """Where the run's time went; nothing for runs of a millstream that kept no ledger."""
    summary = ledger.summary(opened.path)
    return [(heading, report.goodput(summary))] if summary else []


def curves(rows: list[dict]) -> str:
    """Curves of every number logged a step, with the validations as points."""
    validations = [
        {"samples": row["samples"]} | {k.removeprefix("val_"): v for k, v in row.items() if k.startswith("val_")}
        for row in rows
        if "val_loss" in row
    ]
    steps = [{k: v for k, v in row.items() if k != "time" and not k.startswith("val_")} for row in rows]
    return report.curves(steps, validations)


def configuration(opened: Run) -> dict:
    return {name: dataclasses.asdict(getattr(opened.config, name)) for name in ("task", "optim", "loop", "augment")}


def dataset_facts(dataset: index.Dataset) -> dict:
    """What `inspect` and the page say of a dataset."""
    info = dataset.info
    sizes = f"{info['image_size'][0]} x {info['image_size'][1]} px" if info["image_size"] else "differing sizes"
    return {
        "samples": info["samples"],
        "splits": {name: f"{s['samples']:,} in {s['shards']} shards" for name, s in info["splits"].items()},
        "classes": len(dataset.classes),
        "images": f"{info['format']}, {sizes}, channels {', '.join(info['channels'])}",
        "bytes": sum(shard["bytes"] for shard in info["shards"]),
        "mean": info["mean"],
        "std": info["std"],
        "rejected": info["rejected"] or 0,
        "source": info["generations"][0]["source"],
    }


def images_of(dataset: index.Dataset, split: str, rows) -> list[np.ndarray]:
    """The images of some rows of a split, uint8 (h, w, c), as they are stored."""
    reader = Reader(dataset.split(split), Augment())
    return [reader.stored(int(row)) for row in rows]
