"""Versions of models in object storage or a folder, and which of them is the champion. No server: one swap promotes.

    ROOT/NAME/versions/VERSION/    model.json, weights: written once; VERSION is a hash of what they hold
    ROOT/NAME/champion.json        who it is, since when and why; replaced whole, by compare-and-swap
    ROOT/NAME/history/000007.json  the same of each promotion and rollback, by its epoch, written once
    ROOT/NAME/pinned/VERSION       why that version is never deleted

Whoever swaps names the tag that he read, so of two at once one wins, and the other hears of it. A night that may have
been given up for dead is fenced: its successor swaps champion.json for one with another mark before it begins, and no
tag read earlier is good any more. history/N is written before champion.json leaves epoch N, so that no crash leaves a
gap in it.
"""

import contextlib
import getpass
import hashlib
import json
import os
import re
import secrets
import socket
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime

from pipeline import storage
from pipeline.storage import Conflict

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_SPEC = re.compile(r"models:(?:(?P<root>.+)/)?(?P<name>[^/@]+)(?:@(?P<version>[^/@]+))?")
CHAMPION = "champion"
_TRIES = 20


@dataclass(frozen=True)
class Champion:
    """What champion.json says. epoch: how often it has changed, 0 before the first; version: None if there is none;
    line: those that were champion before and may be rolled back to, the present one last; anchor: the last that had to
    beat another, or to pass the floors; blocked: rolled back, not to be promoted again; leaving: being deleted; mark:
    changed by whoever fences others off."""

    epoch: int = 0
    version: str | None = None
    action: str = ""
    rule: str = ""
    why: str = ""
    by: str = ""
    night: str = ""
    time: str = ""
    anchor: str | None = None
    line: tuple[str, ...] = ()
    blocked: tuple[str, ...] = ()
    leaving: tuple[str, ...] = ()
    mark: str = ""
    tag: str | None = field(default=None, compare=False)  # of what was read, for the swap

    @property
    def previous(self) -> str | None:
        return self.line[-2] if len(self.line) > 1 else None

    def entry(self) -> dict:
        """Of the history."""
        kept = ("epoch", "action", "version", "rule", "why", "by", "night", "time")
        return {name: getattr(self, name) for name in kept} | {"previous": self.previous}


def champion(root: str, name: str) -> Champion:
    """Who it is now. ValueError for a name that cannot be, or a file that is none."""
    path = _path(root, name, "champion.json")
    try:
        data, tag = storage.read_tagged(path)
    except FileNotFoundError:
        return Champion()
    try:
        stored = json.loads(data)
        return Champion(**{k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}, tag=tag)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from None


def fence(root: str, name: str, still_ours=lambda: None) -> Champion:
    """Makes every tag that was read so far useless, and returns the champion with the only good one.

    still_ours: raises if the caller may no longer write; asked between reading and writing, so that one that was
    paused in between is refused by the store, and one that was paused before by its own lease.
    """
    for _ in range(_TRIES):
        now = champion(root, name)
        still_ours()
        try:
            return _swap(root, name, now, replace(now, mark=secrets.token_hex(8)))
        except Conflict:
            continue
    raise Conflict(f"{_path(root, name, 'champion.json')} is changed all the time by others")


def promote(
    root: str, name: str, version: str, seen: Champion, *, rule: str, why: str, night: str = "", unblock: bool = False
) -> Champion:
    """Makes `version` the champion, if `seen` still is; by one compare-and-swap.

    rule: floors, superior, fresh, or hand. ValueError: no such version, blocked, or champion already. Conflict: the
    champion, or the mark, is another by now.
    """
    if version == seen.version:
        raise ValueError(f"{version} is the champion of {name} already")
    if version in seen.blocked and not unblock:
        raise ValueError(f"{version} was rolled back, and is blocked: --unblock promotes it all the same")
    if version in seen.leaving or not has(root, name, version):
        raise ValueError(f"{name} has no version {version}: `millstream models list {name}` shows those there are")
    anchor = seen.anchor if rule == "fresh" else version
    return _become(root, name, seen, "promote", version, (*(v for v in seen.line if v != version), version),
                   anchor=anchor, rule=rule, why=why, night=night,
                   blocked=tuple(v for v in seen.blocked if v != version))  # fmt: skip


def rollback(root: str, name: str, why: str, to: str | None = None) -> Champion:
    """Makes the champion before the present one champion again (or an earlier one, `to`), and blocks those after it.

    ValueError if there is none. Conflict if the champion changed meanwhile.
    """
    seen = champion(root, name)
    to = to or seen.previous
    if to is None:
        raise ValueError(f"{name} has no champion before {seen.version or 'the first'} to go back to")
    if to not in seen.line[:-1]:
        raise ValueError(
            f"{to} was not champion of {name} before {seen.version}: {', '.join(seen.line[:-1]) or 'none'}"
        )
    if not has(root, name, to):
        raise ValueError(f"version {to} of {name} is gone: choose another by --to")
    at = seen.line.index(to)
    blocked = (*(v for v in seen.blocked if v not in seen.line[at + 1 :]), *seen.line[at + 1 :])
    return _become(root, name, seen, "rollback", to, seen.line[: at + 1], anchor=to, rule="hand", why=why, night="",
                   blocked=blocked)  # fmt: skip


def _become(root: str, name: str, seen: Champion, action: str, version: str, line, **more) -> Champion:
    if seen.epoch:
        _record(root, name, seen)
    new = replace(seen, epoch=seen.epoch + 1, version=version, action=action, line=tuple(line), by=who(), time=_now(),
                  **more)  # fmt: skip
    new = _swap(root, name, seen, new)
    _record(root, name, new)
    return new


def _swap(root: str, name: str, seen: Champion, new: Champion) -> Champion:
    stored = asdict(new)
    stored.pop("tag")
    path, data = _path(root, name, "champion.json"), json.dumps(stored, indent=1).encode()
    try:
        tag = storage.replace(path, data, seen.tag) if seen.tag else storage.write_new(path, data)
    except FileExistsError:
        raise Conflict(f"{path} was changed by another process") from None
    return replace(new, tag=tag)


def _record(root: str, name: str, of: Champion) -> None:
    with contextlib.suppress(FileExistsError):  # by the one who made it champion
        storage.write_new(_path(root, name, f"history/{of.epoch:06d}.json"), json.dumps(of.entry(), indent=1).encode())


def history(root: str, name: str) -> list[dict]:
    """Promotions and rollbacks, the newest first: {epoch, action, version, previous, rule, why, by, night, time}."""
    folder, now = _path(root, name, "history"), champion(root, name)
    entries = {}
    for file in _files(folder):
        entry = json.loads(storage.read(storage.join(folder, file)))
        entries[entry["epoch"]] = entry
    if now.epoch:
        entries.setdefault(now.epoch, now.entry())
    return [entries[epoch] for epoch in sorted(entries, reverse=True)]


# ---- versions


def publish(root: str, name: str, files: dict[str, bytes], model: dict, about: dict) -> str:
    """Stores a version and returns its name. The same files and `model` are the same version, whoever stores them.

    model: what builds it (architecture, classes, preprocessing), plain JSON; about: metrics and where it comes from.
    """
    listed = {file: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for file, data in files.items()}
    version = _hash(listed, model)
    folder = version_path(root, name, version)
    if not has(root, name, version):
        for file, data in files.items():
            storage.write(storage.join(folder, file), data)
        info = {"version": version, "model": model, "files": listed, **about, "created": _now()}
        with contextlib.suppress(FileExistsError):  # another stored the same
            storage.write_new(storage.join(folder, "model.json"), json.dumps(info, indent=1).encode())
    return version


def _hash(files: dict, model: dict) -> str:
    return hashlib.sha256(json.dumps([files, model], sort_keys=True).encode()).hexdigest()[:12]


def has(root: str, name: str, version: str) -> bool:
    return bool(_NAME.fullmatch(version)) and storage.exists(
        storage.join(version_path(root, name, version), "model.json")
    )


def describe(path: str) -> dict:
    """model.json of the version at `path`. ValueError if there is none, or it is not what its name says."""
    file = storage.join(path, "model.json")
    try:
        info = json.loads(storage.read(file))
    except FileNotFoundError:
        raise ValueError(f"{path} is no published model (it has no model.json)") from None
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error})") from None
    if not isinstance(info, dict) or info.get("version") != _hash(info.get("files", {}), info.get("model", {})):
        raise ValueError(f"{file} was changed after it was published: its content is not that of its version")
    return info


def read_file(path: str, info: dict, name: str) -> bytes:
    """A file of the version at `path`, held against its size and SHA-256. ValueError if it differs, or is missing."""
    file, wanted = storage.join(path, name), info["files"].get(name)
    try:
        data = storage.read(file) if wanted else None
    except FileNotFoundError:
        data = None
    if data is None:
        raise ValueError(f"{file} is missing")
    if len(data) != wanted["size"] or hashlib.sha256(data).hexdigest() != wanted["sha256"]:
        raise ValueError(f"{file} is damaged: it is not what was published")
    return data


def versions(root: str, name: str) -> list[dict]:
    """model.json of every version, the newest first."""
    folder = _path(root, name, "versions")
    names = {file.partition("/")[0] for file in _files(folder) if file.endswith("/model.json")}
    found = [describe(storage.join(folder, each)) for each in names]
    return sorted(found, key=lambda info: (info["created"], info["version"]), reverse=True)


def names(root: str) -> list[str]:
    """The models there are."""
    parts = (file.split("/") for file in _files(root))
    return sorted({part[0] for part in parts if part[1:2] in (["versions"], ["champion.json"])})


def version_path(root: str, name: str, version: str) -> str:
    return _path(root, name, f"versions/{version}")


def pin(root: str, name: str, version: str, why: str) -> None:
    """Keeps a version, whatever comes after it. ValueError if there is none of that name."""
    if not has(root, name, version):
        raise ValueError(f"{name} has no version {version}")
    storage.write(_path(root, name, f"pinned/{version}"), why.encode())


def unpin(root: str, name: str, version: str) -> None:
    storage.delete(_path(root, name, f"pinned/{version}"))


def pinned(root: str, name: str) -> dict[str, str]:
    """{version: why}."""
    folder = _path(root, name, "pinned")
    return {each: storage.read(storage.join(folder, each)).decode() for each in _files(folder)}


def collect(root: str, name: str, keep: int) -> list[str]:
    """Deletes the versions that were champion, or that a night made, and are older than the champion; neither its
    anchor, nor one of the `keep` champions before it, nor what is pinned. Returns them.

    They are named in champion.json first: a promotion or rollback to one of them that began before is refused by the
    swap, and one that begins after sees it.
    """
    seen, everything = champion(root, name), versions(root, name)
    if seen.version is None:
        return []
    line = seen.line[-1 - keep :]
    kept = {*line, seen.version, seen.anchor, *pinned(root, name)}
    since = next((info["created"] for info in everything if info["version"] == seen.version), "")
    doomed = tuple(
        info["version"]
        for info in everything
        if info["version"] not in kept
        and info["created"] < since
        and (info["version"] in seen.line or info.get("lineage", {}).get("night"))  # not what waits for its promotion
    )
    if not doomed and not seen.leaving:
        return []
    try:
        _swap(root, name, seen, replace(seen, line=line, leaving=doomed))
    except Conflict:
        return []  # somebody is at work here: the next night does it
    for version in doomed:
        folder = version_path(root, name, version)
        storage.delete(storage.join(folder, "model.json"))
        storage.delete_tree(folder)
    return list(doomed)


# ---- names


def is_spec(text: str) -> bool:
    """Whether this names a model of a registry, as models:NAME@champion does."""
    return text.startswith("models:")


def parse(spec: str) -> tuple[str, str, str]:
    """(root, name, version or champion) of models:[ROOT/]NAME[@VERSION]; root by MILLSTREAM_MODELS if not said.

    ValueError for what is none, or without a root.
    """
    match = _SPEC.fullmatch(spec)
    if not match or not _NAME.fullmatch(match["name"]):
        raise ValueError(f"{spec!r}: write models:NAME@champion, models:NAME@VERSION or models:s3://bucket/models/NAME")
    root = match["root"] or os.environ.get("MILLSTREAM_MODELS", "")
    if not root:
        raise ValueError(f"{spec}: say where the models are, by MILLSTREAM_MODELS or as models:s3://bucket/models/NAME")
    root = root.rstrip("/") if storage.is_remote(root) else os.path.abspath(os.path.expanduser(root))
    return root, match["name"], match["version"] or CHAMPION


def resolve(spec: str) -> str:
    """The path of the version that `spec` names now. ValueError if there is none."""
    root, name, version = parse(spec)
    if version == CHAMPION:
        version = champion(root, name).version
        if version is None:
            there = f"there are {', '.join(names(root))}" if name not in names(root) and names(root) else "promote one"
            raise ValueError(f"{name} has no champion in {root}: {there}")
    if not has(root, name, version):
        raise ValueError(f"{name} has no version {version} in {root}")
    return version_path(root, name, version)


def _path(root: str, name: str, rest: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name for a model: letters, digits, dots, dashes and underscores")
    return storage.join(root, name, rest)


def _files(folder: str) -> list[str]:
    try:
        return [file.path for file in storage.list_files(folder)]
    except FileNotFoundError:
        return []


def who() -> str:
    """Who runs this, for the history."""
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (KeyError, OSError):  # a user without a name, as in a container
        return f"{os.getuid()}@{socket.gethostname()}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
