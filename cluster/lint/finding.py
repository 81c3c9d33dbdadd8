"""What a lint says, and what all kinds of files share."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version

from cluster import exposure

_PIECE, _OVERLAP = 4000, 1000  # characters: on long lines the patterns for secrets take time by the square
_MOST_SECRETS = 20  # of a file: who has more knows what to do after these


@dataclass(frozen=True)
class Finding:
    """trap: its name, in kebab case; message: one line, with the value and what to do; severity: error or warning."""

    file: str
    where: str
    trap: str
    message: str
    severity: str = "error"

    def __str__(self) -> str:
        return f"{self.file}: {self.where}: {self.severity}: {self.message} [{self.trap}]"


def tree(node, where: str = "") -> Iterator[tuple[str, object]]:
    """(dotted path, value) of everything in a document."""
    yield where, node
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, inside in items:
        yield from tree(inside, f"{where}.{key}" if where else str(key))


def mapping(node) -> dict:
    """`node` if it is a mapping, else an empty one: the schema says that it should be."""
    return node if isinstance(node, dict) else {}


def items(node) -> list:
    return node if isinstance(node, list) else []


def number(node) -> float:
    """`node` if it is a number, else 0."""
    return node if isinstance(node, int | float) and not isinstance(node, bool) else 0


def seconds(text) -> int | None:
    """Whole seconds, as environment variables hold them; None if it is no such number."""
    return int(text) if re.fullmatch(r"[0-9]{1,9}", str(text)) else None


def image_trouble(image: str) -> tuple[str, str] | None:
    """(trap, message) for an image that is another one tomorrow, or of another Ray than ours."""
    tag = image.rpartition("/")[2].partition("@")[0].partition(":")[2]
    if "@sha256:" not in image and (not tag or re.search(r"\b(latest|nightly|master|main|dev)\b", tag)):
        return "floating-image", f"{image!r} is another image tomorrow: give a version, or a digest"
    named = re.search(r"ray-?v?(\d+\.\d+\.\d+)", tag)
    if image.rpartition("/")[2].startswith("ray"):  # Ray's own images
        named = named or re.match(r"(\d+\.\d+\.\d+)", tag)
    if named and named[1] != version("ray"):
        return "ray-version", f"{image!r} has Ray {named[1]}, jobs are submitted with {version('ray')}"
    return None


def named_like_a_secret(name: str, value: str) -> bool:
    """Whether a variable's name says that its value, given here in plain, is a secret. `$X` gives none away."""
    secret = exposure.named(name)
    return bool(secret and value and not value.lstrip("\"'").startswith("$"))


def secrets(document: dict) -> Iterator[tuple[str, str]]:
    """(where, message) of values that look like secrets, at most the first 20."""
    texts = [(where, " ".join(value.split())) for where, value in tree(document) if isinstance(value, str)]
    for where, kind in itertools.islice(_hidden(texts), _MOST_SECRETS):
        yield where, f"looks like a secret ({kind}): mount a file, a Kubernetes secret, or give the nodes a role"


def _hidden(texts: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """(where, kind of secret), by halves: detect-secrets takes longer to begin than to search a whole file."""
    kind = _kind(" ".join(text for _, text in texts))
    if kind and len(texts) == 1:
        yield texts[0][0], kind
    elif kind:
        middle = len(texts) // 2
        yield from _hidden(texts[:middle])
        yield from _hidden(texts[middle:])


def _kind(text: str) -> str:
    for start in range(0, len(text), _PIECE):
        if found := exposure.kinds(text[start : start + _PIECE + _OVERLAP]):
            return found[0]
    return ""
