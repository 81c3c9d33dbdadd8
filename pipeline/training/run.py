"""What a run is: its directory, its fixed configuration, and how its parts are put together on one rank. No Ray here.

RUN/config.json     written once, by the first start; the same command again must ask for the same run
RUN/attempts/ checkpoints/ metrics/ metrics.jsonl       see `checkpoint`
RUN/tensorboard/    one event file a checkpoint, so that restarts leave no step twice
"""

import contextlib
import dataclasses
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from pipeline import storage
from pipeline.loading.augment import Augment, resolved, statistics
from pipeline.loading.cache import Cache, open_cache
from pipeline.loading.order import Batching
from pipeline.loading.selection import Chosen, Selection, choose
from pipeline.loading.steps import Steps, fixed_batches
from pipeline.shards import index
from pipeline.training import checkpoint
from pipeline.training.loop import LoopConfig, total_steps, train
from pipeline.training.optim import OptimConfig
from pipeline.training.tasks import ClassifyConfig, Facts, GanConfig, Predictions, Task, draw_images, make_task, predict
from pipeline.training.world import World

EVALUATION_BATCH = 256  # fixed: the shape of a computation must not depend on who asks
_MAY_CHANGE = {"loop.keep", "loop.checkpoint_every"}  # between starts of one run; what runs it is not stored at all


@dataclass(frozen=True)
class TrainConfig:
    """A run, whole. Presets are functions that return one."""

    task: ClassifyConfig | GanConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    augment: Augment = field(default_factory=Augment)
    selection: Selection = field(default_factory=Selection)


@dataclass(frozen=True)
class Resources:
    """What a run is computed on; may differ at every start."""

    workers: int = 1
    """Processes that share each step; 0: none besides this one, without Ray."""
    threads: int = 0
    """Threads of a worker; 0: the machine's cores divided among its workers."""
    device: str = "auto"
    """cpu, cuda (one GPU a worker) or auto."""
    max_failures: int = 3
    """Restarts from the newest checkpoint after workers died."""
    cache: str = "auto"
    """Where each node keeps shards of a store: a folder; auto: MILLSTREAM_CACHE, or millstream in the user's cache
    folder; none: nowhere."""
    cache_gb: float = 50.0
    """How much of them, in GB of disk."""

    def __post_init__(self):
        if self.workers < 0 or self.threads < 0 or self.max_failures < 0:
            raise ValueError(
                f"workers {self.workers}, threads {self.threads} and max_failures {self.max_failures}: 0 or more"
            )
        if not self.cache_gb > 0:
            raise ValueError(f"cache_gb {self.cache_gb}: above 0, or --cache none")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device {self.device!r}: use auto, cpu or cuda")


@dataclass(frozen=True)
class Run:
    """An opened run: where it is, what it was started with, and what it is trained on."""

    path: str
    config: TrainConfig
    facts: Facts
    data: str
    data_digest: str

    @property
    def batching(self) -> Batching:
        return Batching(self.config.loop.batch, self.config.loop.micro_batches)

    def chosen(self, dataset: index.Dataset) -> Chosen:
        """What of the training split the run draws, and how often."""
        return choose(dataset.split("train"), self.config.selection, self.config.loop.seed)

    def steps(self) -> int:
        """Steps from its first to its last."""
        return total_steps(self.config.loop, len(self.chosen(index.load(self.data)).split))

    def task(self, device) -> Task:
        return make_task(self.config.task, self.facts, self.config.optim, self.config.loop.seed, device)


def start(path: str, preset: str, config: TrainConfig, data: str, workers: int) -> Run:
    """Opens the run at `path`, recording its configuration if it is new.

    Raises ValueError if the data cannot serve the task, the workers cannot share its steps, or a run of another
    configuration, or a dataset, stands there.
    """
    dataset = index.load(data)
    augment, facts = describe(dataset, config.augment)
    most = max(2, 1 << (max(workers, 1) - 1).bit_length())
    stored = _stored(path)
    micro_batches = config.loop.micro_batches or (stored["loop"]["micro_batches"] if stored else most)
    loop = dataclasses.replace(config.loop, micro_batches=micro_batches)
    config = dataclasses.replace(config, augment=augment, loop=loop)
    Batching(loop.batch, micro_batches, max(workers, 1))
    run = Run(path, config, facts, data, index.digest(dataset.info))
    task = run.task("cpu")  # what cannot be built should be said now, not by a worker
    if augment.start_size:
        _check_sides(task, augment, facts)
    run.chosen(dataset)
    record = _record(run, preset)
    if not stored:
        if storage.exists(storage.join(path, index.DATASET)):
            raise ValueError(f"{path} is a dataset: a run needs a directory of its own")
        try:
            storage.write_new(storage.join(path, "config.json"), json.dumps(record, indent=1).encode())
        except FileExistsError:  # two first starts at once
            stored = _stored(path)
    if stored:
        _compare(path, stored, record)
    return run


def open_run(path: str) -> Run:
    """The run at `path`. Raises ValueError if there is none."""
    stored = _stored(path)
    if not stored:
        raise ValueError(
            f"{path} is not a run (it has no config.json): `millstream train PRESET --out {path}` makes one"
        )
    kind = {"classify": ClassifyConfig, "gan": GanConfig}[stored["kind"]]
    facts = {name: tuple(v) if isinstance(v, list) else v for name, v in stored["facts"].items()}
    config = TrainConfig(
        kind(**stored["task"]),
        OptimConfig(**stored["optim"]),
        LoopConfig(**stored["loop"]),
        Augment(**stored["augment"]),
        Selection(**stored.get("selection", {})),  # runs of an older millstream took every sample
    )
    return Run(path, config, Facts(**facts), stored["data"], stored["data_digest"])


def describe(dataset: index.Dataset, augment: Augment) -> tuple[Augment, Facts]:
    """The augmentation with size and channels filled in from the data, and what a task needs to know of the data."""
    augment = resolved(augment, dataset)
    facts = Facts(augment.channels, augment.image_size, dataset.classes, *statistics(dataset, augment.channels))
    return augment, facts


def _check_sides(task: Task, augment: Augment, facts: Facts) -> None:
    """ValueError unless the model takes images of every side that the run will show it."""
    module = task.phases[0].module
    try:
        with torch.no_grad():
            module(torch.zeros(2, facts.channels, augment.start_size, augment.start_size))
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"--start-size {augment.start_size}: the model takes images of {augment.image_size} px only ({error})"
        ) from None


def train_rank(run: Run, world: World, resources: Resources, threads: int, report: Callable[[dict], None]) -> dict:
    """Trains one rank from wherever the run stands to its end. Returns the last row logged (of any start)."""
    config, dataset = run.config, index.load(run.data)
    if index.digest(dataset.info) != run.data_digest:
        raise ValueError(f"{run.data} is not the dataset that {run.path} was started on: use another --out")
    chosen, cache = run.chosen(dataset), open_cache(run.data, resources.cache, resources.cache_gb)
    split, task = chosen.split, run.task(world.device)
    attempt, found = checkpoint.claim(run.path) if world.rank == 0 else (0, None)
    found = world.from_first(found)
    if found:
        task.load(checkpoint.read_state(run.path, found)["task"])
    position = found.samples if found else 0
    saver = None
    if world.rank == 0:
        _sweep_tensorboard(run.path, found.segments if found else [])
        saver = checkpoint.Saver(
            run.path, attempt, found, config.loop.keep, lambda *args: _tensorboard(run.path, *args)
        )
    if position >= total_steps(config.loop, len(split)) * config.loop.batch:
        return {"samples": position, **(found.validation if found else {})}

    def validate() -> dict:
        held_out = chosen.held_out or (dataset.split("val") if "val" in dataset.info["splits"] else None)
        if held_out is None or not isinstance(config.task, ClassifyConfig):
            return {}
        answers = evaluate_rank(run, task, held_out, world, threads, cache)
        return {"loss": answers.loss, "accuracy": answers.accuracy}

    batching = dataclasses.replace(run.batching, world=world.size)
    pinned = torch.device(world.device).type == "cuda"
    more = {"cache": cache, "pinned": pinned, "draws": chosen.draws}
    loader = Steps(split, config.augment, config.loop.seed, batching, world.rank, position, threads, **more)
    steps = iter(loader)
    try:
        row = train(config.loop, config.optim, task, steps, len(split), world, validate, saver, report)
        quarantined = _quarantined(loader, world)
        return row | ({"quarantined": quarantined} if quarantined else {})
    finally:
        steps.close()
        if saver:
            saver.close()


def _quarantined(loader: Steps, world: World) -> int:
    """Samples that some rank could not read; one that several met in different epochs counts once."""
    bad = torch.zeros(len(loader.reader.split), dtype=torch.int32)
    bad[list(loader.reader.quarantined)] = 1
    return int(world.sum_(bad.to(world.device)).count_nonzero())


def evaluate_rank(
    run: Run, task: Task, split: index.Split, world: World, threads: int, cache: Cache | None = None
) -> Predictions:
    """Predictions for every sample of a split, on every rank."""
    batches = fixed_batches(split, run.config.augment, EVALUATION_BATCH, world.rank, world.size, threads, cache)
    return predict(task, run.facts, batches, len(split), world)


def restored(run: Run, device="cpu") -> tuple[Task, checkpoint.Manifest]:
    """The run's task with the weights of its best checkpoint. Raises ValueError if it has none that verifies."""
    best = checkpoint.best(run.path)
    for manifest in [best, *(m for m in checkpoint.lineage(run.path) if m != best)] if best else []:
        try:
            state = checkpoint.read_state(run.path, manifest)
        except ValueError as error:
            warnings.warn(f"{error}; taking another", stacklevel=2)
            continue
        task = run.task(device)
        task.load(state["task"])
        return task, manifest
    raise ValueError(f"{run.path} has no checkpoint that can be read: train it first")


def draw_classes(run: Run, n: int, seed: int = 0, label: str | None = None) -> tuple[list[np.ndarray], str]:
    """n images of a GAN's run, uint8 (s, s, c), sorted by class in equal shares (or all of class `label`), and the name
    of the checkpoint. Raises ValueError if the run is no GAN's, has no checkpoint or does not know the class.
    """
    if not isinstance(run.config.task, GanConfig):
        raise ValueError(f"{run.path} trains a classifier, which draws nothing: `sample` wants a GAN's run")
    classes = run.facts.classes
    if label is not None and label not in classes:
        raise ValueError(f"no class {label!r} in {run.path}: it knows {', '.join(classes) or 'none'}")
    if label is not None:
        labels = np.full(n, classes.index(label))
    else:
        labels = np.arange(n) // -(-n // len(classes)) if classes else np.zeros(n, int)
    task, manifest = restored(run)
    return list(draw_images(task, labels.astype(np.int64), seed)), manifest.name


def use_threads(threads: int, workers_here: int = 1) -> int:
    """Sets and returns the number of threads this process computes with."""
    threads = threads or max(1, (os.cpu_count() or 1) // max(1, workers_here))
    torch.set_num_threads(threads)
    return threads


def _stored(path: str) -> dict | None:
    try:
        return json.loads(storage.read(storage.join(path, "config.json")))
    except FileNotFoundError:
        return None


def _record(run: Run, preset: str) -> dict:
    config, kind = run.config, "gan" if isinstance(run.config.task, GanConfig) else "classify"
    record = {
        name: dataclasses.asdict(getattr(config, name)) for name in ("task", "optim", "loop", "augment", "selection")
    }
    record |= {"preset": preset, "kind": kind, "facts": dataclasses.asdict(run.facts)}
    record |= {"data": run.data, "data_digest": run.data_digest, "millstream": version("millstream")}
    return json.loads(json.dumps(record))


def _compare(path: str, stored: dict, asked: dict) -> None:
    old, new = _flat(stored), _flat(asked)
    ignored = {"preset", "data", "millstream", *_MAY_CHANGE}
    changed = [name for name in {**old, **new} if name not in ignored and old.get(name) != new.get(name)]
    if "data_digest" in changed:
        raise ValueError(
            f"{path} was started on another dataset than {asked['data']} (that was {stored['data']}): use another --out"
        )
    if changed:
        said = ", ".join(f"{name} {old.get(name)!r} -> {new.get(name)!r}" for name in changed)
        raise ValueError(f"{path} is a run of another configuration ({said}): ask for the same, or use another --out")


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _sweep_tensorboard(run: str, segments: list[str]) -> None:
    """Removes the event files of checkpoints that the run did not go on from: their steps are about to come again."""
    folder = storage.join(run, "tensorboard")
    with contextlib.suppress(FileNotFoundError):
        for file in storage.list_files(folder):
            if file.path.rpartition("tfevents.")[2] not in segments:
                storage.delete(storage.join(folder, file.path))


def _tensorboard(run: str, name: str, rows: list[dict]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            for row in rows:
                for tag in row.keys() - {"step", "samples", "time", "samples_digest"}:
                    writer.add_scalar(tag, row[tag], row["samples"], walltime=row["time"])
        (events,) = Path(folder).iterdir()
        # Named by position: TensorBoard reads the files of a folder in the order of their names.
        storage.write(storage.join(run, "tensorboard", f"events.out.tfevents.{name}"), events.read_bytes())
