"""What a checkpoint costs training: seconds it stands still, how much slower it goes meanwhile; and how fast it is."""

import contextlib
import os
import statistics
import tempfile
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from cluster.session import ray_session
from jobs.bench.rounds import ratio, take_turns
from jobs.bench.slow_road import slow_road
from jobs.command import absolute, execute, parse, say
from pipeline import storage
from pipeline.training import checkpoint
from pipeline.training.saver import Saver

_ROAD = (20e6, 0.03)  # bytes/s and seconds of each connection of the slow road


@dataclass(frozen=True)
class Args:
    """Seconds that training stands still for checkpoints, of all: `ratio`. Beside it how much slower steps are while
    one is written, the same of Ray Train's own synchronous report, and the rate of both uploads, on the road there is
    and on one where a connection carries 20 MB/s and answers take 30 ms.
    """

    store: str | None = None
    """Where checkpoints go, local or s3://bucket/prefix; default: a temporary folder, without the slow road."""
    saves: int = 3
    """Checkpoints of each side."""
    every: float = 60.0
    """Seconds of training between them."""
    size: float = 1.0
    """Width of the state, 1: that of ResNet-50 with momentum and an average of the weights, 307 MB."""
    rounds: int = 3
    """Uploads of each side."""
    json: bool = False
    """Print the result as one JSON object on stdout."""


def run(args: Args) -> dict:
    """{rate (MB/s), ratio, blocked_s, slow_down, ray: {ratio, blocked_s}, upload: {...}, slow_road: {...}}"""
    if args.saves < 1 or args.rounds < 1 or not args.every > 0 or not args.size > 0:
        raise ValueError(f"saves {args.saves}, rounds {args.rounds}, every {args.every}, size {args.size}: above 0")
    with tempfile.TemporaryDirectory(prefix="millstream-bench-") as folder, ray_session(1):
        place = storage.join(absolute(args.store or folder), uuid.uuid4().hex[:8])
        try:
            return _measured(args, place, folder)
        finally:
            storage.delete_tree(place)


def _measured(args: Args, place: str, folder: str) -> dict:
    state = resnet50(args.size)
    mb = sum(t.nbytes for t in tensors(state)) / 1e6
    say(f"a state of {mb:,.0f} MB, {args.saves} checkpoints, one each {args.every:g} s, to {place}")
    found = ours(state, storage.join(place, "ours"), args.saves, args.every)
    say(f"ours: {found['ratio']:.2%} of the time nothing moves; {found['slow_down']:.1%} slower while one is written")
    theirs = rays(storage.join(place, "ray"), args)
    say(f"Ray's synchronous report: {theirs['ratio']:.2%}")
    torch.save(state, f"{folder}/state.pt")
    up = uploads(place, f"{folder}/state.pt", args.rounds, mb)
    found |= {"rate": up["ours"], "limit": up["ray"], "ray": theirs, "upload": up}
    if storage.is_remote(place):
        with _on_the_slow_road():
            found["slow_road"] = uploads(place, f"{folder}/state.pt", args.rounds, mb)
    else:
        say("no slow road to a folder: name a --store s3://...")
    return found


def resnet50(width: float) -> dict:
    """A state of ResNet-50's shapes (He et al. 2016): weights, their average, momentum."""

    def sizes() -> Iterator[tuple[int, ...]]:
        wide = [round(n * width) for n in (64, 64, 128, 256, 512)]
        yield from ((wide[0], 3, 7, 7), (wide[0],), (wide[0],))
        before = wide[0]
        for planes, blocks in zip(wide[1:], (3, 4, 6, 3), strict=True):
            for block in range(blocks):
                yield from ((planes, before, 1, 1), (planes, planes, 3, 3), (4 * planes, planes, 1, 1))
                yield from ((planes,), (planes,), (planes,), (planes,), (4 * planes,), (4 * planes,))
                if block == 0:
                    yield from ((4 * planes, before, 1, 1), (4 * planes,), (4 * planes,))
                before = 4 * planes
        yield from ((1000, before), (1000,))

    def drawn() -> dict:
        return {str(number): torch.randn(size) for number, size in enumerate(sizes())}

    return {"model": drawn(), "average": drawn(), "momentum": drawn()}


def tensors(state: dict) -> list[torch.Tensor]:
    return [tensor for part in state.values() for tensor in part.values()]


def stepping() -> Callable[[], None]:
    """A step of training on this CPU, of some milliseconds, on one thread: the other core is the writer's."""
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.Flatten(), nn.LazyLinear(10))
    images = torch.randn(16, 3, 32, 32)
    model(images)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)

    def step() -> None:
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()

    return step


def ours(state: dict, run: str, saves: int, every: float) -> dict:
    """{ratio: blocked of all seconds, blocked_s, slow_down: of steps while a checkpoint is written}"""
    step, (attempt, found) = stepping(), checkpoint.claim(run)
    saver, clock = Saver(run, attempt, found), time.perf_counter
    blocked, steps, seconds = [], [0, 0], [0.0, 0.0]
    begin = clock()
    for number in range(saves):
        end = clock() + every
        while (now := clock()) < end:
            writing = saver.writing()
            step()
            steps[writing] += 1
            seconds[writing] += clock() - now
        before = clock()
        saver.save(state, number + 1, [], {})
        blocked.append(clock() - before)
    while saver.writing():
        before = clock()
        step()
        steps[1] += 1
        seconds[1] += clock() - before
    wall = clock() - begin
    saver.wait()
    saver.close()
    slow = 1 - (steps[1] / seconds[1]) / (steps[0] / seconds[0]) if seconds[1] else 0.0
    return {"ratio": sum(blocked) / wall, "blocked_s": blocked, "slow_down": slow}


def rays(place: str, args: Args) -> dict:
    """The same of Ray Train's report, as its documentation writes it: torch.save into a folder, then report."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    filesystem, inside = _arrow(place)

    def train(config: dict) -> list[float]:
        import ray.train

        state, step, blocked = resnet50(config["size"]), stepping(), []
        for _ in range(config["saves"]):
            end = time.perf_counter() + config["every"]
            while time.perf_counter() < end:
                step()
            before = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                torch.save(state, f"{folder}/state.pt")
                ray.train.report({}, checkpoint=ray.train.Checkpoint.from_directory(folder))
            blocked.append(time.perf_counter() - before)
        return blocked

    config = {"size": args.size, "saves": args.saves, "every": args.every}
    run_config = RunConfig(name="ray", storage_path=inside, storage_filesystem=filesystem)
    trainer = TorchTrainer(
        train, train_loop_config=config, scaling_config=ScalingConfig(num_workers=1), run_config=run_config
    )
    blocked = trainer.fit().return_value
    return {"ratio": sum(blocked) / (sum(blocked) + args.saves * args.every), "blocked_s": blocked}


def _arrow(place: str):
    """(pyarrow filesystem, path inside it), set up as ours is."""
    from pyarrow import fs

    if not storage.is_remote(place):
        return fs.LocalFileSystem(), place
    endpoint = urllib.parse.urlsplit(os.environ.get("AWS_ENDPOINT_URL", ""))
    more = {"endpoint_override": endpoint.netloc, "scheme": endpoint.scheme} if endpoint.netloc else {}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return fs.S3FileSystem(region=region, **more), place.removeprefix("s3://")


def uploads(place: str, file: str, rounds: int, mb: float) -> dict:
    """{ours, ray (MB/s, medians), ratio}: of one file, by turns. Ray's as its storage layer calls pyarrow."""
    from pyarrow import fs

    with open(file, "rb") as opened:
        data = opened.read()
    filesystem, inside = _arrow(place)

    def upload() -> float:
        began = time.perf_counter()
        storage.write(storage.join(place, "up-ours"), data)
        return mb / (time.perf_counter() - began)

    def rays_upload() -> float:
        began = time.perf_counter()
        threads = {"use_threads": False} if storage.is_remote(place) else {}
        more = {"destination_filesystem": filesystem, "chunk_size": 64 << 20, **threads}
        fs.copy_files(file, f"{inside}/up-ray", source_filesystem=fs.LocalFileSystem(), **more)
        return mb / (time.perf_counter() - began)

    rates = take_turns(rounds, {"ours": upload, "ray": rays_upload}, "MB/s")
    return {name: statistics.median(rate) for name, rate in rates.items()} | {
        "ratio": ratio(rates["ours"], rates["ray"])
    }


@contextlib.contextmanager
def _on_the_slow_road() -> Iterator[None]:
    there = urllib.parse.urlsplit(os.environ.get("AWS_ENDPOINT_URL", ""))
    if there.scheme != "http":
        raise ValueError("the slow road needs AWS_ENDPOINT_URL=http://HOST:PORT: TLS cannot be led through it")
    say(f"each connection at {_ROAD[0] / 1e6:.0f} MB/s, answers {_ROAD[1] * 1000:.0f} ms later:")
    with slow_road(there.hostname, there.port or 80, *_ROAD) as port:
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
        try:
            yield
        finally:
            os.environ["AWS_ENDPOINT_URL"] = there.geturl()


def main(argv: list[str]) -> int:
    args = parse(Args, "bench checkpoint", argv)
    return execute(lambda: run(args), args.json)
