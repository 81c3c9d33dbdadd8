"""Four nights of a nightly on scikit-learn's digits: the first model, better data, worse data, no new data."""

import numpy as np
from rich.table import Table

from jobs.command import console, say
from jobs.nights import bring_to_end
from pipeline import registry, storage
from pipeline.evaluation import report
from pipeline.nightly.config import NightConfig
from pipeline.shards.plan import Recipe
from pipeline.sources.digits import digit_images
from pipeline.training.resources import Resources

_FIRST, _SECOND, _WRONG = 60, 900, 400  # images to train on: of the first night, then in all, then with wrong labels
NIGHTS = (
    "a first model, of few images",
    "more images of the same kind",
    "images with wrong labels",
    "nothing new",
)


def run(out: str, resources: Resources, address: str | None) -> dict:
    """{nights: [{tick, outcome, reason, accuracy, seconds}], champion, page}"""
    raw = storage.join(out, "raw")
    config = NightConfig(
        name="digits",
        source=f"folder:{raw}",
        root=storage.join(out, "nightly"),
        preset="digits_cnn",
        train={"validate_every": 2000, "ema_half_life": 500},
        shard=Recipe(format="png", samples_per_shard=200),
        samples=6000,
        resources=resources,
        holdout="test",
    )
    nights, code = [], 0
    for number, what in enumerate(NIGHTS, 1):
        tick = f"night-{number}"
        say(f"{number}. {what}")
        arrive(raw, number)
        ended = bring_to_end(config, tick, address)
        numbers = ended.get("stages", {}).get("score", {}).get("decision", {}).get("numbers", {})
        kept = {name: ended.get(name) for name in ("tick", "outcome", "reason", "seconds")}
        nights.append(kept | {"accuracy": numbers.get("accuracy")})
        if code := ended.get("exit_code", 0):
            break
    table = Table("night", "outcome", "accuracy", "why", box=None)
    for night in nights:
        accuracy = "" if night["accuracy"] is None else f"{night['accuracy']:.4f}"
        table.add_row(night["tick"], night["outcome"], accuracy, night["reason"])
    console.print(table)
    page = storage.join(config.root, "nights", "index.html")
    say(f"pages: {page}")
    say(f"models: MILLSTREAM_MODELS={config.registry} millstream models history digits")
    champion = registry.champion(config.registry, config.name).version
    return {"nights": nights, "champion": champion, "page": page} | ({"exit_code": code} if code else {})


def arrive(raw: str, night: int) -> None:
    """What comes in before a night, as PNG files: RAW/train/7/0042.png, RAW/test/...; a marker written last."""
    marker = storage.join(raw, f".night-{night}")
    if storage.exists(marker):
        return
    images, labels = (each[np.random.default_rng(0).permutation(len(each))] for each in digit_images())  # by writer
    held_out = np.arange(len(images)) % 5 == 0
    known = np.flatnonzero(~held_out)
    if night == 1:
        _put(raw, "test", np.flatnonzero(held_out), images, labels)
    part = {1: known[:_FIRST], 2: known[_FIRST:_SECOND], 3: known[_SECOND : _SECOND + _WRONG]}.get(night, known[:0])
    _put(raw, "train", part, images, (labels + 3) % 10 if night == 3 else labels)
    storage.write(marker, b"")


def _put(raw: str, split: str, rows: np.ndarray, images, labels) -> None:
    for row in rows:
        storage.write(storage.join(raw, split, str(labels[row]), f"{row:04d}.png"), report.png(images[row]))
