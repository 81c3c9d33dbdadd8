"""Where raw images come from. A source is a module with two functions, and a row in SOURCES:

    list_items(path, labels) -> Listing        everything it has, sorted by name; labels: "auto" or "none"
    read_items(path, items) -> iterator        for each row of `items` (rows of that listing), in order: (raw, beside);
                                               raw: the bytes of an image file; or pixels, uint8 (h, w, c); or the
                                               OSError that kept this one item from being read; beside: {extension:
                                               bytes} of what the source holds about it (captions, masks)

Anything that would keep every item from being read (the store does not answer) is raised instead.
"""

import difflib
from collections.abc import Iterator
from types import ModuleType

import pyarrow as pa

from pipeline import storage
from pipeline.sources import digits, folder, idx, imagenet, tables, tars
from pipeline.sources.listing import Item, Listing

SOURCES = {"folder": folder, "imagenet": imagenet, "tars": tars, "table": tables, "idx": idx, "digits": digits}


def parse(uri: str) -> tuple[ModuleType, str]:
    """The module and the path that `scheme:path` names; a bare path, local or s3://, is a folder. ValueError."""
    scheme, colon, path = uri.partition(":")
    if colon and scheme in SOURCES:
        return SOURCES[scheme], path
    if not colon or path.startswith("//") or "/" in scheme:
        storage.is_remote(uri)  # refuses a store there is no client for
        return folder, uri
    near = difflib.get_close_matches(scheme, SOURCES, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}:{path}?" if near else ""
    raise ValueError(f"no source {scheme!r} in {uri!r}: there are {', '.join(f'{s}:' for s in SOURCES)}{hint}")


def list_items(uri: str, labels: str = "auto") -> Listing:
    """Everything the source holds. ValueError: no such source, nothing in it, or labels asked for that it has not."""
    if labels not in ("auto", "none"):
        raise ValueError(f"labels {labels!r}: auto (classes as the source has them) or none")
    source, path = parse(uri)
    return source.list_items(path, labels)


def read_items(uri: str, items: pa.Table) -> Iterator[Item]:
    """These rows of the source's listing, in their order; see the module's docstring."""
    source, path = parse(uri)
    return source.read_items(path, items)
