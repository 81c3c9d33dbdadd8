"""Tells Ray that this machine is about to be taken away: `python -m cluster.preemption`, one on each VM of a cluster.

Clouds announce it through the VM's metadata server, and nobody asks it: plain `ray up` clusters learn of a preemption
when the node is dead. This asks once a second, and on a notice has Ray drain the node. A training run that hears of
the drain saves a checkpoint and goes on elsewhere (`pipeline.training.attempt`); nothing new is placed on the node.

Exits 0 once Ray has accepted the drain, 2 where no cloud answers, 143 on SIGTERM, 130 on Ctrl-C. No bad answer ends it.
The watcher imports no Ray: it stays small, and what Ray does when its head is gone (it ends the process, or hangs)
happens to a child that lives for seconds.
"""

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable

from cluster.clouds import METADATA, Ec2, Gce, Notice, find_cloud, say

_ATTEMPT_S = 15.0
_NO_NODE = 3  # exit code of the child: Ray knows no living node of this machine


def watch(look: Callable[[], Notice | None], drain: Callable[[Notice], None], interval: float) -> None:
    """Looks every `interval` s until there is a notice and `drain` returns. What either raises is said, once in a row,
    and tried again: neither a metadata server out of its mind nor a busy head may cost the notice.
    """
    said = ""
    while True:
        began, trouble = time.monotonic(), ""
        try:
            if notice := look():
                if not said.startswith(notice.why):
                    say(f"{notice.why}, in {notice.deadline - time.time():.0f} s")
                trouble = f"{notice.why}, but Ray has not been told"
                drain(notice)
                return
        except Exception as error:
            trouble = f"{trouble or 'no answer'}: {str(error) or type(error).__name__}"
        if trouble != said:
            say(f"{trouble}; trying on" if trouble else "all is well again")
        said = trouble
        time.sleep(max(0.0, began + interval - time.monotonic()))


def ask_ray(notice: Notice, address: str, node: str, gone: bool = False) -> None:
    """Drains this machine's nodes, in a child; `gone`: and waits until they are gone, or until the deadline.

    LookupError if Ray knows of none, RuntimeError if it cannot be asked.
    """
    words = [address, node, repr(notice.deadline), notice.why, "gone" if gone else ""]
    seconds = notice.deadline - time.time() if gone else _ATTEMPT_S
    here = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", "import sys; from cluster import preemption; preemption._child(*sys.argv[1:])"]
    try:
        done = subprocess.run(
            [*command, *words], capture_output=True, text=True, timeout=max(1, seconds), env=os.environ | here
        )
    except subprocess.TimeoutExpired as late:
        told = os.fsdecode(late.stdout or b"")
        if not told:
            raise RuntimeError("the head does not answer") from None
        say(f"{told.splitlines()[-1]}, and still at work at the deadline")
        return
    for line in done.stdout.splitlines():
        say(line)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        raise (LookupError if done.returncode == _NO_NODE else RuntimeError)(why)


def _child(address: str, node: str, deadline: str, why: str, gone: str) -> None:
    """What the child of `ask_ray` does, as Ray's hidden `ray drain-node` does it."""
    signal.alarm(int(max(float(deadline) - time.time(), _ATTEMPT_S)) + 5)  # its parent may be killed meanwhile
    from cluster.auth import use_token

    use_token()  # before Ray is imported, which reads the mode then
    from ray._private.services import canonicalize_bootstrap_address_or_die
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    try:
        head = GcsClient(address=canonicalize_bootstrap_address_or_die(address or "auto"))
        if not (nodes := _nodes_here(head, node)):
            print(f"no living Ray node {node}" if node else "no living Ray node has an address of this machine",
                  file=sys.stderr)  # fmt: skip
            sys.exit(_NO_NODE)
        for one in nodes:
            reason, at = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, int(float(deadline) * 1000)
            accepted, refusal = head.drain_node(one, reason, why, at, timeout=_ATTEMPT_S)
            if not accepted:
                sys.exit(f"the drain of node {one} is refused: {refusal}")
            print(f"node {one} is being drained", flush=True)
        while gone and _nodes_here(head, node):
            time.sleep(0.5)
    except Exception as error:  # what Ray raises has many names; the parent says it, and tries again
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _nodes_here(head, node: str) -> list[str]:
    """Ids of the living nodes of this machine, or of those the one asked for.

    A living node that is asked for by a wrong id would not be missed: Ray accepts to drain what it does not know.
    """
    alive = [info for info in head.get_all_node_info(timeout=_ATTEMPT_S).values() if info.state == 0]
    ids = {info.node_id.hex(): info.node_manager_address for info in alive}
    return [one for one, host in ids.items() if (one == node if node else _is_ours(host))]


def _is_ours(host: str) -> bool:
    """Whether `host` is an address of this machine: only such a one can be bound."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as one:
        try:
            one.bind((host, 0))
        except OSError:
            return False
    return True


def now(seconds: float, address: str, node: str) -> None:
    """Drains at once and returns when the nodes are gone, or after `seconds`: the preStop hook of a pod."""
    notice = Notice("this machine is being stopped", time.time() + seconds)

    def drain(notice: Notice) -> None:
        if time.time() < notice.deadline:
            try:
                ask_ray(notice, address, node, gone=True)
            except LookupError as error:
                say(f"{error}: there is nothing to drain")

    watch(lambda: notice, drain, 1.0)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line; exits 2 with one line if it is wrong."""
    parser = argparse.ArgumentParser(prog="python -m cluster.preemption", description=__doc__.partition("\n")[0])
    parser.add_argument("--provider", choices=["auto", "ec2", "gce"], default="auto", help="whose VM this is")
    parser.add_argument("--metadata", default=METADATA, metavar="URL", help="its metadata server (%(default)s)")
    parser.add_argument("--address", default="", metavar="GCS", help="HOST:PORT of Ray's head; else RAY_ADDRESS, else "
                        "that of the Ray running here")  # fmt: skip
    parser.add_argument("--node-id", default="", metavar="HEX", help="the node to drain; else all of this machine")
    parser.add_argument("--interval", type=float, default=1.0, metavar="S", help="between looks (%(default)s)")
    parser.add_argument("--now", action="store_true", help="drain at once, and wait until the node is gone")
    parser.add_argument("--deadline", type=float, metavar="S", help="with --now: how long at most")
    given = parser.parse_args(words)
    given.address = given.address or os.environ.get("RAY_ADDRESS", "")
    if "://" in given.address:
        parser.error(f"{given.address!r} is not the HOST:PORT of a head: give it by --address")
    if given.node_id and not re.fullmatch(r"[0-9a-f]{56}", given.node_id):
        parser.error(f"--node-id {given.node_id!r}: a node's id has 56 hex digits")
    if not 0.05 <= given.interval <= 60:
        parser.error(f"--interval {given.interval:g}: must be between 0.05 and 60")
    if given.now != (given.deadline is not None) or (given.now and not 0 < given.deadline <= 86400):
        parser.error("--now and --deadline (above 0, at most 86400) go together")
    url = urllib.parse.urlsplit(given.metadata)
    if url.scheme != "http" or not url.hostname or url.path.strip("/"):
        parser.error(f"--metadata {given.metadata!r}: must be http://HOST or http://HOST:PORT")
    return given


def main(words: list[str] | None = None) -> int:
    given = parse(words)
    for number in (signal.SIGINT, signal.SIGTERM):  # by way of SystemExit, so that the child ends as well
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    if given.now:
        now(given.deadline, given.address, given.node_id)
        return 0
    clouds = {"ec2": Ec2(given.metadata), "gce": Gce(given.metadata, given.interval)}
    cloud = clouds.get(given.provider) or find_cloud([clouds["gce"], clouds["ec2"]])
    if cloud is None:
        say(f"neither EC2 nor GCE answers at {given.metadata}: this runs on their VMs (or name one by --provider)")
        return 2
    say(f"watching {type(cloud).__name__.upper()}")
    watch(cloud.look, lambda notice: ask_ray(notice, given.address, given.node_id), given.interval)
    return 0


if __name__ == "__main__":
    sys.exit(main())
