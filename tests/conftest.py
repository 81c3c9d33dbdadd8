import functools
import os
import signal
import uuid

import numpy as np
import pytest
from PIL import Image
from s3_server import S3Server, wait_for

from cluster.session import ray_session
from pipeline.shards.build import build
from pipeline.shards.plan import Recipe

# What a shell starts in the background ignores Ctrl-C, and so would all that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
_MARK = f"MILLSTREAM_TESTS={uuid.uuid4().hex}"


def _left_behind() -> list[str]:
    """Command lines of the processes that inherited our mark, daemons that left our process tree too."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                ours = _MARK.encode() in file.read()
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                command = file.read().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        # multiprocessing's helpers live as long as we do
        if ours and int(pid) != os.getpid() and "multiprocessing." not in command:
            found.append(f"{pid}: {command}")
    return found


@pytest.fixture(scope="session", autouse=True)
def _no_process_outlives_the_tests():
    name, _, value = _MARK.partition("=")
    os.environ[name] = value
    yield
    del os.environ[name]
    wait_for(lambda: not _left_behind(), 20, f"end of our processes {_left_behind()}")


class S3(S3Server):
    """The session's server; `fresh()` gives a prefix nobody used before."""

    bucket = "millstream-tests"

    def fresh(self) -> str:
        return f"s3://{self.bucket}/{uuid.uuid4().hex[:8]}"


@pytest.fixture(scope="session")
def s3():
    with S3() as server, pytest.MonkeyPatch.context() as patch:
        server.create_bucket(server.bucket)
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in server.env.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="module")
def one_thread():
    """For tests of small computations: beside busy neighbours, threads would wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path):
    """A fresh, empty folder or prefix: the claims that hold in both are tested in both."""
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3").fresh()


@pytest.fixture(scope="session")
def ray_local(s3):
    """The one Ray of these tests, which verbs called in this process use as well.

    After the store: worker processes are born with its address.
    """
    import ray

    with ray_session(2):
        yield ray


@pytest.fixture(scope="module")
def schemas_read_once():
    """kubernetes-validate parses 4 MB of JSON at each call: nothing for a person with a file, minutes for our tests."""
    from kubernetes_validate import utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "schema_contents", functools.cache(utils.schema_contents))
        yield


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The digits as a dataset: 1,797 grey PNGs of 32 px, ten classes, in six shards; a tenth of them val."""
    out = str(tmp_path_factory.mktemp("digits") / "shards")
    build("digits:", out, Recipe(samples_per_shard=300), workers=0)
    return out


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A dataset of 90 images in three classes: sides of 40 to 90 px, colour JPEGs and grey PNGs."""
    root, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(7)
    for i in range(90):
        folder = root / "in" / "abc"[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        height, width = random.integers(40, 90, 2)
        small = random.integers(0, 256, (5, 5) if i % 4 == 0 else (5, 5, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize((int(width), int(height)))
        picture.save(folder / f"{i}.png") if i % 4 == 0 else picture.save(folder / f"{i}.jpg", quality=95)
    out = str(root / "shards")
    build(f"folder:{root / 'in'}", out, Recipe(samples_per_shard=30), workers=0)
    return out


@pytest.fixture
def cli(capsys):
    """cli(*words) -> (exit code, stdout, stderr), in this process."""

    from jobs.__main__ import main

    def call(*words) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as exit_:  # how the parser ends
            code = exit_.code
        out, err = capsys.readouterr()
        return code, out, " ".join(err.split())

    return call
