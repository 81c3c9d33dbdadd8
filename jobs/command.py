"""What every verb shares: where it speaks, how it fails, how its paths are meant.

People read stderr; stdout carries nothing but the one JSON object of --json. A user's mistake (ValueError and its kin)
is one clear line and exit code 2, anything else that failed is 1, Ctrl-C is 130.
"""

import contextlib
import json
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipeline import lease, storage

console = Console(stderr=True, highlight=False)
_QUIET_S = 60.0  # between two lines where nobody watches
MISTAKES = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
    lease.Held,
)


def say(text: str) -> None:
    """A line for people. Text is shown as it is: brackets in file names are not markup."""
    console.print(text, markup=False, soft_wrap=True)


def parse(args_type, verb: str, argv: list[str], default=None):
    """The command line as `args_type`; exits with 2 and the nearest known option for one that does not exist."""
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff)
    more = {} if default is None else {"default": default}
    # tyro spells it None; beside --fit none and --dedup none, which are words, nobody else would.
    argv = [
        "None" if (option, word) == ("--size", "none") else word
        for option, word in zip(["", *argv], argv, strict=False)
    ]
    argv = ["--size=None" if word == "--size=none" else word for word in argv]
    return tyro.cli(args_type, prog=f"millstream {verb}", args=argv, config=config, **more)


def execute(run: Callable[[], dict | None], as_json: bool) -> int:
    """Runs a verb; prints its result as JSON if asked; returns the exit code."""
    warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
    try:
        result = run()
    except KeyboardInterrupt:
        say("stopped. The same command again goes on from what is finished.")
        return 130
    except MISTAKES as mistake:
        _debug()
        say(f"error: {_line(mistake)}")
        return 2
    except (storage.StorageError, OSError, FloatingPointError, RuntimeError) as failure:
        _debug()
        say(f"failed: {_line(failure)}")
        return 1
    if as_json and result is not None:
        print(json.dumps(result, default=str), flush=True)
    return (result or {}).get("exit_code", 0)


class Stop(threading.Event):
    """Set by the first Ctrl-C or SIGTERM; `exit_code` says which, as shells do. The second ends work at once."""

    exit_code = 0

    def listen(self) -> dict:
        """Takes the two signals, also from who took them meanwhile, as Ray does; returns the handlers before."""
        return {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number, frame) -> None:
        if self.is_set():
            raise KeyboardInterrupt
        self.exit_code = 128 + number
        self.set()
        say("stopping after the step in flight, with a checkpoint; once more stops at once")


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Stop]:
    """What Ctrl-C and SIGTERM set, so that work can end in order; the second ends it at once."""
    stop = Stop()
    before = stop.listen()
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _debug() -> None:
    if os.environ.get("MILLSTREAM_DEBUG"):
        traceback.print_exc()


def _line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename and len(error.args) > 1:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def absolute(path: str) -> str:
    """A path as workers in other folders would understand it; remote ones are already."""
    return path.rstrip("/") if storage.is_remote(path) else os.path.abspath(os.path.expanduser(path))


def absolute_model(named: str) -> str:
    """The same for a model: models:NAME@champion stays what it is, nothing stays nothing."""
    return named if not named or named.startswith("models:") else absolute(named)


def absolute_source(uri: str) -> str:
    """The same for SOURCE, which may carry a scheme such as folder: before its path."""
    scheme, colon, path = uri.partition(":")
    if colon and not path.startswith("//"):
        return f"{scheme}:{absolute(path)}" if path else uri
    return absolute(uri)


def progress(unit: str) -> Progress:
    """A progress bar on stderr; silent where stderr is no terminal (the verbs print milestones there)."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


class TrainingProgress:
    """Shows a run's rows: a live bar in a terminal; elsewhere a line for each validation, and one a minute between."""

    def __init__(self, total: int):
        self.total, self.bar = total, progress("samples")
        self.first, self.said = None, time.monotonic()

    def __enter__(self):
        self.bar.start()
        self.id = self.bar.add_task("starting", total=self.total, note="")
        return self

    def __exit__(self, *_):
        self.bar.stop()

    def __call__(self, row: dict) -> None:
        if "epoch" not in row:
            say(_event(row))
            self.first = None  # the rate of what comes next is its own
            return
        if self.first is None:
            self.first = (row["samples"], time.monotonic())
        seconds = time.monotonic() - self.first[1]
        rate = (row["samples"] - self.first[0]) / seconds if seconds > 0.5 else 0
        note = " ".join(f"{k} {v:.4f}" for k, v in row.items() if k.endswith(("loss", "accuracy")))
        note += f" | {rate:,.0f}/s" if rate else ""
        note += f" | data wait {row['data_wait']:.0%}" if "data_wait" in row else ""
        note += f" | {row['workers']} workers" if row.get("workers", 1) > 1 else ""
        self.bar.update(self.id, completed=row["samples"], description=f"epoch {row['epoch']:.1f}", note=note)
        quiet = console.is_terminal or time.monotonic() - self.said < _QUIET_S
        if "val_loss" in row or row["samples"] >= self.total or not quiet:
            self.said = time.monotonic()
            say(f"epoch {row['epoch']:5.2f}  {row['samples']:>10,} samples  {note}")


def _event(row: dict) -> str:
    """What happened between attempts, as a line."""
    if "restart" in row:
        return f"workers failed ({row['why']}): restart {row['restart']} from the newest checkpoint"
    if "resize" in row:
        return f"going on with {row['resize']} workers ({row['why']})"
    return f"saved at {row['saved']:,} samples: {row['why']}" if "saved" in row else row["note"]


def shards_done() -> Callable[[int, int, int, int], None]:
    """Says how far sharding is, once a minute and at its end."""
    said = [time.monotonic()]

    def show(done: int, total: int, samples: int, rejects: int) -> None:
        if time.monotonic() - said[0] > _QUIET_S or done == total:
            said[0] = time.monotonic()
            say(f"{done:,} of {total:,} shards, {samples:,} samples, {rejects:,} rejected")

    return show


def training_rows() -> Callable[[dict], None]:
    """Shows the rows of a training whose length is not known beforehand: validations, events, and a line a minute."""
    said = [time.monotonic()]

    def show(row: dict) -> None:
        if "epoch" not in row:
            say(_event(row))
        elif "val_loss" in row or time.monotonic() - said[0] > _QUIET_S:
            said[0] = time.monotonic()
            numbers = " ".join(f"{k} {v:.4f}" for k, v in row.items() if k.endswith(("loss", "accuracy")))
            say(f"epoch {row['epoch']:5.2f}  {row['samples']:>10,} samples  {numbers}")

    return show


def fit_with_progress(opened, resources, stop: Stop | None = None) -> dict:
    """Trains an opened run, rows shown on stderr; Ray must run if the resources ask for workers."""
    from pipeline.training import fit

    with TrainingProgress(opened.steps() * opened.config.loop.batch) as show:
        return fit.train(opened, resources, show, waiting=say, stop=stop)
