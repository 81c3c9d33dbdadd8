"""What a run is: its directory, its fixed configuration, and what it is trained on. No Ray here.

RUN/config.json     written once, by the first start; the same command again must ask for the same run
RUN/code/FILE.py    the model, where it is the user's own; config.json has its SHA-256
RUN/attempts/ checkpoints/ metrics/ metrics.jsonl pinned/       see `checkpoint`
RUN/ledger/         where each attempt's time went, see `ledger`
RUN/tensorboard/    see `tracking`
"""

import dataclasses
import json
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from importlib.metadata import version

import torch

from pipeline import registry, storage
from pipeline.loading.augment import Augment, resolved, statistics
from pipeline.loading.order import Batching
from pipeline.loading.selection import Chosen, Selection, choose
from pipeline.shards import index, pinned
from pipeline.training import own, weights
from pipeline.training.cadence import LoopConfig, between_snapshots, passes, total_steps
from pipeline.training.compute import ComputeConfig
from pipeline.training.optim import OptimConfig
from pipeline.training.resources import sizes, span
from pipeline.training.tasks import ClassifyConfig, Facts, GanConfig, Task, make_task

# Between starts of one run; what it is computed on is not stored at all.
_MAY_CHANGE = {"loop.keep", "loop.checkpoint_every", "loop.skip_nonfinite"}


@dataclass(frozen=True)
class TrainConfig:
    """A run, whole. Presets are functions that return one."""

    task: ClassifyConfig | GanConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    augment: Augment = field(default_factory=Augment)
    selection: Selection = field(default_factory=Selection)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    init: str = ""
    """Weights to begin with: models:NAME@champion or @VERSION, the path of a published model, a RUN (its best
    checkpoint), or a classifier's .safetensors or .pth; of classes that it does not know the last layer starts anew."""


@dataclass(frozen=True)
class Run:
    """An opened run: where it is, what it was started with, and what it is trained on."""

    path: str
    config: TrainConfig
    facts: Facts
    data: str
    generations: tuple[str, ...]  # of the dataset, by their digests: it may have got more since
    init: str = ""  # what config.init meant when the run began, to the last bit
    code: str = ""  # SHA-256 of the file that makes the model, where it is the user's own

    @property
    def batching(self) -> Batching:
        return Batching(self.config.loop.batch, self.config.loop.micro_batches)

    def dataset(self) -> index.Dataset:
        """The generations it is trained on. ValueError if the dataset no longer has them."""
        return pinned.at(index.load(self.data), self.generations)

    def chosen(self, dataset: index.Dataset) -> Chosen:
        """What of the training split the run draws, and how often."""
        return choose(dataset.split("train"), self.config.selection, self.config.loop.seed)

    def steps(self) -> int:
        """Steps from its first to its last."""
        return total_steps(self.config.loop, len(self.chosen(self.dataset()).split))

    def validation(self, dataset: index.Dataset, chosen: Chosen) -> index.Split | None:
        """What it is validated on: the fold held out, or the val split; None if there is neither."""
        return chosen.held_out or (dataset.split("val") if "val" in dataset.info["splits"] else None)

    def snapshot(self) -> Callable[[int], bool]:
        """Whether the checkpoint at so many samples is one of those that `posthoc` makes averages of."""
        batch, snapshots = self.config.loop.batch, self.config.task.ema_snapshots
        every = between_snapshots(self.steps() * batch, snapshots) if snapshots else 0
        return lambda samples: passes(every, samples - batch, samples)

    def about(self) -> dict:
        """What each checkpoint says of where it comes from."""
        config = json.loads(storage.read(storage.join(self.path, "config.json")))
        return {"config": config, "generations": list(self.generations), "millstream": version("millstream")}

    def task(self, device, training: bool = False) -> Task:
        """Its task as it was drawn. training: to go on with, compiled if the configuration says so."""
        config = self.config
        compute = config.compute if training else dataclasses.replace(config.compute, compile=False)
        builder = own.builder(config.task.model, self.code, storage.join(self.path, "code"))
        return make_task(config.task, self.facts, config.optim, config.loop.seed, device, compute, builder)


def start(
    path: str,
    preset: str,
    config: TrainConfig,
    data: str,
    workers: int | str,
    generations: Collection[int] | None = None,
) -> Run:
    """Opens the run at `path`, recording its configuration if it is new. generations: numbers of those of the dataset
    that a new run is trained on; None: all that there are.

    Raises ValueError if the data cannot serve the task, the workers cannot share its steps, or a run of another
    configuration, or a dataset, stands there.
    """
    stored, dataset, code = _stored(path), index.load(data), None
    if own.is_spec(config.task.model):
        code = own.given(config.task.model, "a model,")
        config = dataclasses.replace(config, task=dataclasses.replace(config.task, model=code.spec))
    if stored:
        dataset = pinned.at(dataset, _generations(stored, dataset, path))
        config = dataclasses.replace(config, augment=_as_stored(config.augment, stored["augment"]))
    elif generations is not None:
        dataset = pinned.of(dataset, generations)
    augment, facts = describe(dataset, config.augment)
    facts = _facts(stored) if stored else facts
    most = max(2, 1 << (max(span(workers)[1], 1) - 1).bit_length())
    micro_batches = config.loop.micro_batches or (stored["loop"]["micro_batches"] if stored else most)
    loop = dataclasses.replace(config.loop, micro_batches=micro_batches)
    config = dataclasses.replace(config, augment=augment, loop=loop)
    Batching(loop.batch, micro_batches)
    sizes(workers, micro_batches)
    init = stored.get("init_path", "") if stored else _found(config.init)
    run = Run(path, config, facts, data, tuple(pinned.generations(dataset)), init, code.sha256 if code else "")
    task = run.task("cpu")  # what cannot be built should be said now, not by a worker
    if code and not stored:
        code.answers(task.modules["model"], facts.channels, facts.image_size, len(facts.classes))  # in training
    if init and not stored:
        init, said = weights.begin_from(task, init, config.task, facts, config.optim)
        run = dataclasses.replace(run, init=init)
        if said:
            warnings.warn(said, stacklevel=2)
    for name, side in (("start", augment.start_size), ("eval", augment.eval_size)):
        if side:
            _check_side(task, facts, side, f"--{name}-size {side}")
    if config.compute.sync_bn and {max(1, size) for size in span(workers)} != {micro_batches}:
        raise ValueError(
            f"--sync-bn: the batch norm of a whole step needs a worker for each of its {micro_batches} micro-batches, "
            f"not {workers}: use --workers {micro_batches}, or --micro-batches 1 with one worker"
        )
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
        run = dataclasses.replace(run, init=stored.get("init_path", ""))
    if code and not storage.exists(kept := storage.join(path, "code", code.file)):
        storage.write(kept, code.content)
    return run


def open_run(path: str) -> Run:
    """The run at `path`. Raises ValueError if there is none."""
    stored = _stored(path)
    if not stored:
        raise ValueError(
            f"{path} is not a run (it has no config.json): `millstream train PRESET --out {path}` makes one"
        )
    return _run_of(path, stored)


def _run_of(path: str, stored: dict) -> Run:
    kind = {"classify": ClassifyConfig, "gan": GanConfig}[stored["kind"]]
    config = TrainConfig(
        kind(**stored["task"]),
        OptimConfig(**stored["optim"]),
        LoopConfig(**stored["loop"]),
        Augment(**stored["augment"]),
        Selection(**stored.get("selection", {})),  # runs of an older millstream took every sample
        ComputeConfig(**stored.get("compute", {})),
        stored.get("init", ""),
    )
    generations = stored.get("generations") or _generations(stored, index.load(stored["data"]), path)
    more = stored.get("init_path", ""), stored.get("code", "")
    return Run(path, config, _facts(stored), stored["data"], tuple(generations), *more)


def _found(init: str) -> str:
    return registry.resolve(init) if registry.is_spec(init) else init


def describe(dataset: index.Dataset, augment: Augment) -> tuple[Augment, Facts]:
    """The augmentation with size and channels filled in from the data, and what a task needs to know of the data."""
    augment = resolved(augment, dataset)
    facts = Facts(augment.channels, augment.image_size, dataset.classes, *statistics(dataset, augment.channels))
    return augment, facts


def _check_side(task: Task, facts: Facts, side: int, asked: str) -> None:
    """ValueError unless the model takes images of this side, too."""
    try:
        with torch.no_grad():
            task.phases[0].module(torch.zeros(2, facts.channels, side, side))
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{asked}: the model takes images of {facts.image_size} px only ({error})") from None


def _stored(path: str) -> dict | None:
    try:
        return json.loads(storage.read(storage.join(path, "config.json")))
    except FileNotFoundError:
        return None


def _record(run: Run, preset: str) -> dict:
    config, kind = run.config, weights.kind(run.config.task)
    record = {
        name: dataclasses.asdict(getattr(config, name))
        for name in ("task", "optim", "loop", "augment", "selection", "compute")
    }
    record |= {"preset": preset, "kind": kind, "facts": dataclasses.asdict(run.facts)}
    record |= {"data": run.data, "generations": run.generations, "millstream": version("millstream")}
    record |= {"init": config.init, "init_path": run.init, "code": run.code}
    return json.loads(json.dumps(record))


def _facts(stored: dict) -> Facts:
    return Facts(**{name: tuple(v) if isinstance(v, list) else v for name, v in stored["facts"].items()})


def _generations(stored: dict, dataset: index.Dataset, path: str) -> list[str]:
    """Those the run at `path` is trained on. Runs of an older millstream knew the whole dataset's digest instead."""
    if "generations" in stored:
        return stored["generations"]
    if stored["data_digest"] != index.digest(dataset.info):
        raise ValueError(f"{path} was started on another dataset than {dataset.root} is now: use another --out")
    return pinned.generations(dataset)


def _as_stored(asked: Augment, stored: dict) -> Augment:
    """With the size and channels that were found when the run began: a dataset that grew might suggest others."""
    size, channels = asked.image_size or stored["image_size"], asked.channels or stored["channels"]
    return dataclasses.replace(asked, image_size=size, channels=channels)


def _compare(path: str, stored: dict, asked: dict) -> None:
    # By way of a configuration: what an older millstream did not know has its default.
    old, new = flat(_record(_run_of(path, stored), "")), flat(asked)
    ignored = {"preset", "data", "generations", "millstream", "init_path", *_MAY_CHANGE}
    changed = [name for name in {**old, **new} if name not in ignored and old.get(name) != new.get(name)]
    if changed == ["code"]:
        file, _ = own.split(asked["task"]["model"])
        raise ValueError(
            f"{file} is not the file that this run began with, {path}/code/{file}: go on with that one, or begin anew "
            "with another --out"
        )
    if changed:
        said = ", ".join(f"{name} {old.get(name)!r} -> {new.get(name)!r}" for name in changed)
        raise ValueError(f"{path} is a run of another configuration ({said}): ask for the same, or use another --out")


def flat(tree: dict, prefix: str = "") -> dict:
    """{"a.b": value} of {"a": {"b": value}}."""
    found = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found
