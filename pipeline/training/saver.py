"""Writes the checkpoints of one attempt beside training: copied to host memory, uploaded, committed, then pruned.

One is in flight. What went wrong with it surfaces at the next call; a store that does not answer is asked again, beside
training, until patience ends. `checkpoint` has the format, and what makes a checkpoint whole.
"""

import hashlib
import io
import json
import random
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from pipeline import storage
from pipeline.training import checkpoint
from pipeline.training.checkpoint import Manifest

PATIENCE_S = 600.0  # for a store that does not answer, or a disk that is full
_LONGEST_S = 30.0  # between attempts
# Asking again does not mend these.
_HOPELESS = (PermissionError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)


class HostMemory:
    """Copies trees of tensors into host memory that the next copy uses again; page-locked where a GPU fills it."""

    def __init__(self):
        self._kept: list[torch.Tensor] = []

    def copy(self, state):
        """The tree with every tensor copied, those on the CPU too: training goes on while the copy is written. Valid
        until the next call. A view of a larger tensor becomes one of its own size."""
        free, used = iter(self._kept), []
        tree = self._copied(state, free, used)
        self._kept = used
        if any(tensor.is_pinned() for tensor in used):
            torch.cuda.synchronize()
        return tree

    def _copied(self, state, free, used: list[torch.Tensor]):
        if isinstance(state, torch.Tensor):
            source, host = state.detach(), next(free, None)
            fresh = torch.empty_like(source, device="meta")  # as dense as it gets, in its own memory format
            if host is None or (host.shape, host.stride(), host.dtype) != (fresh.shape, fresh.stride(), fresh.dtype):
                host = torch.empty_like(source, device="cpu", pin_memory=source.is_cuda)
            used.append(host)
            return host.copy_(source, non_blocking=True)
        if isinstance(state, dict):
            return {key: self._copied(value, free, used) for key, value in state.items()}
        if isinstance(state, list | tuple):
            return type(state)(self._copied(value, free, used) for value in state)
        return state


class Saver:
    """The writer of `attempt`, which goes on from `resumed_from`. `keep` newest checkpoints stay, besides the best, the
    pinned, the one resumed from, and those of `stays(samples)`. `on_commit(name, rows)` is given each metric segment
    once its checkpoint stands, and what it raises is a warning. `about`: what each manifest says it comes from.
    """

    def __init__(
        self,
        run: str,
        attempt: int,
        resumed_from: Manifest | None,
        keep: int = 2,
        on_commit: Callable[[str, list[dict]], None] | None = None,
        about: dict | None = None,
        patience: float = PATIENCE_S,
        stays: Callable[[int], bool] = lambda samples: False,
    ):
        self.run, self.attempt, self.resumed_from, self.keep = run, attempt, resumed_from, keep
        self.on_commit, self.about, self.patience = on_commit, about or {}, patience
        self.stays = stays
        self.committed = 0
        self._segments = list(resumed_from.segments) if resumed_from else []
        self._metrics = checkpoint.read_segments(run, self._segments)
        self._newest = resumed_from.name if resumed_from else None
        self._host, self._over = HostMemory(), threading.Event()
        self._pool, self._flying = ThreadPoolExecutor(1, "saver"), None

    def save(self, state: dict, samples: int, rows: list[dict], validation: dict) -> None:
        """Copies the state and starts writing; waits for the write before it, and raises what went wrong there."""
        self.wait()
        copy = self._host.copy(state)
        self._flying: Future | None = self._pool.submit(self._write, copy, samples, rows, validation)

    def writing(self) -> bool:
        """Whether a checkpoint is on its way."""
        return self._flying is not None and not self._flying.done()

    def wait(self) -> None:
        """Returns when nothing is in flight; raises what a write raised."""
        flying, self._flying = self._flying, None
        if flying:
            flying.result()

    def newest(self) -> str | None:
        """Name of the newest checkpoint that stands, once what is in flight is written or has failed."""
        if self._flying:
            self._flying.exception()
        return self._newest

    def close(self) -> None:
        """Ends the writer; one that waits for its store gives up."""
        self._over.set()
        self._pool.shutdown(wait=True)

    def _write(self, state: dict, samples: int, rows: list[dict], validation: dict) -> None:
        checkpoint.check_newest(self.run, self.attempt)
        name, buffer = checkpoint.name_of(samples, self.attempt), io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getbuffer()
        files = {"state.pt": {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
        manifest = Manifest(name, samples, files, validation, [*self._segments, name], self.about)
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        self._patiently(name, lambda: self._commit(manifest, data, lines))
        self._segments, self._newest = manifest.segments, name
        self._metrics += lines
        self.committed += 1
        try:
            storage.write(storage.join(self.run, "metrics.jsonl"), self._metrics)
            checkpoint.prune(self.run, self.attempt, self.keep, manifest, self.resumed_from, self.stays)
        except OSError as error:  # the next one writes and deletes what this one could not
            warnings.warn(f"checkpoint {name} stands, but clearing up after it failed: {error}", stacklevel=2)
        if self.on_commit:
            try:
                self.on_commit(name, rows)
            except Exception as error:
                warnings.warn(f"the steps up to checkpoint {name} could not be tracked: {error}", stacklevel=2)

    def _commit(self, manifest: Manifest, data: memoryview, lines: bytes) -> None:
        folder = storage.join(self.run, "checkpoints", manifest.name)
        storage.write(storage.join(folder, "state.pt"), data)
        storage.write(storage.join(self.run, "metrics", f"{manifest.name}.jsonl"), lines)
        checkpoint.check_newest(self.run, self.attempt)  # a successor may have begun while the state went up
        storage.write(storage.join(folder, "manifest.json"), manifest.text())

    def _patiently(self, name: str, commit: Callable[[], None]) -> None:
        """Does it again while the store fails, until `patience` or the saver ends; everything in it may be repeated."""
        began, failed = time.monotonic(), 0
        while True:
            try:
                commit()
                if failed:
                    warnings.warn(f"checkpoint {name} is stored, at attempt {failed + 1}", stacklevel=2)
                return
            except _HOPELESS:
                raise
            except OSError as error:
                waited, failed = time.monotonic() - began, failed + 1
                if waited >= self.patience or self._over.is_set():
                    raise
                if failed == 1:
                    warnings.warn(f"checkpoint {name} cannot be stored yet, trying on: {error}", stacklevel=2)
                self._over.wait(
                    min(0.5 * 2**failed, _LONGEST_S, max(self.patience - waited, 0.01)) * random.uniform(0.5, 1)
                )
