"""Checkpoints: whole or invisible, and one truth about which of them a run goes on from.

    RUN/attempts/000002.json                     claim of the second start: {"from": checkpoint name or null}
    RUN/checkpoints/000000512000-0002/           samples seen, number of the attempt that wrote it
        state.pt  manifest.json                  manifest last: sizes, SHA-256, validation, metric segments, and
                                                 a digest of itself
    RUN/metrics/000000512000-0002.jsonl          steps since the checkpoint before; immutable, named in the manifest

Every start of a run is an attempt, claimed by a create-only write that names the checkpoint it goes on from. Readers
follow that chain alone, so what an orphaned writer stores after its successor's claim is never read, and a writer that
finds a newer claim stops. Only the newest attempt deletes, never the checkpoint it resumed from nor the best.
"""

import hashlib
import io
import json
import re
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from pipeline import storage
from pipeline.shards.index import digest

_NAME = re.compile(r"(\d{12})-(\d{4,6})")
_CLAIM = re.compile(r"(\d{6})\.json")


class Superseded(RuntimeError):
    """A newer start of the same run has taken over; this one must stop writing."""


@dataclass(frozen=True)
class Manifest:
    """What a committed checkpoint says of itself. `files`: {name: {size, sha256}}; `segments`: metric files so far."""

    name: str
    samples: int
    files: dict
    validation: dict
    segments: list[str]

    @property
    def attempt(self) -> int:
        return int(self.name.partition("-")[2])


def _name(samples: int, attempt: int) -> str:
    return f"{samples:012d}-{attempt:04d}"


def _claims(run: str) -> dict[int, str | None]:
    """{attempt: name of the checkpoint it went on from}, of all attempts."""
    folder = storage.join(run, "attempts")
    try:
        files = storage.list_files(folder)
    except FileNotFoundError:
        return {}
    claims = [(int(match[1]), f.path) for f in files if (match := _CLAIM.fullmatch(f.path))]
    return {number: json.loads(storage.read(storage.join(folder, path)))["from"] for number, path in claims}


def _stored(run: str) -> dict[tuple[int, int], bool]:
    """{(samples, attempt): whether it has a manifest} of every checkpoint of which there is a file."""
    try:
        files = storage.list_files(storage.join(run, "checkpoints"))
    except FileNotFoundError:
        return {}
    whole: dict[tuple[int, int], bool] = {}
    for folder, _, name in (file.path.partition("/") for file in files):
        if match := _NAME.fullmatch(folder):
            at = int(match[1]), int(match[2])
            whole[at] = whole.get(at, False) or name == "manifest.json"
    return whole


def lineage(run: str) -> list[Manifest]:
    """The checkpoints the newest attempt may go on from, newest first. Their files are not verified yet."""
    claims, committed = _claims(run), [at for at, whole in _stored(run).items() if whole]
    chain, attempt, limit = [], max(claims, default=None), None
    while attempt is not None:
        chain += sorted(((s, a) for s, a in committed if a == attempt and (limit is None or s <= limit)), reverse=True)
        came_from = _NAME.fullmatch(claims.get(attempt) or "")
        limit, attempt = (int(came_from[1]), int(came_from[2])) if came_from else (None, None)
    return [manifest for samples, a in chain if (manifest := _read_manifest(run, _name(samples, a)))]


def _read_manifest(run: str, name: str) -> Manifest | None:
    path = storage.join(run, "checkpoints", name, "manifest.json")
    try:
        content = json.loads(storage.read(path))
        if not isinstance(content, dict) or content.pop("digest", None) not in (None, digest(content)):
            raise ValueError("damaged")
        if (content["name"], content["samples"]) != (name, int(name[:12])):
            raise ValueError(f"it is that of {content['name']}")
        return Manifest(**content)
    except (ValueError, TypeError, KeyError, FileNotFoundError) as error:
        warnings.warn(f"checkpoint {name} is skipped: its manifest cannot be read ({error})", stacklevel=2)
        return None


def read_state(run: str, manifest: Manifest) -> dict:
    """A checkpoint's state, every file checked against its size and SHA-256. Raises ValueError if one differs."""
    folder, contents = storage.join(run, "checkpoints", manifest.name), {}
    for name, entry in manifest.files.items():
        try:
            data = storage.read(storage.join(folder, name))
        except FileNotFoundError:
            raise ValueError(f"checkpoint {manifest.name}: {name} is missing") from None
        if len(data) != entry["size"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise ValueError(f"checkpoint {manifest.name}: {name} is not what its manifest says (damaged or truncated)")
        contents[name] = data
    return torch.load(io.BytesIO(contents["state.pt"]), map_location="cpu", weights_only=True)


def newest(run: str) -> tuple[Manifest, dict] | None:
    """The newest checkpoint of the lineage that verifies, and its state; a damaged one is skipped with a warning."""
    for manifest in lineage(run):
        try:
            return manifest, read_state(run, manifest)
        except ValueError as error:
            warnings.warn(f"{error}; going back to the checkpoint before", stacklevel=2)
    return None


def best(run: str, chain: list[Manifest] | None = None) -> Manifest | None:
    """The checkpoint with the highest validation accuracy; without validation the newest; None if there is none."""
    chain = lineage(run) if chain is None else chain
    scored = [m for m in chain if "accuracy" in m.validation]
    if scored:
        return max(scored, key=lambda m: (m.validation["accuracy"], m.samples))
    return chain[0] if chain else None


def claim(run: str) -> tuple[int, Manifest | None]:
    """Starts the next attempt: its number, and the verified checkpoint it goes on from (None: from scratch).

    Clears away what killed writers left in flight.
    """
    storage.sweep_partial(run)
    while True:
        found = newest(run)
        number = max(_claims(run), default=0) + 1
        content = json.dumps({"from": found[0].name if found else None}).encode()
        try:
            storage.write_new(storage.join(run, "attempts", f"{number:06d}.json"), content)
        except FileExistsError:
            continue  # somebody else took this number: look again at what is newest
        return number, found[0] if found else None


def read_metrics(run: str) -> list[dict]:
    """Every logged row of the run's lineage, each step once, in order."""
    chain = lineage(run)
    return [json.loads(line) for line in _read_segments(run, chain[0].segments if chain else []).splitlines()]


def _read_segments(run: str, names: list[str]) -> bytes:
    """Metric segments joined. A lost one is a gap in a curve and a warning: no reason not to go on training."""
    lines = b""
    for name in names:
        try:
            lines += storage.read(storage.join(run, "metrics", f"{name}.jsonl"))
        except FileNotFoundError as error:
            warnings.warn(f"metrics up to checkpoint {name} are lost ({error})", stacklevel=3)
    return lines


def snapshot(state):
    """A copy of a tree of tensors on the host, so that training may go on while it is written."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: snapshot(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(snapshot(value) for value in state)
    return state


@dataclass
class Saver:
    """Writes the checkpoints of one attempt beside training, one in flight; an error surfaces at the next call.

    `keep` newest ones stay, besides the best and the one resumed from. `on_segment(name, rows)` is given the metric
    rows of each checkpoint just before it is committed.
    """

    run: str
    attempt: int
    resumed_from: Manifest | None
    keep: int = 2
    on_segment: Callable[[str, list[dict]], None] | None = None
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    _flying: Future | None = None

    def __post_init__(self):
        self._segments = list(self.resumed_from.segments) if self.resumed_from else []
        self._metrics = _read_segments(self.run, self._segments)

    def save(self, state: dict, samples: int, rows: list[dict], validation: dict) -> None:
        """Copies the state and starts writing; waits for the write before it, and raises what went wrong there."""
        self.wait()
        copy = snapshot(state)
        self._flying = self._pool.submit(self._write, copy, samples, rows, validation)

    def wait(self) -> None:
        """Returns when nothing is in flight; raises what a write raised."""
        flying, self._flying = self._flying, None
        if flying:
            flying.result()

    def close(self) -> None:
        self._pool.shutdown(wait=True)

    def _write(self, state: dict, samples: int, rows: list[dict], validation: dict) -> None:
        self._check_newest()
        name, buffer = _name(samples, self.attempt), io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getvalue()
        folder = storage.join(self.run, "checkpoints", name)
        storage.write(storage.join(folder, "state.pt"), data)
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        storage.write(storage.join(self.run, "metrics", f"{name}.jsonl"), lines)
        self._segments.append(name)
        files = {"state.pt": {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
        content = Manifest(name, samples, files, validation, list(self._segments)).__dict__
        if self.on_segment:
            self.on_segment(name, rows)
        self._check_newest()
        manifest = json.dumps(content | {"digest": digest(content)}, indent=1).encode()
        storage.write(storage.join(folder, "manifest.json"), manifest)
        self._metrics += lines
        storage.write(storage.join(self.run, "metrics.jsonl"), self._metrics)
        self._prune()

    def _check_newest(self) -> None:
        if storage.exists(storage.join(self.run, "attempts", f"{self.attempt + 1:06d}.json")):
            raise Superseded(f"{self.run} was started again elsewhere (attempt {self.attempt + 1}): this one stops")

    def _prune(self) -> None:
        # Listed first, and never what a later attempt wrote: a successor that starts meanwhile loses nothing to us.
        stored = [at for at in _stored(self.run) if at[1] <= self.attempt]
        chain = lineage(self.run)
        kept = {m.name for m in [*chain[: self.keep], best(self.run, chain), self.resumed_from] if m}
        self._check_newest()
        for name in (_name(*at) for at in stored):
            if name not in kept:
                folder = storage.join(self.run, "checkpoints", name)
                storage.delete(storage.join(folder, "manifest.json"))  # first: a half-deleted one must not look whole
                storage.delete_tree(folder)
        storage.sweep_partial(self.run)  # again: an orphan that was writing when we started may be dead by now
