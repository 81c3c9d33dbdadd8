"""A run, attempt after attempt, until it is done: who may train it, what follows a failure, at which size it goes on.

`workers` 0 runs in this process, without Ray. Otherwise Ray must be initialised by the caller.
"""

import threading
from collections.abc import Callable, Collection

import torch

from pipeline import lease, storage
from pipeline.loading.cache import open_cache
from pipeline.loading.steps import fixed_batches
from pipeline.shards import index, pinned
from pipeline.training import attempt, checkpoint, ledger, room, weights
from pipeline.training.attempt import Report
from pipeline.training.ledger import Launch
from pipeline.training.rank import EVALUATION_BATCH, evaluate_rank, restored, train_rank, use_threads
from pipeline.training.resources import Resources, sizes, span
from pipeline.training.run import Run
from pipeline.training.tasks import Predictions, predict
from pipeline.training.world import Contact, World

# Of a row.
_NO_METRICS = {"step", "samples", "time", "lr", "samples_digest", "set_aside", "skipped", "data_wait", "workers"}
_NO_METRICS |= {"stopped", "early_stop", "loss_scale"}


def train(
    run: Run,
    resources: Resources,
    report: Report,
    waiting: Callable[[str], None] | None = None,
    stop: threading.Event | None = None,
) -> dict:
    """Trains a run to its end, restarting from its newest checkpoint when workers die; `report` sees its rows,
    `waiting` a line for people while a dead trainer's lease on S3 runs out. `stop`, once set, ends it early: with a
    checkpoint of the step in flight.

    Returns {run, done, stopped, early_stop, samples_seen, epochs, checkpoint, metrics, ledger}. Raises `lease.Held` if
    the run is being trained already.
    """
    with lease.claim(storage.join(run.path, ".lease"), "millstream train", waiting=waiting):
        done = finished(run)
        row = {} if done else launch(_train_body, (run, resources), run, resources, report, stop)
    chain = checkpoint.lineage(run.path)
    kept = checkpoint.best(run.path, chain)
    rows = checkpoint.read_metrics(run.path)
    metrics, last = ({k: v for k, v in numbers.items() if k not in _NO_METRICS} for numbers in (row, rows[-1]))
    best = {f"best_{name}": value for name, value in kept.validation.items()} if kept else {}
    return {
        "run": run.path,
        "done": done,  # nothing was left to do
        "stopped": "stopped" in row,
        "early_stop": rows[-1].get("early_stop", False),
        "samples_seen": chain[0].samples,
        "epochs": rows[-1]["epoch"],
        "checkpoint": storage.join(run.path, "checkpoints", kept.name),
        "metrics": (metrics or last) | best,
        "ledger": ledger.summary(run.path),
    }


def finished(run: Run) -> bool:
    """Whether the run's last checkpoint stands, and verifies."""
    found = checkpoint.newest(run.path)
    return bool(found) and (found[1].get("over", False) or found[0].samples >= run.steps() * run.config.loop.batch)


def evaluate(run: Run, data: str, split: str, resources: Resources) -> tuple[Predictions, str]:
    """Predictions of the run's best checkpoint for every sample of a split, and that checkpoint's name."""
    return launch(_evaluate_body, (run, data, split, resources), run, resources, lambda row: None)


def score(
    run: Run, newest: bool, others: list[str], data: str, generations: Collection[int], split: str, resources: Resources
):
    """Predictions of a run's best checkpoint (or its newest), and those of models published at the paths `others`, for
    every sample of the split of these generations: all by the same ranks, one after the other."""
    body = (run, newest, others, data, tuple(generations), split, resources)
    return launch(_score_body, body, run, resources, lambda row: None)


def _score_body(run, newest, others, data, generations, split, resources, world: World, threads: int, contact: Contact):
    rows = pinned.of(index.load(data), generations).split(split)
    cache = open_cache(data, resources.cache, resources.cache_gb)
    answers = [evaluate_rank(run, restored(run, world.device, newest)[0], rows, world, threads, cache)]
    return answers + [_answers(path, rows, cache, world, threads) for path in others]


def _answers(path: str, rows: index.Split, cache, world: World, threads: int) -> Predictions:
    """Of the model published at `path`."""
    model = weights.load(path, world.device)
    batches = fixed_batches(rows, model.augment, EVALUATION_BATCH, world.rank, world.size, threads, cache)
    return predict(model.task, model.facts, world.clock.ticking(batches), len(rows), world)


def evaluate_published(path: str, data: str, split: str, resources: Resources) -> Predictions:
    """Predictions of the model published at `path` for every sample of a split."""
    return launch(_published_body, (path, data, split, resources), None, resources, lambda row: None)


def _published_body(path, data, split, resources, world: World, threads: int, contact: Contact) -> Predictions:
    cache = open_cache(data, resources.cache, resources.cache_gb)
    return _answers(path, index.load(data).split(split), cache, world, threads)


def _train_body(run: Run, resources: Resources, world: World, threads: int, contact: Contact) -> dict:
    return train_rank(run, world, resources, threads, contact)


def _evaluate_body(run: Run, data: str, split: str, resources: Resources, world: World, threads: int, contact: Contact):
    task, manifest = restored(run, world.device)
    cache = open_cache(data, resources.cache, resources.cache_gb)
    rows = index.load(data).split(split)
    return evaluate_rank(run, task, rows, world, threads, cache), manifest.name


def launch(
    body: Callable,
    args: tuple,
    run: Run | None,
    resources: Resources,
    report: Report,
    stop: threading.Event | None = None,
):
    """body(*args, world, threads, contact) on the ranks of `resources`; returns rank 0's result. run: whose checkpoints
    tell whether it gets on, and whose micro-batches are shared; None: nobody's, and any number of ranks will do.

    An attempt that was asked to stop because nodes go or come is followed by the next, at another size if the
    resources allow; one that failed too, but not when that would happen again, nor when `max_failures` of them in a
    row brought no new checkpoint.
    """
    stop, launched = stop or threading.Event(), Launch()
    if resources.most == 0:
        world = World(device=device_here(resources))
        return body(*args, world, use_threads(resources.threads), Contact(report, stop.is_set, launched))
    latest: dict = {}

    def noting(row: dict) -> None:
        latest.update(row if "step" in row else {})
        report(row)

    least, most = span(resources.workers)
    allowed = sizes(resources.workers, run.config.loop.micro_batches) if run else list(range(least, most + 1))
    failures, restarts, reached, size, why = 0, 0, _reached(run), 0, ""
    while True:
        launched, before, size = launched.again(), size, room.choose(allowed, room.cuda(resources, allowed[0]))
        if before and before != size:
            report({"resize": size, "why": why})
        larger = next((n for n in allowed if n > size), size)
        try:
            ended = attempt.run(body, args, size, larger, resources, launched, noting, stop)
        except attempt.FATAL:
            raise
        except RuntimeError as error:
            if run:
                ledger.amend(run.path, latest)
            now, why = _reached(run), str(error)
            if not isinstance(error, attempt.Preempted):
                failures = failures + 1 if now == reached else 1
                if failures > resources.max_failures or stop.is_set():
                    raise
            reached, restarts = now, restarts + 1
            report({"restart": restarts, "why": why})
            continue
        if not ended.why or not isinstance(ended.result, dict) or "stopped" not in ended.result or stop.is_set():
            return ended.result
        why = ended.why
        report({"saved": ended.result["samples"], "why": why})


def device_here(resources: Resources) -> torch.device:
    """What this process computes on. ValueError if a GPU is asked for that torch does not find."""
    if resources.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU on this machine; use --device cpu, or auto")
    cuda = resources.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu")


def _reached(run: Run | None) -> int:
    """Samples of the newest checkpoint."""
    return 0 if run is None else next((manifest.samples for manifest in checkpoint.lineage(run.path)), 0)
