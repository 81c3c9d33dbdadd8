"""Raw images -> a finished dataset, by any number of workers, killed and run again as often as it takes.

    list -> compare with what stands -> plan -> [read, encode, write tar, write its record] -> index -> dataset.json

One task makes one shard, from nothing but its plan, so that who runs it cannot show. A shard's record, written after
its tar, is what says that it stands; records lie in OUT/.build with the listing they belong to, and go when
dataset.json is in place. What is left in OUT depends on source, recipe and seed alone.

On a finished dataset the same command adds what the source has got since, as a generation of its own.
"""

import logging
import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict

import numpy as np
import pyarrow as pa

from pipeline import lease, sources, storage
from pipeline.shards import changes, index, prune, sidecars, split, work
from pipeline.shards.generation import Building, Progress, Task, TooManyRejects, fingerprint, make
from pipeline.shards.plan import Recipe, ShardPlan, key_bits, plan
from pipeline.shards.shard import WORK, Outcome
from pipeline.sources.listing import Listing

__all__ = ["TooManyRejects", "build", "describe"]
LEASE = ".lease"


def describe(source_uri: str, out: str, recipe: Recipe) -> dict:
    """What `build` would do, writing nothing: counts by split of what it would add, classes, what has changed; `done`
    if there is nothing to do. ValueError as `build` raises it."""
    listing = sources.list_items(source_uri, recipe.labels)
    dataset, found = _dataset(out, _made_as(source_uri, recipe)), None
    if dataset:
        listing = changes.relabelled(listing, dataset.classes)
        found = changes.compare(dataset.sources(), listing.items)
    names, new = listing.items["name"], _part(listing, found, recipe)
    splits = {}
    for each in plan(new, recipe) if len(new.items) else ():
        entry = splits.setdefault(each.split, {"samples": 0, "shards": 0})
        entry["samples"] += len(each.rows)
        entry["shards"] += 1
    return {
        "samples": len(new.items),
        "source_bytes": int(new.items["size"].to_numpy().sum()),
        "classes": list(listing.classes),
        "format": recipe.image(listing.format).format,
        "splits": splits,
        "changed": {names[row].as_py(): what for row, what in found.changed.items()} if found else {},
        "vanished": found.vanished if found else [],
        "done": found is not None and found.nothing and not _left_over(out),
    }


def build(
    source_uri: str,
    out: str,
    recipe: Recipe,
    workers: int,
    progress: Progress | None = None,
    waiting: Callable[[str], None] | None = None,
    max_rejects: int | None = None,
    pruning: bool = False,
    beside: tuple[str, ...] = (),
) -> dict:
    """Makes the dataset at `out`, or adds to it what the source has got since.

    workers: Ray tasks at a time (Ray must run already), 0: in this process, no Ray; waiting: called with a line for
    people while a dead builder's lease on S3 runs out; max_rejects: default the larger of 10 and 1 %, duplicates not
    counted; pruning: what the source no longer has goes, what changed is replaced, and their bytes with them; beside:
    kinds of sidecars, of `sidecars.KINDS`.

    Returns {samples, rejected, rejects {reason: count}, shards, splits, generations, seconds, added (samples), skipped
    (shards found done), vanished (names still in the dataset), pruned (count), done (there was nothing to do)}. Raises
    ValueError: nothing to shard, `out` holds another dataset or another build, or items changed under their names;
    TooManyRejects; lease.Held: someone else is building there; StorageError, PermissionError from the stores.
    """
    if workers < 0 or (max_rejects or 0) < 0:
        raise ValueError(f"workers {workers}, max_rejects {max_rejects}: 0 or more")
    start, made_as = time.perf_counter(), _made_as(source_uri, recipe)
    listing, dataset = sources.list_items(source_uri, recipe.labels), _dataset(out, made_as)
    if dataset and not _left_over(out):
        found = changes.compare(dataset.sources(), changes.relabelled(listing, dataset.classes).items)
        if found.nothing and not (pruning and found.vanished) and sidecars.stand(out, dataset.info, beside):
            return _outcome(dataset.info, start, found.vanished, done=True)
    with lease.claim(storage.join(out, LEASE), "millstream shard", waiting=waiting) as held:
        storage.sweep_partial(out)
        run = _run_ray(workers) if workers else _run_here
        building = Building(source_uri, out, recipe, max_rejects, run, held.check, progress or (lambda *_: None))
        if begun := work.read(out, made_as, dataset):
            make(begun, building)
            dataset = index.load(out)
        vanished, gone, found = [], set(), None
        if dataset:
            listing = changes.relabelled(listing, dataset.classes)
            found = _compare(dataset, listing, building)
            vanished, names = found.vanished, listing.items["name"]
            if found.changed and not pruning:
                storage.delete_tree(storage.join(out, WORK))
                raise ValueError(_why_changed(out, names, found.changed))
            if pruning and (gone := {*vanished, *(names[row].as_py() for row in found.changed)}):
                prune.prune(out, dataset, gone, held.check)
                vanished, dataset = [], index.load(out)
                found.new[list(found.changed)] = True
        new = _part(listing, found, recipe)
        if len(new.items):
            make(work.begin(out, made_as, new, dataset), building)
        dataset = index.load(out)
        prune.clear(out, dataset.info)
        sidecars.bring(out, dataset, beside)
        storage.delete_tree(storage.join(out, WORK))
        storage.sweep_partial(out)  # again: a killed builder's tasks, still writing when we started, are dead by now
    done = not (begun or gone or len(new.items))
    return _outcome(dataset.info, start, vanished, len(gone), building.added, building.skipped, done)


def _outcome(info: dict, start: float, vanished: list[str], pruned=0, added=0, skipped=0, done=False) -> dict:
    splits = {name: {k: split[k] for k in ("samples", "shards")} for name, split in info["splits"].items()}
    counts = {"samples": info["samples"], "rejected": sum(info["rejected"].values()), "rejects": info["rejected"]}
    shards = {"shards": len(info["shards"]), "splits": splits, "generations": len(info["generations"])}
    more = {"added": added, "skipped": len(info["shards"]) if done else skipped, "vanished": vanished, "pruned": pruned}
    return {**counts, **shards, **more, "done": done, "seconds": time.perf_counter() - start}


# ---- what lies at OUT already, and what is to be added


def _made_as(source_uri: str, recipe: Recipe) -> dict:
    return {"kind": sources.parse(source_uri)[0].__name__.rpartition(".")[2], "recipe": asdict(recipe)}


def _dataset(out: str, made_as: dict) -> index.Dataset | None:
    """The dataset at `out`, None if none stands there. ValueError: it was made otherwise."""
    if not storage.exists(storage.join(out, index.DATASET)):
        return None
    dataset = index.load(out)
    there = {"kind": dataset.info["generations"][0]["source"]["kind"], "recipe": dataset.info["recipe"]}
    work.check_same(there, made_as, out, "a dataset")
    return dataset


def _left_over(out: str) -> bool:
    """Whether a build was killed here: before it was done, or while it cleared up."""
    return any(storage.exists(storage.join(out, name)) for name in (LEASE, work.JOB))


def _compare(dataset: index.Dataset, listing: Listing, building: Building) -> changes.Changes:
    """What changed, items of which only the tags differ read and hashed."""
    earlier = dataset.sources()
    found = changes.compare(earlier, listing.items)
    if len(found.doubtful):
        doubtful = listing.items.take(found.doubtful)
        hashes, _ = fingerprint(Listing(doubtful, listing.classes, listing.format), building, near=False)
        other = changes.content_changed(earlier, doubtful, hashes)
        found.changed.update({int(found.doubtful[i]): what for i, what in other.items()})
    return found


def _why_changed(out: str, names: pa.ChunkedArray, changed: dict[int, str]) -> str:
    shown = "; ".join(f"{names[row].as_py()!r}: {changed[row]}" for row in sorted(changed)[:5])
    more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
    return (f"{len(changed)} items of the source are not what {out} was made of ({shown}{more}): --prune replaces "
            "them, or choose another OUT, or give new content a new name")  # fmt: skip


def _part(listing: Listing, found: changes.Changes | None, recipe: Recipe) -> Listing:
    """What is to be added: of a dataset that stands, the new items, in the splits that the whole source gives them."""
    if found is None:
        return listing
    items = split.resolved(listing.items, key_bits(listing.items["name"]), recipe.val_fraction)
    return Listing(items.filter(pa.array(found.new)), listing.classes, listing.format)


# ---- who runs the tasks


def _run_here(task: Task, plans: list[ShardPlan], items: pa.Table) -> Iterator[tuple[str, Outcome]]:
    for each in plans:
        yield each.name, task(each.name, each.split, items.take(each.rows))


def _run_ray(workers: int) -> Callable[..., Iterator[tuple[str, Outcome]]]:
    """The same by Ray Data: one block, one task, one plan; as each is done, in any order."""

    def run(task: Task, plans: list[ShardPlan], items: pa.Table) -> Iterator[tuple[str, Outcome]]:
        if not plans:
            return
        import cv2
        import ray

        shared = ray.put(items)  # once on each node, read there without copying

        def work(row: dict) -> dict:
            cv2.setNumThreads(1)  # a task has one core
            part = ray.get(shared).take(np.frombuffer(row["rows"], dtype=np.int64))
            try:
                result = task(row["name"], row["split"], part)
            except Exception as error:  # carried home: Ray Data would log it twice, wrap it and lose the file's name
                result = error
            return {"name": row["name"], "result": pickle.dumps(result)}

        context = ray.data.DataContext.get_current().copy()
        context.enable_progress_bars = context.print_on_execution_start = False
        context.op_resource_reservation_enabled = False  # it keeps half the CPUs back for operators that are not there
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # the rest is noise beside a progress bar
        rows = [{"name": each.name, "split": each.split, "rows": each.rows.tobytes()} for each in plans]
        with ray.data.DataContext.current(context):
            pool = ray.data.TaskPoolStrategy(size=min(workers, len(rows)))  # it warns of more
            made = ray.data.from_items(rows, override_num_blocks=len(rows)).map(work, num_cpus=1, compute=pool)
        try:
            for row in made.iter_rows():
                result = pickle.loads(row["result"])
                if isinstance(result, Exception):
                    raise result
                yield row["name"], result
        except ray.exceptions.RayError as error:  # a worker's death is not among these: its task is done again
            why = str(error).splitlines()[0]
            raise RuntimeError(
                f"Ray failed ({why}): the same command again goes on from the finished shards"
            ) from error

    return run
