"""What every source answers with: its items as columns, so that fourteen million of them fit in memory."""

from dataclasses import dataclass

import pyarrow as pa

ITEMS = pa.schema(
    {
        "name": pa.string(),  # path relative to the source's root, "/" between segments: who the sample is
        "label": pa.int32(),  # null where there are no classes
        "split": pa.string(),  # null where the source names none
        "size": pa.int64(),  # bytes, 0 if unknown
        "tag": pa.string(),  # changes when the content does: modification time, ETag
    }
)


@dataclass(frozen=True)
class Listing:
    """items: ITEMS, sorted by name; classes: names by label, empty where there are none; format: the output format
    that suits this source, jpg or png."""

    items: pa.Table
    classes: tuple[str, ...]
    format: str

    @classmethod
    def of(cls, columns: dict[str, list], classes, form: str) -> "Listing":
        items = pa.table({name: columns[name] for name in ITEMS.names}, schema=ITEMS)
        return cls(items.sort_by("name"), tuple(classes), form)
