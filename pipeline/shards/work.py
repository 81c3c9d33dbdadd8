"""What is being built at OUT, written down before it is begun: OUT/.build/listing.parquet, then job.json.

A build that was killed goes on with the listing it began with, whatever its source has become meanwhile: what it makes
is then what it would have made. The growth of the source is the next generation's.
"""

import json
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.shards import index
from pipeline.shards.plan import fingerprint
from pipeline.shards.shard import WORK
from pipeline.sources.listing import Listing

JOB = f"{WORK}/job.json"
_LISTING = f"{WORK}/listing.parquet"


@dataclass(frozen=True)
class Work:
    """A generation under way. identity: what job.json holds; listing: of the items it adds, labelled as the dataset
    is; earlier: dataset.json as it stands, None for a new dataset."""

    identity: dict
    listing: Listing
    earlier: dict | None

    @property
    def generation(self) -> int:
        return self.identity["generation"]

    def earlier_sources(self, out: str) -> pa.Table:
        """SOURCES of the generations that stand."""
        return index.Dataset(out, self.earlier, ()).sources() if self.earlier else index.SOURCES.empty_table()


def begin(out: str, made_as: dict, listing: Listing, dataset: index.Dataset | None) -> Work:
    """Writes down a new generation. made_as: {kind, recipe}. ValueError: `out` holds something else."""
    if not dataset:
        strangers = [file.path for file in storage.list_files(out) if not file.path.startswith(".")]
        if strangers:
            raise ValueError(f"{out} holds files that are no dataset ({strangers[0]}): choose an empty OUT")
    source = {"kind": made_as["kind"], "items": len(listing.items), "fingerprint": fingerprint(listing)}
    number = 1 + max((g["generation"] for g in dataset.info["generations"]), default=-1) if dataset else 0
    identity = {**made_as, "generation": number, "source": source, "classes": listing.classes, "format": listing.format}
    with storage.writer(storage.join(out, _LISTING)) as file:
        pq.write_table(listing.items, file, compression="zstd")
    storage.write(storage.join(out, JOB), json.dumps(identity, indent=1).encode())
    return Work(json.loads(json.dumps(identity)), listing, dataset.info if dataset else None)


def read(out: str, made_as: dict, dataset: index.Dataset | None) -> Work | None:
    """The generation a killed build left unfinished, None if there is none. ValueError: it was to be made otherwise."""
    try:
        identity = json.loads(storage.read(storage.join(out, JOB)))
    except FileNotFoundError:
        return None
    if dataset and identity["generation"] in [g["generation"] for g in dataset.info["generations"]]:
        return None  # it was committed, and killed while it cleared up
    check_same(identity, made_as, out, "an unfinished build")
    items = pq.read_table(pa.BufferReader(storage.read(storage.join(out, _LISTING))))
    listing = Listing(items, tuple(identity["classes"]), identity["format"])
    return Work(identity, listing, dataset.info if dataset else None)


def check_same(there: dict, wanted: dict, out: str, what: str) -> None:
    """ValueError that shows the differences if a dataset or a build at `out` is not of the kind and recipe wanted."""
    old, new = ({"source": each["kind"], **each["recipe"]} for each in (there, wanted))
    differences = [
        f"{name}: {old.get(name)} there, {new.get(name)} asked for"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]
    if differences:
        raise ValueError(f"{out} holds {what} made otherwise ({'; '.join(differences)}): "
                         "ask for the same, choose another OUT, or delete that one")  # fmt: skip
