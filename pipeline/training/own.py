"""Code of the user's own: FILE.py:NAME, one file with a preset (see jobs/presets.py) or a model, known by its content.

A model is a class or a function that is called as NAME(channels=, image_size=, classes=) and gives an nn.Module:
(n, channels, s, s) float -> (n, classes). A run keeps its file as RUN/code/FILE.py and the SHA-256 in config.json; a
published model has the file beside its weights, and there it is run only for whom it is known to.

    make_task(..., builder=own.builder(config.model, SHA-256, FOLDER))     None: a model of our own table

Whatever goes wrong in such a file is a ValueError of one line, with the place.
"""

import difflib
import hashlib
import inspect
import os
import re
import sys
import threading
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass

from pipeline import storage

TRUST = "MILLSTREAM_TRUST_CODE"
_SPEC = re.compile(r"(?P<path>.+\.py)(?::(?P<name>.*))?", re.S)
_NAMED = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.py")
_DIGITS = 12  # of a SHA-256, at least
_loaded: dict[str, tuple[types.ModuleType, bytes]] = {}  # by SHA-256: two versions in one process do not mix
_loading = threading.RLock()


@dataclass(frozen=True)
class Own:
    """NAME in FILE (without its folder), loaded; picklable where it is loaded, too."""

    file: str
    name: str
    sha256: str

    @property
    def spec(self) -> str:
        return f"{self.file}:{self.name}"

    @property
    def content(self) -> bytes:
        return _loaded[self.sha256][1]

    def wants(self) -> list[str]:
        """Parameters that have no default."""
        found = inspect.signature(getattr(_loaded[self.sha256][0], self.name)).parameters.values()
        return [p.name for p in found if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]

    def call(self, **named):
        """What NAME returns. ValueError says what it raised, and where."""
        try:
            return getattr(_loaded[self.sha256][0], self.name)(**named)
        except MemoryError:
            raise
        except Exception as error:  # of the user's own
            raise ValueError(f"{self._where(error)}: {_line(error)}") from error

    def __call__(self, channels: int, image_size: int, classes: int):
        """The model, an nn.Module on the CPU; tried once, which also gives lazy layers their sizes."""
        from torch import nn  # not for those who only look at a name

        module = self.call(channels=channels, image_size=image_size, classes=classes)
        if not isinstance(module, nn.Module):
            raise ValueError(f"{self.spec} gives a {type(module).__name__}: an nn.Module is wanted")
        self.answers(module.eval(), channels, image_size, classes)
        if not any(parameter.requires_grad for parameter in module.parameters()):
            raise ValueError(f"{self.spec} gives a module without parameters to train")
        return module.train()

    def answers(self, module, channels: int, image_size: int, classes: int) -> None:
        """ValueError unless the module, in the mode it is in, answers each image with `classes` numbers."""
        import torch

        images = torch.zeros(2, channels, image_size, image_size)
        shape = f"images {tuple(images.shape)}"
        try:
            with torch.no_grad():
                said = module(images)
        except Exception as error:  # of the user's own
            raise ValueError(f"{self._where(error)}: {_line(error)}; {self.name} was given {shape}") from error
        found = tuple(said.shape) if isinstance(said, torch.Tensor) else f"a {type(said).__name__}"
        if found != (2, classes):
            raise ValueError(f"{self.spec} answers {shape} with {found}: (n, classes) is wanted, (2, {classes})")

    def _where(self, error: Exception) -> str:
        return _place(error, _loaded[self.sha256][0].__file__) or self.spec


def is_spec(text: str) -> bool:
    """Whether `text` names something in a file of Python."""
    return _SPEC.fullmatch(text) is not None


def split(spec: str) -> tuple[str, str]:
    """(path of the file, NAME); the latter empty if it is not said."""
    match = _SPEC.fullmatch(spec)
    return match["path"], match["name"] or ""


def beside(spec: str, other: str) -> str:
    """`other` as it is meant in the file of `spec`: relative to that file's folder."""
    path = os.path.expanduser(split(other)[0])
    if storage.is_remote(path) or os.path.isabs(path):
        return other
    folder = absolute(split(spec)[0]).rpartition("/")[0]
    return f"{folder}/{os.path.normpath(other)}"


def absolute(path: str) -> str:
    return path if storage.is_remote(path) else os.path.abspath(os.path.expanduser(path))


def given(spec: str, want: str = "a function") -> Own:
    """What the user names; a relative path is seen from the current folder. ValueError: there is none."""
    path, name = split(spec)
    path = absolute(path)
    try:
        content = storage.read(path)
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    return _named(path, name, load(content, path), want)


def builder(model: str, sha256: str, folder: str) -> Own | None:
    """What makes the model of a run whose code has this SHA-256 ("" for none of its own), kept in `folder`.

    ValueError: the file is missing or another.
    """
    if not sha256:
        return None
    file, name = split(model)
    path = storage.join(folder, file)
    if sha256 not in _loaded:
        try:
            content = storage.read(path)
        except FileNotFoundError:
            raise ValueError(f"{path} is missing: the model is made by it") from None
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ValueError(f"{path} was changed: its SHA-256 is not {sha256[:_DIGITS]}..., as the run's must be")
        load(content, path)
    return _named(path, name, sha256)


def published(model: str, path: str, content: bytes) -> Own:
    """The same for a published model at `path`: only if the code is known to this process, or the environment names
    it."""
    file, name = split(model)
    sha256 = hashlib.sha256(content).hexdigest()
    trusted = re.split(r"[,\s]+", os.environ.get(TRUST, ""))
    if sha256 not in _loaded and not any(
        word == "1" or (len(word) >= _DIGITS and sha256.startswith(word.lower())) for word in trusted
    ):
        raise ValueError(
            f"{path} is made by code that was published with it, code/{file}, which nobody here has vouched for: read "
            f"it, and allow it by {TRUST}={sha256[:_DIGITS]}"
        )
    return _named(f"{path}/code/{file}", name, load(content, f"{path}/code/{file}"))


def variables() -> dict[str, str]:
    """Of the environment of a process that may run what this one runs."""
    known = [os.environ.get(TRUST, ""), *_loaded]
    return {TRUST: ",".join(filter(None, known))} if _loaded else {}


def load(content: bytes, path: str) -> str:
    """Runs a file of Python, once for each content; returns its SHA-256. ValueError: it cannot be run."""
    sha256 = hashlib.sha256(content).hexdigest()
    with _loading:
        if sha256 not in _loaded:
            module = types.ModuleType(f"millstream_own_{sha256[:16]}")
            module.__file__ = path
            sys.modules[module.__name__] = module  # dataclasses and pickle look there
            try:
                exec(compile(content, path, "exec"), module.__dict__)
            except (Exception, SystemExit) as error:  # of the user's own
                del sys.modules[module.__name__]
                raise ValueError(_not_loaded(error, path)) from error
            _loaded[sha256] = module, content
    return sha256


def _not_loaded(error: BaseException, path: str) -> str:
    if isinstance(error, SyntaxError) and error.filename == path:
        return f"{path}:{error.lineno}: {error.msg}"
    more = "; one file travels: what it imports must be installed" if isinstance(error, ImportError) else ""
    return f"{_place(error, path) or path}: {_line(error)}{more}"


def _place(error: BaseException, path: str) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f"{path}:{frames[-1].lineno}" if frames else ""


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _named(path: str, name: str, sha256: str, want: str = "a model") -> Own:
    module, file = _loaded[sha256][0], storage.name(path)
    if not _NAMED.fullmatch(file):
        raise ValueError(f"{file!r} is no name for a file that travels: letters, digits, dots and dashes")
    if not callable(getattr(module, name, None)):
        there = [key for key, value in vars(module).items() if _is_own(module, key, value)]
        near = difflib.get_close_matches(name, there, n=1)
        hint = f"did you mean {file}:{near[0]}?" if near else f"there are {', '.join(there) or 'none'}"
        what = f"{path} has no {name!r}" if name else f"{path}: say which of it, as {file}:NAME"
        raise ValueError(f"{what}, {want} in it: {hint}" if name else f"{what}: {hint}")
    return Own(file, name, sha256)


def _is_own(module: types.ModuleType, key: str, value: Callable) -> bool:
    if key.startswith("_") or getattr(value, "__module__", "") != module.__name__:
        return False
    return inspect.isfunction(value) or inspect.isclass(value)
