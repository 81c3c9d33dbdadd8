"""What champion and challenger are compared on: a split of some generations, frozen when the first night froze it.

ROOT/holdout.json   {split, generations (their numbers), samples, digest, looks: [ticks that scored on it]}

The dataset grows; a holdout that grew with it would compare tonight's scores with nothing. Each night that looks at it
spends some of what it can still tell (`gate.alpha_at`), so looks are counted.
"""

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace

from pipeline import storage
from pipeline.shards import pinned
from pipeline.shards.index import Dataset, Split


@dataclass(frozen=True)
class Holdout:
    """A frozen holdout; `digest`: SHA-256 of its samples' keys and checksums, hex."""

    split: str
    generations: tuple[int, ...]
    samples: int
    digest: str
    looks: tuple[str, ...] = ()

    def rows(self, dataset: Dataset) -> Split:
        """Its samples. ValueError if they are not those that were frozen: pruned, or the dataset is another."""
        split = pinned.of(dataset, self.generations).split(self.split)
        if (len(split), _digest(split)) != (self.samples, self.digest):
            numbers = ", ".join(map(str, self.generations))
            raise ValueError(
                f"the holdout ({self.split} of generations {numbers} of {dataset.root}) is not what was frozen: "
                f"{self.samples:,} samples then, {len(split):,} now. Scores on it can no longer be compared: --freeze "
                f"freezes it anew, and nights are counted anew"
            )
        return split


def freeze(root: str, dataset: Dataset, split: str, generations: Collection[int], anew: bool = False) -> Holdout:
    """The holdout of the nightly at `root`: the one that stands, else (or `anew`) this split of these generations."""
    path = storage.join(root, "holdout.json")
    if not anew and (found := read(root)):
        return found
    part = pinned.of(dataset, generations)
    if split not in part.info["splits"]:
        there = ", ".join(name for name in part.info["splits"] if name != "train") or "none"
        raise ValueError(f"holdout {split!r}: the dataset has no such split, but {there}: name one, or have the first "
                         "night's source hold some out")  # fmt: skip
    rows = part.split(split)
    made = Holdout(split, tuple(sorted(generations)), len(rows), _digest(rows))
    if anew:
        storage.write(path, _text(made))
        return made
    try:
        storage.write_new(path, _text(made))
    except FileExistsError:  # frozen by another meanwhile
        return read(root)
    return made


def read(root: str) -> Holdout | None:
    """The holdout of the nightly at `root`, None before its first night."""
    try:
        return _parsed(storage.read(storage.join(root, "holdout.json")))
    except FileNotFoundError:
        return None


def look(root: str, tick: str) -> int:
    """Counts the night among those that scored on the holdout, once; returns which look this is, from 1 on."""

    def counted(data: bytes | None) -> bytes:
        found = _parsed(data)
        return _text(found if tick in found.looks else replace(found, looks=(*found.looks, tick)))

    return _parsed(storage.change(storage.join(root, "holdout.json"), counted)).looks.index(tick) + 1


def _digest(split: Split) -> str:
    found = hashlib.sha256("\n".join(split.keys.to_pylist()).encode())
    found.update(split.crc32.astype("<u4").tobytes())
    return found.hexdigest()


def _text(holdout: Holdout) -> bytes:
    return json.dumps(asdict(holdout), indent=1).encode()


def _parsed(data: bytes) -> Holdout:
    return Holdout(**{name: tuple(v) if isinstance(v, list) else v for name, v in json.loads(data).items()})
