"""[Ray Train] One attempt at a run: a group of ranks that lives until it is done, is asked to stop, or breaks.

Ray Train starts the processes, joins them into a process group and notices when one dies. It is given no checkpoints
(ours are the one truth), a new run name each time (the same name and path would silently resume its own state), and no
say in what follows a failure. What it has no word for goes through a mailbox, an actor beside the driver:

    ranks -> driver     rows of rank 0; each second from every rank a beat: where it is, and how far it has come
    driver -> ranks     "save": take a checkpoint after the step in flight and return (preemption, more room, Ctrl-C)
                        "abort": leave at once (a rank is silent or holds the others up)

`ray.train.get_preemption_info` would tell of preemptions too, but as a barrier of all ranks; the word "save" travels
with the gradients instead, and reaches every rank in the same step. Ray's own elastic resize saves nothing first.
"""

import contextlib
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.training import gloo, room
from pipeline.training.checkpoint import Superseded
from pipeline.training.ledger import Launch
from pipeline.training.rank import ONE_ARENA, use_threads
from pipeline.training.resources import Resources
from pipeline.training.world import Contact, World

Report = Callable[[dict], None]
FATAL = (ValueError, FloatingPointError, FileNotFoundError, PermissionError, Superseded)  # would happen again
_POLL_S = 0.5
_BEAT_S = 1.0
_SILENT_S = 60.0  # without a beat: its node, or the way there, is gone
_LONELY_S = 30.0  # before people are told that there is no room


class Preempted(RuntimeError):
    """The attempt broke after a node had given notice: nobody's failure."""


@dataclass(frozen=True)
class Ended:
    """How an attempt ended well: what rank 0 returned, and why it was asked to stop, if it was."""

    result: object
    why: str = ""


def run(
    body: Callable, args: tuple, size: int, larger: int, resources: Resources, launch: Launch, report: Report, stop
) -> Ended:
    """body(*args, world, threads, contact) on `size` ranks. Ray must be initialised.

    larger: the size to grow to once there is room (`size`: never); stop: an Event that ends it with a checkpoint.
    Raises what a rank raised if that is one of FATAL, Preempted, or RuntimeError with one line of why.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    cuda, here = room.cuda(resources, size), ray.get_runtime_context().get_node_id()
    options = {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False)}
    mailbox = ray.remote(**options)(_Mailbox).remote()
    config = {"body": body, "args": args, "threads": resources.threads, "mailbox": mailbox, "launch": launch}
    with contextlib.ExitStack() as stack:
        # Ray Train insists on a place for its own bookkeeping; nothing of ours is in it.
        where = os.environ.get("MILLSTREAM_SCRATCH")  # set by a session of our own, which removes it after a SIGKILL
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="millstream-train-", dir=where))
        # Longer than we wait for a hang, so that the error is ours, with the rank in it.
        timeout = int(resources.hang_seconds + 2 * _SILENT_S)
        trainer = TorchTrainer(
            _on_worker,
            train_loop_config=config,
            torch_config=gloo.torch_config("nccl" if cuda else "gloo", timeout),
            scaling_config=ScalingConfig(num_workers=size, use_gpu=cuda),
            run_config=RunConfig(
                name=f"attempt-{uuid.uuid4().hex}",
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=0, max_preemption_failures=0),
                worker_runtime_env={} if cuda else {"env_vars": ONE_ARENA},
            ),
        )
        outcome: dict = {}
        # Not in the main thread: there Ray Train would replace our Ctrl-C by one that exits 0.
        thread = threading.Thread(target=_fit, args=(trainer, outcome), daemon=True)
        wanted = room.Wanted(larger - size, cuda)
        stack.callback(wanted.drop)
        lookout = _Lookout(mailbox, size, larger, wanted, cuda, resources, report, stop)
        thread.start()
        while thread.is_alive():
            thread.join(_POLL_S)
            lookout.look()
        lookout.look()
    if lookout.result:
        return Ended(*lookout.result, lookout.why)
    error = outcome.get("error")
    if isinstance(error, TrainingFailedError):
        error = _cause(error)
    if isinstance(error, FATAL):
        raise error
    if lookout.leaving:
        raise Preempted(f"{lookout.why}; it went before a checkpoint stood")
    raise RuntimeError(lookout.broken or str(error or "the workers ended without a word"))


def _fit(trainer, outcome: dict) -> None:
    try:
        trainer.fit()
    except BaseException as error:  # handed to the thread that waits, which raises it
        outcome["error"] = error


class _Lookout:
    """What the driver watches while an attempt runs, and what it tells the ranks."""

    def __init__(self, mailbox, size: int, larger: int, wanted, cuda: bool, resources: Resources, report, stop):
        self.mailbox, self.size, self.larger, self.wanted, self.cuda = mailbox, size, larger, wanted, cuda
        self.resources, self.report, self.stop = resources, report, stop
        self.why, self.broken, self.leaving, self.result = "", "", False, None
        self.began, self.first_step, self.lonely = time.monotonic(), None, True

    def look(self) -> None:
        import ray

        try:
            rows, ranks, self.result = ray.get(self.mailbox.take.remote(), timeout=10)
            draining = room.draining() if ranks else {}
        except ray.exceptions.RayError:  # the head is busy, or gone: then the group ends as well
            return
        for row in rows:
            self.report(row)
        if rows and self.first_step is None:
            self.first_step = time.monotonic()
        if not ranks and self.lonely and time.monotonic() - self.began > _LONELY_S:
            self.lonely = False
            most, kind = room.capacity(self.cuda), "GPU" if self.cuda else "CPU"
            short = f": the cluster has {most} {kind}s" if most < self.size else ""
            self.report({"note": f"waiting for {self.size} workers to start{short}"})
        if not self.why and (why := self._reason_to_stop(ranks, draining)):
            self.why = why
            self.mailbox.tell.remote("save")
        if not self.broken and not self.result and (broken := self._broken(ranks)):
            self.broken = broken
            self.mailbox.tell.remote("abort")

    def _reason_to_stop(self, ranks: dict, draining: dict[str, int]) -> str:
        if self.stop.is_set():
            return "it was asked to stop"
        for rank, beat in ranks.items():
            if beat["node"] in draining:
                self.leaving = True
                return f"the node of rank {rank} ({beat['host']}) is about to be taken away"
        settled = self.first_step and time.monotonic() - self.first_step > self.resources.resize_seconds
        return f"there is room for {self.larger} workers" if settled and self.wanted.there() else ""

    def _broken(self, ranks: dict) -> str:
        for rank, beat in ranks.items():
            if beat["silent"] > _SILENT_S and not beat["over"]:
                return f"rank {rank} on {beat['host']} has not been heard of for {beat['silent']:.0f} s"
        working = {rank: beat for rank, beat in ranks.items() if not beat["over"]}
        if len(working) < self.size or min(beat["still"] for beat in working.values()) < self.resources.hang_seconds:
            return ""
        rank, beat = min(working.items(), key=lambda item: (item[1]["step"], item[1]["laps"]))
        return (
            f"rank {rank} on {beat['host']} (pid {beat['pid']}) holds the others up: at step {beat['step']} nothing "
            f"has moved for {beat['still']:.0f} s, and the last thing it finished was {beat['last']!r}"
        )


class _Mailbox:
    """An actor: rank 0's rows until the driver fetches them, the ranks' last beats, and the driver's word to them."""

    def __init__(self):
        self.rows, self.beats, self.word, self.result = [], {}, "", None

    def put(self, row: dict) -> None:
        self.rows.append(row)

    def beat(self, rank: int, beat: dict) -> str:
        now, before = time.monotonic(), self.beats.get(rank)
        moved = now if before is None or before[0]["moves"] != beat["moves"] else before[2]
        self.beats[rank] = (beat, now, moved)
        return self.word

    def tell(self, word: str) -> None:
        self.word = word

    def finish(self, result) -> None:
        self.result = (result,)

    def take(self) -> tuple[list[dict], dict[int, dict], tuple | None]:
        (rows, self.rows), now = (self.rows, []), time.monotonic()
        ranks = {rank: beat | {"silent": now - seen, "still": now - moved} for rank, (beat, seen, moved) in
                 self.beats.items()}  # fmt: skip
        return rows, ranks, self.result


def _on_worker(config: dict) -> None:
    import ray
    from ray.train import get_context
    from ray.train.torch import get_device

    context, mailbox = get_context(), config["mailbox"]
    world = World(context.get_world_rank(), context.get_world_size(), get_device())
    pulse, sender = _Pulse(mailbox, world), _Sender(mailbox, world.rank)
    contact = Contact(sender.report, lambda: pulse.word == "save", config["launch"])
    with pulse:
        threads = use_threads(config["threads"], context.get_local_world_size())
        result = config["body"](*config["args"], world, threads, contact)
        if world.rank == 0:
            sender.flush()
            ray.get(mailbox.finish.remote(result), timeout=_SILENT_S)


class _Sender:
    """Sends rank 0's rows, at most two a second besides validations: training does not wait for its spectators."""

    def __init__(self, mailbox, rank: int):
        self.mailbox, self.rank, self.last, self.sent = mailbox, rank, 0.0, []

    def report(self, row: dict) -> None:
        import ray

        if self.rank or not ("val_loss" in row or time.monotonic() - self.last > _POLL_S):
            return
        self.last = time.monotonic()
        _, self.sent = ray.wait(self.sent, num_returns=len(self.sent), timeout=0) if self.sent else ([], [])
        if len(self.sent) < 10:
            self.sent = [*self.sent, self.mailbox.put.remote(row)]

    def flush(self) -> None:
        import ray

        if self.sent:
            ray.wait(self.sent, num_returns=len(self.sent), timeout=_SILENT_S / 2)


class _Pulse:
    """A thread beside a rank: says each second how far the rank has come, and hears the driver's word."""

    def __init__(self, mailbox, world: World):
        import ray
        from ray.util import get_node_ip_address

        self.mailbox, self.rank, self.clock, self.word = mailbox, world.rank, world.clock, ""
        node = ray.get_runtime_context().get_node_id()
        self.where = {"node": node, "host": get_node_ip_address(), "pid": os.getpid()}
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._beat_on, name="pulse", daemon=True)

    def __enter__(self) -> None:
        self._beat()  # so that the driver knows where every rank is before the first step
        self.thread.start()

    def __exit__(self, *_) -> None:
        self.over.set()
        self.thread.join(_SILENT_S)
        with contextlib.suppress(Exception):  # the driver may have left already
            self._beat()

    def _beat(self) -> None:
        import ray

        clock = self.clock
        how = {"step": clock.step, "laps": clock.laps, "moves": clock.moves, "last": clock.last}
        beat = self.where | how | {"over": self.over.is_set()}
        self.word = ray.get(self.mailbox.beat.remote(self.rank, beat), timeout=_SILENT_S)

    def _beat_on(self) -> None:
        while not self.over.wait(_BEAT_S):
            try:
                self._beat()
            except Exception:  # the driver is gone, and nobody would hear what this rank does
                self.word = "abort"
            if self.word == "abort" and not self.over.is_set():
                os._exit(1)  # the rank may be stuck in a collective, which nothing else ends


def _cause(error) -> Exception:
    """The exception a worker raised, as itself, if it would come again; else one line of what happened."""
    from ray.exceptions import RayActorError

    failures = sorted(getattr(error, "worker_failures", {}).items())
    for _, failure in failures:
        inner = getattr(failure, "_base_exc", None) or getattr(failure, "cause", None) or failure
        if isinstance(inner, FATAL):
            return inner
    for rank, failure in failures:  # the others only lost touch with it
        if isinstance(failure, RayActorError):
            return RuntimeError(f"rank {rank} died" + (", its node with it" if "node" in str(failure) else ""))
    why = str(failures[0][1] if failures else error).strip().splitlines() or [type(error).__name__]
    if any(word in why[-1] for word in ("gloo", "NCCL")):
        who = f"rank {failures[0][0]}" if failures else "a rank"
        return RuntimeError(f"{who} lost touch with another, which died or cannot be reached")
    return RuntimeError(f"a worker failed: {why[-1].partition('. ')[0]}")  # Ray goes on about possible causes
