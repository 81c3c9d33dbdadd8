"""Who is champion: one file, replaced whole by compare-and-swap, and the history of who it was."""

import contextlib
import json
import secrets
from dataclasses import asdict, dataclass, field, replace

from pipeline import storage
from pipeline.registry.places import listing, place, timestamp, who
from pipeline.registry.versions import has, pinned, version_path, versions
from pipeline.storage import Conflict

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
    path = place(root, name, "champion.json")
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
    raise Conflict(f"{place(root, name, 'champion.json')} is changed all the time by others")


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
        now = f"before {seen.version} to go back to" if seen.version else f"in {root}"
        raise ValueError(f"{name} has no champion {now}")
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
    stamp = {"by": who(), "time": timestamp()}
    new = replace(seen, epoch=seen.epoch + 1, version=version, action=action, line=tuple(line), **stamp, **more)
    new = _swap(root, name, seen, new)
    _record(root, name, new)
    return new


def _swap(root: str, name: str, seen: Champion, new: Champion) -> Champion:
    stored = asdict(new)
    stored.pop("tag")
    path, data = place(root, name, "champion.json"), json.dumps(stored, indent=1).encode()
    try:
        tag = storage.replace(path, data, seen.tag) if seen.tag else storage.write_new(path, data)
    except FileExistsError:
        raise Conflict(f"{path} was changed by another process") from None
    return replace(new, tag=tag)


def _record(root: str, name: str, of: Champion) -> None:
    with contextlib.suppress(FileExistsError):  # by the one who made it champion
        storage.write_new(place(root, name, f"history/{of.epoch:06d}.json"), json.dumps(of.entry(), indent=1).encode())


def history(root: str, name: str) -> list[dict]:
    """Promotions and rollbacks, the newest first: {epoch, action, version, previous, rule, why, by, night, time}."""
    folder, now = place(root, name, "history"), champion(root, name)
    entries = {}
    for file in listing(folder):
        entry = json.loads(storage.read(storage.join(folder, file)))
        entries[entry["epoch"]] = entry
    if now.epoch:
        entries.setdefault(now.epoch, now.entry())
    return [entries[epoch] for epoch in sorted(entries, reverse=True)]


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
