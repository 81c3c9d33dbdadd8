"""Ends what a Ray session left behind: `python reap.py FOLDER` waits for stdin to close, then cleans up.

Run by `cluster.session` in a session of its own, so that it outlives a SIGKILL of the verb and of its process group.
Imports only the standard library: it starts in the time of a bare interpreter and stays small.
"""

import contextlib
import os
import shutil
import signal
import sys
import time


def of_session(folder: str, spared: set[int]) -> list[int]:
    """Processes that hold a file below `folder` open; every process of a Ray session has its log there."""
    found = []
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        with contextlib.suppress(OSError):
            if name.isdigit() and int(name) not in spared:
                files = (os.readlink(f"/proc/{name}/fd/{fd}") for fd in os.listdir(f"/proc/{name}/fd"))
                if any(file.startswith(folder + "/") for file in files):
                    found.append(int(name))
    return found


def main(folder: str) -> None:
    for ours in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ours, signal.SIG_IGN)  # we end when the pipe closes
    spared = {os.getpid(), os.getppid()}  # the verb may have a log of its session open, and lives on
    sys.stdin.buffer.read()
    deadline = time.monotonic() + 10
    while (left := of_session(folder, spared)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1])
