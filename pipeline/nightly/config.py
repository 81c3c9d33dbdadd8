"""A nightly, written down: one YAML file, local or s3://. Every mistake in it is one line that names the key."""

import dataclasses
import difflib
import os
import re
import types
import typing
from dataclasses import dataclass, field

import pydantic
import yaml

from pipeline import storage
from pipeline.nightly import ticks
from pipeline.nightly.drift import DriftConfig
from pipeline.nightly.gate import GateConfig
from pipeline.shards.plan import Recipe
from pipeline.training import own
from pipeline.training.resources import Resources

OUTCOMES = ("promoted", "rejected", "skipped", "held", "failed")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class NightConfig:
    """What is retrained, of which images, when, and what it must be able to do. Paths without a scheme are relative to
    the file's folder."""

    name: str
    """Of the model in the registry."""
    source: str
    """What `millstream shard` takes: folder:PATH, s3://..., tars:PATH and so on. Looked at every night."""
    root: str
    """Where everything of the nightly is kept, local or s3://...: dataset, nights, runs, models."""
    preset: str
    """What `millstream train` takes: a preset's name, or FILE.py:NAME of your own."""
    train: dict = field(default_factory=dict)
    """Fields of the preset with other values, as on the command line: {epochs: 3, lr: 0.001}."""
    schedule: str = ""
    """Cron expression (minute, hour, day, month, day of the week) of its nights; none: one a day, by UTC."""
    timezone: str = "UTC"
    """Of the schedule: Europe/Berlin."""
    shard: Recipe = field(default_factory=Recipe)
    """How new images are sharded; the same every night."""
    max_rejects: int | None = None
    """Items of a night that may turn out unusable before it fails; none: 1 %, at least 10."""
    prune: bool = False
    """Take out of the dataset what the source no longer has, and replace what changed in it."""
    min_new: int = 1
    """A night with fewer new items is skipped, and they wait for the next."""
    max_age_days: float = 0.0
    """Retrain without new data when the last training is older; 0: never."""
    warm_start: bool = True
    """Start from the champion's weights."""
    recent: float = 0.5
    """Share of each epoch drawn from what is new since the champion; the rest replays older data. 0: as it comes."""
    samples: int = 0
    """Samples to draw a night, so that nights cost alike however the dataset grows; 0: the preset's epochs."""
    resources: Resources = field(default_factory=Resources)
    """Workers and the like, for sharding, training and scoring."""
    holdout: str = "val"
    """Split of the first night's data that champions and challengers are compared on; frozen then. val is what
    training validates on, too: then its last checkpoint is taken, not the best."""
    drift: DriftConfig = field(default_factory=DriftConfig)
    """When new data is held back."""
    gate: GateConfig = field(default_factory=GateConfig)
    """When a model is promoted."""
    models: str = ""
    """Registry of the models; none: ROOT/models."""
    keep: int = 3
    """Earlier champions that stay for a rollback, besides those pinned."""
    keep_runs: int = 7
    """Nights of which the run's directory stays."""
    notify: tuple[str, ...] = ()
    """Whom to tell: apprise's URLs. ${NAME} is taken from the environment, so that no token stands here."""
    notify_on: tuple[str, ...] = ("promoted", "rejected", "held", "failed")
    """Of which outcomes, of promoted, rejected, skipped, held, failed."""
    mlflow: bool = False
    """Mirror promotions to the MLflow registry at MLFLOW_TRACKING_URI, with the alias champion."""

    def __post_init__(self):
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"name {self.name!r}: letters, digits, dots, dashes and underscores")
        for name in ("min_new", "keep", "keep_runs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: at least 1")
        for name in ("samples", "max_age_days", "max_rejects"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} {getattr(self, name)}: 0 or more")
        if not 0 <= self.recent < 1:
            raise ValueError(f"recent {self.recent}: a share from 0 to below 1")
        if self.holdout == "train":
            raise ValueError("holdout 'train': what a model was trained on does not tell what it can do")
        if strange := set(self.notify_on) - set(OUTCOMES):
            raise ValueError(f"notify_on {min(strange)!r}: some of {', '.join(OUTCOMES)}")
        if self.schedule:
            ticks.check(self.schedule, self.timezone)

    @property
    def registry(self) -> str:
        return self.models or storage.join(self.root, "models")

    @property
    def data(self) -> str:
        return storage.join(self.root, "data")

    def run_path(self, tick: str) -> str:
        return storage.join(self.root, "runs", tick)


def load(path: str) -> NightConfig:
    """The nightly at `path`. ValueError names the key that is wrong, FileNotFoundError the file that is not there."""
    text = storage.read(path)
    try:
        given = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(given, dict):
        raise ValueError(f"{path}: keys and values are wanted, such as 'name: photos'")
    check_keys(NightConfig, given, path)
    try:
        config = pydantic.TypeAdapter(NightConfig).validate_python(given)
    except pydantic.ValidationError as error:
        raise ValueError(f"{path}: {'; '.join(map(_said, error.errors()[:3]))}") from None
    folder = path.rpartition("/")[0]
    return dataclasses.replace(
        config,
        source=_source(config.source, folder),
        root=_absolute(config.root, folder),
        preset=_absolute(config.preset, folder) if own.is_spec(config.preset) else config.preset,
        models=_absolute(config.models, folder) if config.models else "",
    )


def changed(preset, values: dict):
    """A configuration (a dataclass of dataclasses) with some of its fields, named as on the command line, set anew.

    ValueError: no such field, or a value that it cannot have.
    """
    left, parts = dict(values), {}
    for part in dataclasses.fields(preset):
        inside = getattr(preset, part.name)
        if not dataclasses.is_dataclass(inside):
            if part.name in left:
                parts[part.name] = left.pop(part.name)
            continue
        mine = {f.name: left.pop(f.name) for f in dataclasses.fields(inside) if f.name in left}
        try:
            parts[part.name] = pydantic.TypeAdapter(type(inside)).validate_python(dataclasses.asdict(inside) | mine)
        except pydantic.ValidationError as error:
            raise ValueError(f"train: {'; '.join(map(_said, error.errors()[:3]))}") from None
    if left:
        inner = [getattr(preset, f.name) for f in dataclasses.fields(preset)]
        known = [f.name for part in inner if dataclasses.is_dataclass(part) for f in dataclasses.fields(part)]
        raise ValueError(f"train: {_unknown(min(left, key=str), known)}")
    return dataclasses.replace(preset, **parts)


def check_keys(kind: type, given: dict, where: str) -> None:
    """ValueError for a key that the dataclass has not, with the nearest that it has; below it, too."""
    known = {
        f.name: hint for f, hint in zip(dataclasses.fields(kind), typing.get_type_hints(kind).values(), strict=True)
    }
    for key, value in given.items():
        if key not in known:
            raise ValueError(f"{where}: {_unknown(key, list(known))}")
        inner = known[key]
        if dataclasses.is_dataclass(inner) and not isinstance(inner, types.GenericAlias) and isinstance(value, dict):
            check_keys(inner, value, f"{where}: {key}")


def _unknown(key, known: list[str]) -> str:
    near = difflib.get_close_matches(str(key), known, n=1)
    return f"no key {key!r}: " + (f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}")


def _said(error: dict) -> str:
    where = ".".join(str(part) for part in error["loc"] if not str(part).startswith("function-"))
    message = error["msg"].removeprefix("Value error, ")
    shown = "" if error["type"] in ("missing", "value_error") else f" (it is {error['input']!r})"
    return f"{where}: {message}{shown}" if where else f"{message}{shown}"


def _absolute(path: str, folder: str) -> str:
    if storage.is_remote(path):
        return path.rstrip("/")
    path = os.path.expanduser(path)
    if os.path.isabs(path):
        return os.path.normpath(path)
    if storage.is_remote(folder):
        raise ValueError(f"{path}: a relative path in a file on {folder.partition('://')[0]}: write it out")
    return os.path.abspath(os.path.join(folder, path))


def _source(uri: str, folder: str) -> str:
    scheme, colon, path = uri.partition(":")
    if colon and not path.startswith("//"):
        return f"{scheme}:{_absolute(path, folder)}" if path else uri
    return _absolute(uri, folder)
