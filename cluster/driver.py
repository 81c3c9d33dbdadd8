"""What a job runs: `python -m cluster.driver [--store STORE --job JOB] [--unpinned] -- VERB ARGS`.

Runs the verb in this process once the packages are those it was submitted with and the attempt before it is gone, and
says in the store that it lives, and how it ended. A newer attempt ends this one: the head that started it may be dead,
and nobody else would. What a driver that was paused writes after that is for the run's own lease and lineage to fence.
"""

import argparse
import contextlib
import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path

from cluster import auth, book, pack

SUPERSEDED = 124
_LEAVING_S = 60.0  # for a checkpoint, once a newer attempt is seen
_GONE_S = 300.0  # how long the attempt before may take to leave
_LOG_EVERY_S = 60.0
_LOG_BYTES = 1 << 20


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="cluster.driver")
    parser.add_argument("--store")
    parser.add_argument("--job")
    parser.add_argument("--unpinned", action="store_true")
    parser.add_argument("words", nargs="+")
    args = parser.parse_args(argv)
    if not args.unpinned and (wrong := pack.unmet(Path(pack.PINS).read_text())):
        print(f"error: this node is not what the job was made for: {'; '.join(wrong)}. Build the image with the same "
              "constraints.txt, or submit with --unpinned", file=sys.stderr)  # fmt: skip
        return 2
    auth.use_token()
    if not args.store:
        return _run(args.words)
    attempt = book.parse(args.job)
    book.beat(args.store, attempt)
    watch = _Watch(args.store, attempt)
    with watch:
        if code := _wait_for_the_one_before(args.store, attempt):
            return watch.end(code)
        return watch.end(_run(args.words))


def _run(words: list[str]) -> int:
    sys.argv = ["millstream", *words]
    try:
        runpy.run_module("jobs", run_name="__main__", alter_sys=False)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        return 130
    return 0


def _wait_for_the_one_before(store: str, attempt: book.Attempt) -> int:
    """0 once no driver of an older attempt shows itself, else an exit code."""
    before, end = book.Attempt(attempt.run, attempt.number - 1), time.monotonic() + _GONE_S
    while before.number and book.alive(store, before):
        if time.monotonic() > end:
            print(f"failed: {before.job} still runs, though it was told to leave {_GONE_S:.0f} s ago", file=sys.stderr)
            return 1
    return SUPERSEDED if book.newest(store, attempt.run) > attempt.number else 0


class _Watch:
    """A thread that beats, keeps the log, and ends this process when a newer attempt has been claimed."""

    def __init__(self, store: str, attempt: book.Attempt):
        self.store, self.attempt, self.over, self.superseded = store, attempt, threading.Event(), False
        self.thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def __enter__(self) -> "_Watch":
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.over.set()
        self.thread.join(30)

    def end(self, code: int) -> int:
        """Says in the store how the verb ended; returns the exit code of this process."""
        self.over.set()
        self.thread.join(30)
        code = SUPERSEDED if self.superseded else code
        for _ in range(3):
            with contextlib.suppress(OSError):
                self._keep_log()
                book.beat(self.store, self.attempt, code)
                break
        return code

    def _watch(self) -> None:
        kept = time.monotonic()
        while not self.over.wait(book.BEAT_S):
            with contextlib.suppress(OSError):  # the store is away; the verb has its own patience
                if book.newest(self.store, self.attempt.run) > self.attempt.number:
                    self.superseded = True
                    print(f"{self.attempt.job} has a successor, and ends", file=sys.stderr, flush=True)
                    os.kill(os.getpid(), signal.SIGTERM)
                    if not self.over.wait(_LEAVING_S):
                        book.beat(self.store, self.attempt, SUPERSEDED)
                        os._exit(SUPERSEDED)
                    return
                book.beat(self.store, self.attempt)
                if time.monotonic() - kept > _LOG_EVERY_S:
                    kept = time.monotonic()
                    self._keep_log()

    def _keep_log(self) -> None:
        """Ray has us write into a file on this node, which goes with it."""
        path = f"/proc/{os.getpid()}/fd/1"
        if os.path.isfile(path):
            with open(path, "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_BYTES))
                book.keep_log(self.store, self.attempt, file.read())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
