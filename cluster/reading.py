"""Reads YAML of which nothing is known yet: its size, its depth and what its aliases repeat have their limits."""

from dataclasses import dataclass, field
from pathlib import Path

import yaml

_MOST = 1 << 20  # characters and nodes, each alias counted as what it stands for: a few lines of them make gigabytes
_DEEPEST = 60  # what walks a document is recursive; libyaml itself ends the process at some 100,000
# What PyYAML's constructors trip over, as a month 13 or `!!bool x`.
_MISTAKES = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError)


def documents(path: str) -> list[dict]:
    """The documents of a file that describes clusters; those of a Kubernetes List one by one.

    Raises FileNotFoundError, IsADirectoryError, or ValueError for a file that describes none.
    """
    with Path(path).open("rb") as file:
        data = file.read(_MOST + 1)  # no more: it may be endless, as /dev/zero
    if len(data) > _MOST:
        raise ValueError(f"{path}: above {_MOST >> 20} MB, too large for a cluster file")
    try:
        found = [document for document in parse(data.decode()) if document is not None]
    except UnicodeDecodeError:
        raise ValueError(f"{path}: no text") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not found:
        raise ValueError(f"{path}: empty")
    found = [one for document in found for one in _listed(document)]
    for document in found:
        keys = document.keys() if isinstance(document, dict) else set()
        if not ({"cluster_name", "provider"} & keys or {"apiVersion", "kind"} <= keys):
            raise ValueError(
                f"{path}: neither a `ray up` file (cluster_name, provider) nor Kubernetes' (apiVersion, kind)"
            )
    return found


def parse(text: str) -> list:
    """The documents of a YAML text. ValueError if it is none, gives a key twice, is too deep or repeats too much."""
    try:
        _measure(text)
        return list(yaml.load_all(text, yaml.CSafeLoader))
    except _MISTAKES as error:
        why = " ".join(str(error).split())
        raise ValueError(f"no YAML that can be used: {why[:300] or type(error).__name__}") from None


def _listed(document) -> list:
    """What kubectl makes of a List."""
    if isinstance(document, dict) and document.get("kind") == "List" and isinstance(document.get("items"), list):
        return document["items"]
    return [document]


@dataclass
class _Open:
    """A collection whose end is still to come. keys: those of a mapping so far; None: it is a list."""

    anchor: str | None
    begun: int
    keys: set[str] | None
    at_key: bool = field(default=True)


def _measure(text: str) -> None:
    """One pass over the events, before anything is built of them. ValueError names the limit and the line."""
    sizes: dict[str, int] = {}
    above: list[_Open] = []
    total = 0
    for event in yaml.parse(text, yaml.CSafeLoader):
        if isinstance(event, yaml.NodeEvent):
            line = event.start_mark.line + 1
            if above and above[-1].keys is not None:
                _note_key(above[-1], event, line)
        if isinstance(event, yaml.AliasEvent):
            if any(one.anchor == event.anchor for one in above):
                raise ValueError(f"line {line}: *{event.anchor} is inside of what it stands for")
            total += sizes.get(event.anchor, 0)
        elif isinstance(event, yaml.ScalarEvent):
            sizes[event.anchor] = 1 + len(event.value)
            total += 1 + len(event.value)
        elif isinstance(event, yaml.CollectionStartEvent):
            above.append(_Open(event.anchor, total, set() if isinstance(event, yaml.MappingStartEvent) else None))
            total += 1
            if len(above) > _DEEPEST:
                raise ValueError(f"line {line}: nested more than {_DEEPEST} deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            done = above.pop()
            sizes[done.anchor] = total - done.begun
        if total > _MOST:
            raise ValueError(f"line {line}: its aliases repeat more than {_MOST >> 20} MB")


def _note_key(mapping: _Open, event, line: int) -> None:
    """Keys and values come in turn. Of a key that comes twice PyYAML silently takes the last, and kubectl none."""
    if mapping.at_key and isinstance(event, yaml.ScalarEvent):
        if event.value in mapping.keys and event.value != "<<":
            raise ValueError(f"line {line}: {event.value!r} is given twice")
        mapping.keys.add(event.value)
    mapping.at_key = not mapping.at_key
