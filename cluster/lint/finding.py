"""What a lint says, and what all kinds of files share."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version

from cluster import exposure


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


def image_trouble(image: str) -> tuple[str, str] | None:
    """(trap, message) for an image that is another one tomorrow, or of another Ray than ours."""
    tag = image.rpartition("/")[2].partition("@")[0].partition(":")[2]
    if "@sha256:" not in image and (not tag or re.search(r"latest|nightly|master|dev", tag)):
        return "floating-image", f"{image!r} is another image tomorrow: give a version, or a digest"
    named = re.search(r"ray-?v?(\d+\.\d+\.\d+)", tag)
    if image.rpartition("/")[2].startswith("ray"):  # Ray's own images
        named = named or re.match(r"(\d+\.\d+\.\d+)", tag)
    if named and named[1] != version("ray"):
        return "ray-version", f"{image!r} has Ray {named[1]}, jobs are submitted with {version('ray')}"
    return None


def secrets(document: dict) -> Iterator[tuple[str, str]]:
    """(where, message) of values that look like secrets."""
    for where, value in tree(document):
        if isinstance(value, str) and (kinds := exposure.kinds(value)):
            yield (
                where,
                f"looks like a secret ({kinds[0]}): mount a file, a Kubernetes secret, or give the nodes a role",
            )
