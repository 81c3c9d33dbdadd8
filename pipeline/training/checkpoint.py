"""Checkpoints: whole or invisible, and one truth about which of them a run goes on from.

    RUN/attempts/000002.json                     claim of the second start: {"from": checkpoint name or null}
    RUN/checkpoints/000000512000-0002/           samples seen, number of the attempt that wrote it
        state.pt  manifest.json                  manifest last: sizes, SHA-256, validation, metric segments, and
                                                 a digest of itself
    RUN/metrics/000000512000-0002.jsonl          steps since the checkpoint before; immutable, named in the manifest
    RUN/pinned/000000512000-0002                 why that checkpoint is never deleted

Every start of a run is an attempt, claimed by a create-only write that names the checkpoint it goes on from. Readers
follow that chain alone, so what an orphaned writer stores after its successor's claim is never read, and a writer that
finds a newer claim stops. Only the newest attempt deletes: never what it resumed from, the best, a snapshot of
`posthoc`, nor what is pinned.
"""

import errno
import hashlib
import io
import json
import re
import time
import warnings
from collections.abc import Callable
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
    """What a committed checkpoint says of itself. `files`: {name: {size, sha256}}; `segments`: metric files so far;
    `about`: the run's configuration, the generations of its dataset and the version of the code."""

    name: str
    samples: int
    files: dict
    validation: dict
    segments: list[str]
    about: dict = field(default_factory=dict)  # none in those of an older millstream

    @property
    def attempt(self) -> int:
        return int(self.name.partition("-")[2])

    def text(self) -> bytes:
        """As it is stored, with a digest of itself."""
        return json.dumps(self.__dict__ | {"digest": digest(self.__dict__)}, indent=1).encode()


def name_of(samples: int, attempt: int) -> str:
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
    return [manifest for samples, a in chain if (manifest := _read_manifest(run, name_of(samples, a)))]


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
    """The newest checkpoint of the lineage that verifies, and its state; a damaged one is skipped with a warning.

    A store that does not answer is asked again for a minute, then StorageError is raised: no reason to lose work.
    """
    for manifest in lineage(run):
        try:
            return manifest, _read_patiently(run, manifest)
        except ValueError as error:
            warnings.warn(f"{error}; going back to the checkpoint before", stacklevel=2)
    return None


def _read_patiently(run: str, manifest: Manifest) -> dict:
    for wait in (1, 4, 15, 40):
        try:
            return read_state(run, manifest)
        except storage.StorageError as error:
            warnings.warn(f"checkpoint {manifest.name} cannot be read yet, trying on: {error}", stacklevel=3)
            time.sleep(wait)
    return read_state(run, manifest)


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
    return [json.loads(line) for line in read_segments(run, chain[0].segments if chain else []).splitlines()]


def read_segment(run: str, name: str) -> list[dict]:
    """The rows of one metric segment. FileNotFoundError if it is lost."""
    return [json.loads(line) for line in _segment(run, name).splitlines()]


def _segment(run: str, name: str) -> bytes:
    return storage.read(storage.join(run, "metrics", f"{name}.jsonl"))


def read_segments(run: str, names: list[str]) -> bytes:
    """Metric segments joined. A lost one is a gap in a curve and a warning: no reason not to go on training."""
    lines = b""
    for name in names:
        try:
            lines += _segment(run, name)
        except FileNotFoundError as error:
            warnings.warn(f"metrics up to checkpoint {name} are lost ({error})", stacklevel=3)
    return lines


def pin(run: str, name: str, why: str) -> None:
    """Keeps a checkpoint whatever comes after it. ValueError if there is none of that name."""
    known = _NAME.fullmatch(name)
    if known:
        storage.write(storage.join(run, "pinned", name), why.encode())  # first: who deletes looks for pins just before
    if not (known and storage.exists(storage.join(run, "checkpoints", name, "manifest.json"))):
        if known:
            unpin(run, name)
        there = ", ".join(name_of(*at) for at, whole in sorted(_stored(run).items()) if whole)
        raise ValueError(f"{run} has no checkpoint {name}: it has {there or 'none'}")


def unpin(run: str, name: str) -> None:
    """Lets a checkpoint go with the others. No error if it was not pinned."""
    storage.delete(storage.join(run, "pinned", name))


def pinned(run: str) -> set[str]:
    """Names of the checkpoints that are kept."""
    try:
        return {file.path for file in storage.list_files(storage.join(run, "pinned"))}
    except FileNotFoundError:
        return set()


def check_newest(run: str, attempt: int) -> None:
    """Raises Superseded if a later attempt has begun."""
    if storage.exists(storage.join(run, "attempts", f"{attempt + 1:06d}.json")):
        raise Superseded(f"{run} was started again elsewhere (attempt {attempt + 1}): this one stops")


def prune(
    run: str,
    attempt: int,
    keep: int,
    new: Manifest,
    resumed_from: Manifest | None,
    stays: Callable[[int], bool] = lambda samples: False,
) -> None:
    """Deletes what the newest attempt no longer needs, now that `new` stands, and is seen to stand. stays(samples):
    whether a checkpoint there is kept."""
    for name, entry in new.files.items():
        sizes = [f.size for f in storage.list_files(storage.join(run, "checkpoints", new.name)) if f.path == name]
        if sizes != [entry["size"]]:
            what = f"{name} of checkpoint {new.name} is not there as written, so no older one is deleted"
            raise storage.StorageError(errno.EIO, what, run)
    # Listed first, and never what a later attempt wrote: a successor that starts meanwhile loses nothing to us.
    stored = [at for at in _stored(run) if at[1] <= attempt]
    chain = lineage(run)
    kept = {m.name for m in [*chain[:keep], best(run, chain), resumed_from] if m}
    kept |= {m.name for m in chain if stays(m.samples)}
    check_newest(run, attempt)
    going = {name_of(*at) for at in stored} - kept
    for name in sorted(going - pinned(run) if going else ()):
        folder = storage.join(run, "checkpoints", name)
        storage.delete(storage.join(folder, "manifest.json"))  # first: a half-deleted one must not look whole
        storage.delete_tree(folder)
    storage.sweep_partial(run)  # again: an orphan that was writing when we started may be dead by now
