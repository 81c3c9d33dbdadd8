"""The Ray a verb runs on: a private one on this machine that goes when the verb goes, or the cluster it is told of.

A plain `ray.init()` picks up whatever Ray the machine's last user left behind, and fails on it if versions or tokens
differ. So a local session is always its own, with a token of its own and a folder of its own. When the verb ends, and
also when it is SIGKILLed, the reaper (`cluster.reap`) ends what Ray left running and removes the folder.
"""

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_TOKEN = secrets.token_hex(32)  # one a process, since Ray remembers the first it reads


@contextlib.contextmanager
def ray_session(workers: int, address: str | None = None) -> Iterator[None]:
    """Ray, initialised: at `address` (or RAY_ADDRESS) if there is one, else on this machine with `workers` slots.

    A Ray that this process has initialised already is used, and left as it is. Raises ValueError if there is no Ray at
    the address.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")  # how soon the end of a run is noticed
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = address or os.environ.get("RAY_ADDRESS")
    if address and address != "local":
        with _on_cluster(address):
            yield
        return
    with _own_folder() as folder, _own_token(), _scratch(folder):
        import ray

        cores = os.cpu_count() or 1
        ray.init(
            address="local",
            num_cpus=max(cores, workers),
            object_store_memory=256 << 20,  # our tasks pass paths and rows, never images
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=str(folder / "r"),  # Ray opens it to everybody: it must lie inside one that is ours alone
        )
        try:
            yield
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _on_cluster(address: str) -> Iterator[None]:
    import ray

    _knock(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except ConnectionError as error:
        if "InvalidAuthToken" in f"{error} {error.__cause__} {error.__context__}":
            wanted = "set RAY_AUTH_TOKEN to its token (or RAY_AUTH_MODE=disabled if it has none)"
            raise ValueError(f"the Ray at {address!r} refuses our token: {wanted}") from None
        raise ValueError(f"no Ray answers at {address!r}: {str(error).splitlines()[0]}") from None
    except SystemExit:  # what Ray does after minutes of asking in vain
        raise ValueError(f"no Ray answers at {address!r}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """ValueError if nothing listens at HOST:PORT. Ray itself asks for two minutes, and then ends the process."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not (colon and port.isdigit()):
        return  # auto, or something that Ray refuses at once
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        raise ValueError(f"no Ray answers at {address!r}: {error}") from None


@contextlib.contextmanager
def _own_folder() -> Iterator[Path]:
    """A session folder, and the reaper that sees to its end: it waits for our end of a pipe to close."""
    parent = Path(tempfile.gettempdir())
    if len(str(parent)) > 16:  # Ray's sockets lie below it, and a socket's path ends at 107 characters
        parent = Path("/tmp")
    folder = Path(tempfile.mkdtemp(prefix="millstream-ray-", dir=parent))
    command = [sys.executable, str(Path(__file__).with_name("reap.py")), str(folder)]
    reaper = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield folder
    finally:
        reaper.stdin.close()
        reaper.wait(30)


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[None]:
    """Tells `training.fit` where Ray Train may keep its books: where the reaper finds them."""
    os.environ["MILLSTREAM_SCRATCH"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("MILLSTREAM_SCRATCH", None)


@contextlib.contextmanager
def _own_token() -> Iterator[None]:
    """A token for the session. Ray's own default would leave one in the home folder, readable by everybody.

    The mode is Ray's to set: it must be known before `import ray`, or be refreshed as `ray.init` does when unset.
    """
    if {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        yield
        return
    os.environ["RAY_AUTH_TOKEN"] = _TOKEN
    try:
        yield
    finally:
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
            os.environ.pop(name, None)
