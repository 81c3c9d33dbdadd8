"""Which generations of the dataset are trained on: each is accepted or held, once, and people may change that.

ROOT/verdicts.json   {number: {verdict: accepted or held, why, by}}

By their numbers, so that a generation keeps its verdict when samples are pruned from it.
"""

import json

from pipeline import storage

ACCEPTED, HELD = "accepted", "held"


def read(root: str) -> dict[int, dict]:
    """{generation: its verdict}, empty before the first night."""
    try:
        return _parsed(storage.read(_path(root)))
    except FileNotFoundError:
        return {}


def accepted(root: str) -> list[int]:
    return sorted(number for number, verdict in read(root).items() if verdict["verdict"] == ACCEPTED)


def give(root: str, numbers: list[int], verdict: str, why: str, by: str, anew: bool = False) -> None:
    """Writes the verdict on these generations; those that have one keep it, unless `anew`."""
    new = {number: {"verdict": verdict, "why": why, "by": by} for number in numbers}

    def given(data: bytes | None) -> bytes:
        found = _parsed(data or b"{}")
        found = found | new if anew else new | found
        return json.dumps({str(number): found[number] for number in sorted(found)}, indent=1).encode()

    storage.change(_path(root), given)


def _path(root: str) -> str:
    return storage.join(root, "verdicts.json")


def _parsed(data: bytes) -> dict[int, dict]:
    return {int(number): verdict for number, verdict in json.loads(data).items()}
