"""What one rank of a run does, from wherever the run stands to its end: the parts put together. No Ray here."""

import contextlib
import ctypes
import dataclasses
import os
import warnings

import numpy as np
import torch

from pipeline.loading.cache import Cache, open_cache
from pipeline.loading.steps import Steps, fixed_batches
from pipeline.shards import index
from pipeline.training import checkpoint, weights
from pipeline.training.cadence import total_steps
from pipeline.training.ledger import Ledger
from pipeline.training.loop import NotFinite, train
from pipeline.training.resources import Resources
from pipeline.training.run import Run
from pipeline.training.saver import Saver
from pipeline.training.tasks import ClassifyConfig, GanConfig, Predictions, Task, draw_images, predict
from pipeline.training.tracking import Trackers
from pipeline.training.world import Contact, World

EVALUATION_BATCH = 256  # fixed: the shape of a computation must not depend on who asks
_NAMED = 5  # keys in a message
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
# For the process of a rank that is a thread of it and computes on the CPU. Else glibc gives what is over 64 MiB back to
# the system whenever such a thread frees it, whatever `_keep_freed_memory` says: 8 % of a step of ResNet-18. Images of
# a GPU's rank are decoded by many threads, which may have arenas of their own.
ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}


def train_rank(run: Run, world: World, resources: Resources, threads: int, contact: Contact) -> dict:
    """Trains one rank from wherever the run stands to its end, or until it is asked to stop. Returns the last row
    logged (of any start).
    """
    _keep_freed_memory()
    config, dataset = run.config, run.dataset()
    chosen, cache = run.chosen(dataset), open_cache(run.data, resources.cache, resources.cache_gb)
    split, task = chosen.split, run.task(world.device, training=True)
    attempt, found = checkpoint.claim(run.path) if world.rank == 0 else (0, None)
    found = world.from_first(found)
    state = checkpoint.read_state(run.path, found) if found else {"samples": 0}
    if found:
        task.load(state["task"])
    elif run.init:
        weights.begin_from(task, run.init, config.task, run.facts, config.optim)
    position, skipped = state["samples"], state.get("skipped", 0)
    if state.get("over") or position >= total_steps(config.loop, len(split)) * config.loop.batch:
        return {"samples": position, **(found.validation if found else {})}

    def validate() -> dict:
        held_out = run.validation(dataset, chosen)
        if held_out is None or not isinstance(config.task, ClassifyConfig):
            return {}
        answers = evaluate_rank(run, task, held_out, world, threads, cache)
        return {"loss": answers.loss, "accuracy": answers.accuracy}

    batching = dataclasses.replace(run.batching, world=world.size)
    pinned = torch.device(world.device).type == "cuda"
    more = {"cache": cache, "pinned": pinned, "draws": chosen.draws}
    loader = Steps(split, config.augment, config.loop.seed, batching, world.rank, position, threads, **more)
    steps, saver = iter(loader), None
    if world.rank == 0:
        about = run.about()
        trackers = Trackers(run.path, about["config"], found.segments if found else [])
        saver = Saver(run.path, attempt, found, config.loop.keep, trackers, about, stays=run.snapshot())
        ledger = Ledger(run.path, attempt, world.size, position, world.clock, world.device, contact.launch)
        contact = _noting(contact, ledger, world)
    ended = "failed"
    try:
        row = train(
            config.loop,
            config.optim,
            task,
            steps,
            len(split),
            world,
            validate,
            saver,
            contact,
            skipped,
            state.get("best"),
        )
        quarantined = _quarantined(loader, world)
        ended = "stopped" if "stopped" in row else "finished"
        return row | ({"quarantined": quarantined} if quarantined else {})
    except NotFinite as error:
        raise FloatingPointError(_explained(run, split, error, world, saver)) from None
    except Exception as error:
        ended = f"failed: {type(error).__name__}"
        raise
    finally:
        steps.close()
        if saver:
            saver.close()
            trackers.end(ended)
            ledger.end(ended)


def _noting(contact: Contact, ledger: Ledger, world: World) -> Contact:
    """The contact with a report that also tells the ledger, and says of each row how long it waited for data."""
    clock, before = world.clock, {"data": 0.0, "all": 0.0}

    def report(row: dict) -> None:
        ledger.reached(row["samples"])
        data, total = clock.seconds.get("data", 0.0), sum(clock.seconds.values())
        share = (data - before["data"]) / max(total - before["all"], 1e-9)
        before.update(data=data, all=total)
        contact.report(row | {"data_wait": share, "workers": world.size})

    return dataclasses.replace(contact, report=report)


def _explained(run: Run, split: index.Split, error: NotFinite, world: World, saver: Saver | None) -> str:
    """What went wrong, with the samples it went wrong on and the checkpoint that is still good; alike on every rank."""
    keys = [split.keys[row].as_py() for row in error.rows[:_NAMED]]
    more = f" and {len(error.rows) - _NAMED} more" if len(error.rows) > _NAMED else ""
    samples = f" on the samples {', '.join(keys)}{more}" if keys else ""
    good = world.from_first(saver and saver.newest())
    kept = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
    return (
        f"{error}{samples}; {kept}. Lower --lr or look at those samples, or run the same command with "
        f"--skip-nonfinite K, which passes over K such steps"
    )


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
    return predict(task, run.facts, world.clock.ticking(batches), len(split), world)


def restored(run: Run, device="cpu", newest: bool = False) -> tuple[Task, checkpoint.Manifest]:
    """The run's task with the weights of its best checkpoint, or of its newest. Raises ValueError if it has none that
    verifies."""
    chain = checkpoint.lineage(run.path)
    best = None if newest else checkpoint.best(run.path, chain)
    for manifest in ([best] if best else []) + [m for m in chain if m != best]:
        try:
            state = checkpoint.read_state(run.path, manifest)
        except ValueError as error:
            warnings.warn(f"{error}; taking another", stacklevel=2)
            continue
        task = run.task(device)
        task.load(state["task"])
        return task, manifest
    raise ValueError(f"{run.path} has no checkpoint that can be read: train it first")


def draw_classes(
    run: Run | weights.Published, n: int, seed: int = 0, label: str | None = None
) -> tuple[list[np.ndarray], str]:
    """n images of a GAN's run, or of a published one, uint8 (s, s, c), sorted by class in equal shares (or all of class
    `label`), and the name of the checkpoint or version. Raises ValueError if it is no GAN's, has no checkpoint or does
    not know the class.
    """
    published = isinstance(run, weights.Published)
    if not isinstance(run.config if published else run.config.task, GanConfig):
        raise ValueError(f"{run.path} trains a classifier, which draws nothing: `sample` wants a GAN's run")
    classes = run.facts.classes
    if label is not None and label not in classes:
        raise ValueError(f"no class {label!r} in {run.path}: it knows {', '.join(classes) or 'none'}")
    if label is not None:
        labels = np.full(n, classes.index(label))
    else:
        labels = np.arange(n) // -(-n // len(classes)) if classes else np.zeros(n, int)
    if published:
        task, name = run.task, run.info["version"]
    else:
        task, manifest = restored(run)
        name = manifest.name
    return list(draw_images(task, labels.astype(np.int64), seed)), name


def use_threads(threads: int, workers_here: int = 1) -> int:
    """Sets and returns the number of threads this process computes with."""
    threads = threads or max(1, (os.cpu_count() or 1) // max(1, workers_here))
    torch.set_num_threads(threads)
    return threads


def _keep_freed_memory() -> None:
    """Given back and taken anew, a step's activations and gradients would be zeroed pages each time: 5 % of a step."""
    with contextlib.suppress(OSError, AttributeError):  # glibc's alone
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
