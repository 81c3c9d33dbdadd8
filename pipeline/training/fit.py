"""[Ray Train] The same rank function on many workers: TorchTrainer around `run.train_rank` and `run.evaluate_rank`.

Ray Train starts the processes, joins them into a process group and notices when one dies; it is given no checkpoints
(ours are the one truth) and a new run name for each attempt, since the same name and path would silently resume its
own state. `workers` 0 runs in this process, without Ray. Ray must be initialised by the caller.
"""

import contextlib
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable

import torch

from pipeline import lease, storage
from pipeline.loading.cache import open_cache
from pipeline.shards import index
from pipeline.training import checkpoint
from pipeline.training.run import Resources, Run, evaluate_rank, restored, train_rank, use_threads
from pipeline.training.tasks import Predictions
from pipeline.training.world import World

Report = Callable[[dict], None]
_NO_METRICS = {"step", "samples", "time", "lr", "samples_digest", "set_aside"}  # of a row
_GROUP_TIMEOUT_S = 120  # of collectives; torch's default of 30 minutes hides a dead node for as long
_FATAL = (ValueError, FloatingPointError, checkpoint.Superseded, FileNotFoundError, PermissionError)


def train(run: Run, resources: Resources, report: Report, waiting: Callable[[str], None] | None = None) -> dict:
    """Trains a run to its end, restarting from its newest checkpoint when workers die; `report` sees its rows,
    `waiting` a line for people while a dead trainer's lease on S3 runs out.

    Returns {run, samples_seen, epochs, checkpoint, metrics}. Raises `lease.Held` if the run is being trained already.
    """
    with lease.claim(storage.join(run.path, ".lease"), "millstream train", waiting=waiting):
        row = {} if finished(run) else launch(_train_body, (run, resources), resources, report)
    chain = checkpoint.lineage(run.path)
    kept = checkpoint.best(run.path, chain)
    rows = checkpoint.read_metrics(run.path)
    metrics, last = ({k: v for k, v in numbers.items() if k not in _NO_METRICS} for numbers in (row, rows[-1]))
    best = {f"best_{name}": value for name, value in kept.validation.items()} if kept else {}
    return {
        "run": run.path,
        "done": not row,  # nothing was left to do
        "samples_seen": chain[0].samples,
        "epochs": rows[-1]["epoch"],
        "checkpoint": storage.join(run.path, "checkpoints", kept.name),
        "metrics": (metrics or last) | best,
    }


def finished(run: Run) -> bool:
    """Whether the run's last checkpoint stands, and verifies."""
    found = checkpoint.newest(run.path)
    return bool(found) and found[0].samples >= run.steps() * run.config.loop.batch


def evaluate(run: Run, data: str, split: str, resources: Resources) -> tuple[Predictions, str]:
    """Predictions of the run's best checkpoint for every sample of a split, and that checkpoint's name."""
    return launch(_evaluate_body, (run, data, split, resources), resources, lambda row: None)


def _train_body(run: Run, resources: Resources, world: World, threads: int, report: Report) -> dict:
    return train_rank(run, world, resources, threads, report)


def _evaluate_body(run: Run, data: str, split: str, resources: Resources, world: World, threads: int, report: Report):
    task, manifest = restored(run, world.device)
    cache = open_cache(data, resources.cache, resources.cache_gb)
    return evaluate_rank(run, task, index.load(data).split(split), world, threads, cache), manifest.name


def launch(body: Callable, args: tuple, resources: Resources, report: Report):
    """body(*args, world, threads, report) on `resources.workers` ranks; returns rank 0's result.

    A failed attempt is repeated up to max_failures times, but not when the failure would repeat itself.
    """
    if resources.workers == 0:
        cuda = resources.device == "cuda" or (resources.device == "auto" and torch.cuda.is_available())
        world = World(device=torch.device("cuda" if cuda else "cpu"))
        return body(*args, world, use_threads(resources.threads), report)
    for attempt in range(resources.max_failures + 1):
        try:
            return _attempt(body, args, resources, report)
        except _FATAL:
            raise
        except RuntimeError as error:
            if attempt == resources.max_failures:
                raise
            why = str(error).strip().splitlines()[-1].partition(". ")[0]  # Ray goes on about possible causes
            report({"restart": attempt + 1, "why": why})
    raise AssertionError("unreachable")


def _attempt(body: Callable, args: tuple, resources: Resources, report: Report):
    import ray
    from ray.train import RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    gpus = ray.cluster_resources().get("GPU", 0)
    cuda = resources.device == "cuda" or (resources.device == "auto" and gpus >= resources.workers)
    mailbox = ray.remote(num_cpus=0)(_Mailbox).remote()
    with contextlib.ExitStack() as stack:
        # Ray Train insists on a place for its own bookkeeping; nothing of ours is in it.
        where = os.environ.get("MILLSTREAM_SCRATCH")  # set by a session of our own, which removes it after a SIGKILL
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="millstream-train-", dir=where))
        trainer = TorchTrainer(
            _on_worker,
            train_loop_config={"body": body, "args": args, "threads": resources.threads, "mailbox": mailbox},
            torch_config=TorchConfig(backend="nccl" if cuda else "gloo", timeout_s=_GROUP_TIMEOUT_S),
            scaling_config=ScalingConfig(num_workers=resources.workers, use_gpu=cuda),
            run_config=RunConfig(name=f"attempt-{uuid.uuid4().hex}", storage_path=scratch),
        )
        outcome: dict = {}
        # Not in the main thread: there Ray Train would replace our Ctrl-C by one that exits 0.
        thread = threading.Thread(target=_fit, args=(trainer, outcome), daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.5)
            _deliver(mailbox, report)
        _deliver(mailbox, report)
    error = outcome.get("error")
    if isinstance(error, TrainingFailedError):
        raise _cause(error) from None
    if error:
        raise error
    return outcome["result"]


def _fit(trainer, outcome: dict) -> None:
    try:
        outcome["result"] = trainer.fit().return_value
    except BaseException as error:  # handed to the thread that waits, which raises it
        outcome["error"] = error


def _on_worker(config: dict):
    import ray
    from ray.train import get_context
    from ray.train.torch import get_device

    context = get_context()
    world = World(context.get_world_rank(), context.get_world_size(), get_device())
    mailbox, last, sent = config["mailbox"], 0.0, []

    def report(row: dict) -> None:
        nonlocal last, sent
        if world.rank or not ("val_loss" in row or time.monotonic() - last > 0.5):
            return
        last = time.monotonic()
        _, sent = ray.wait(sent, num_returns=len(sent), timeout=0) if sent else ([], [])
        if len(sent) < 10:  # training does not wait for its spectators
            sent = [*sent, mailbox.put.remote(row)]

    result = config["body"](
        *config["args"], world, use_threads(config["threads"], context.get_local_world_size()), report
    )
    if sent:
        ray.wait(sent, num_returns=len(sent), timeout=30)
    return result


class _Mailbox:
    """An actor that holds rank 0's rows until the driver fetches them."""

    def __init__(self):
        self.rows: list[dict] = []

    def put(self, row: dict) -> None:
        self.rows.append(row)

    def take(self) -> list[dict]:
        rows, self.rows = self.rows, []
        return rows


def _deliver(mailbox, report: Report) -> None:
    import ray

    with contextlib.suppress(ray.exceptions.RayError):  # progress is not worth failing for
        for row in ray.get(mailbox.take.remote(), timeout=10):
            report(row)


def _cause(error) -> Exception:
    """The exception a worker raised, as itself; else one line of what Ray says."""
    failures = getattr(error, "worker_failures", {})
    for _, failure in sorted(failures.items()):
        inner = getattr(failure, "_base_exc", None) or getattr(failure, "cause", None) or failure
        if isinstance(inner, _FATAL):
            return inner
    first = next(iter(failures.values()), error)
    return RuntimeError(f"a worker failed: {first}")
