"""A classifier's night: what challenger and champion answer to the same images, by the same ranks."""

import io
import time
from dataclasses import asdict

import numpy as np
import torch

from pipeline import registry, storage
from pipeline.nightly import gate, holdout
from pipeline.nightly.night import Night
from pipeline.shards import index
from pipeline.training import fit, weights
from pipeline.training.rank import restored
from pipeline.training.run import Run

_CLOSE, _APART = 1e-3, 0.02  # confidences may differ by so much, on the same kind of device and on another


def score(night: Night, opened: Run, newest: bool) -> dict:
    """{look, samples, checkpoint, device, decision}; every answer is kept beside the run. newest: whether its last
    checkpoint is taken, not its best."""
    config, resources = night.config, night.config.resources
    frozen = holdout.read(config.root)
    rows = frozen.rows(index.load(config.data))
    look = holdout.look(config.root, night.tick)
    others = [v for v in dict.fromkeys((night.champion.version, night.champion.anchor)) if v]
    paths = [registry.version_path(config.registry, config.name, version) for version in others]
    if resources.most:
        night.ray()
    found = fit.score(opened, newest, paths, config.data, frozen.generations, frozen.split, resources)
    mine, classes = found[0], opened.facts.classes
    by_version = {
        version: _in_terms_of(classes, path, theirs.predicted)
        for version, path, theirs in zip(others, paths, found[1:], strict=True)
    }
    task, manifest = restored(opened, newest=newest)
    content = weights.files(opened.config.task, task)
    scores = gate.Scores(
        labels=mine.labels,
        challenger=mine.predicted,
        champion=by_version.get(night.champion.version),
        anchor=by_version[night.champion.anchor] if len(others) > 1 else None,
        classes=list(classes),
        size_mb=sum(map(len, content.values())) / 1e6,
        latency_ms=_latency(task, opened) if config.gate.max_latency_ms else None,
    )
    _keep(night, mine, scores)
    decision = gate.decide(config.gate, look, scores)
    said = {"look": look, "samples": len(rows), "checkpoint": manifest.name, "device": mine.device}
    return said | {"decision": asdict(decision)}


def hold_against(night: Night, said: dict) -> dict:
    """{samples, apart}. RuntimeError if a clean process answers otherwise than the run did."""
    with np.load(io.BytesIO(storage.read(_kept(night)))) as kept:
        labels, confidence = kept["challenger"][said["rows"]], kept["confidence"][said["rows"]]
    apart = np.abs(confidence - np.array(said["confidence"], np.float32))
    other = labels != np.array(said["predicted"])
    allowed = _CLOSE if night.results["score"]["device"] == "cpu" else _APART  # a clean process computes on the CPU
    # On another device a tie may fall the other way: then both were sure of neither.
    if (apart > allowed).any() or (other & (confidence > 0.5 + allowed)).any():
        raise RuntimeError(
            f"what was published does not answer as the run did: {int(other.sum())} of {len(other)} samples another "
            f"class, confidences up to {apart.max():.3g} apart. It is not promoted"
        )
    return {"samples": len(other), "apart": float(apart.max())}


def _in_terms_of(classes: tuple[str, ...], path: str, predicted: np.ndarray) -> np.ndarray:
    """A published model's answers as labels of `classes`, by their names; -1 for a class that is not among these. One
    that was promoted by hand may have been trained on a dataset that counts them otherwise."""
    number = {name: label for label, name in enumerate(classes)}
    theirs = registry.describe(path)["model"]["facts"]["classes"]
    return np.array([number.get(name, -1) for name in theirs], np.int64)[predicted]


def _latency(task, opened: Run, repeats: int = 30) -> float:
    """Median time of one image through the model on this machine's CPU, ms."""
    module = task.modules.get("average", task.modules["model"]).eval()
    image = torch.zeros(1, opened.facts.channels, opened.facts.image_size, opened.facts.image_size)
    times = []
    with torch.inference_mode():
        for _ in range(repeats):
            began = time.perf_counter()
            module(image)
            times.append(time.perf_counter() - began)
    return float(np.median(times[repeats // 5 :])) * 1e3


def _keep(night: Night, mine, scores) -> None:
    columns = {"labels": mine.labels, "challenger": mine.predicted, "confidence": mine.confidence.astype(np.float32)}
    columns |= {name: values for name in ("champion", "anchor") if (values := getattr(scores, name)) is not None}
    packed = io.BytesIO()
    np.savez_compressed(packed, **columns)
    storage.write(_kept(night), packed.getvalue())


def _kept(night: Night) -> str:
    return storage.join(night.config.run_path(night.tick), "answers.npz")
