"""What a cluster file says, whatever its format: node types, and who can reach them. `cluster.plan` adds prices."""

from dataclasses import dataclass, field
from typing import Any

EVERYBODY = ("0.0.0.0/0", "::/0")


@dataclass(frozen=True)
class Node:
    """A node type. market: spot, on-demand, or None if the file does not say; idle_s: then it goes, None: never."""

    name: str
    machine: str | None
    market: str | None
    least: int
    most: int
    head: bool = False
    cpus: float | None = None
    gpus: float | None = None
    priority: int = 0
    idle_s: float | None = None
    extra: str = ""  # what is attached to the machine, and has a price that no table here knows


@dataclass(frozen=True)
class Way:
    """Who can reach what. open: from anywhere in the world."""

    who: str
    what: str
    open: bool = False


@dataclass(frozen=True)
class Facts:
    """most: workers at once, all types together. cloud: whose machines, "" if only their names tell; so is region."""

    kind: str
    name: str
    cloud: str
    region: str
    nodes: list[Node]
    most: int
    token: bool
    ways: list[Way]
    unknown: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def at(found: Any, *keys: str | int) -> Any:
    """`found[key][key]...`, None where something on the way is missing or of another kind."""
    for key in keys:
        inside = isinstance(found, dict) or (isinstance(found, list) and isinstance(key, int) and key < len(found))
        found = (found.get(key) if isinstance(found, dict) else found[key]) if inside else None
    return found


def dicts(found: Any) -> list[dict]:
    """Those of a list that are mappings; [] for anything else."""
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
