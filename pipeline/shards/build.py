"""Raw images -> a finished dataset, by any number of workers, killed and run again as often as it takes.

    list -> plan -> [shard not yet done -> read, encode, write tar, write its record] -> index -> dataset.json

One task makes one shard, from nothing but its plan, so that who runs it cannot show. A shard's record, written after
its tar, is what says that it stands; records lie in OUT/.build with the job they belong to, and go when dataset.json
is in place. What is left in OUT depends on source, recipe and seed alone.
"""

import json
import logging
import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict

import numpy as np
import pyarrow as pa

from pipeline import lease, sources, storage
from pipeline.shards import index, shard
from pipeline.shards.plan import Recipe, ShardPlan, fingerprint, plan
from pipeline.shards.shard import WORK, Job
from pipeline.sources.listing import Listing

LEASE = ".lease"
Progress = Callable[[int, int, int, int], None]  # shards done, shards in all, samples so far, rejects so far


def describe(source_uri: str, out: str, recipe: Recipe) -> dict:
    """What `build` would do, writing nothing: counts by split, classes, format. ValueError as `build` raises it."""
    listing = sources.list_items(source_uri, recipe.labels)
    splits = {}
    for each in plan(listing, recipe):
        split = splits.setdefault(each.split, {"samples": 0, "shards": 0})
        split["samples"] += len(each.rows)
        split["shards"] += 1
    return {
        "samples": listing.items.num_rows,
        "source_bytes": int(listing.items["size"].to_numpy().sum()),
        "classes": list(listing.classes),
        "format": recipe.image(listing.format).format,
        "splits": splits,
        "done": _finished(out, _identity(source_uri, listing, recipe)) is not None,
    }


def build(
    source_uri: str, out: str, recipe: Recipe, workers: int, progress: Progress | None = None, waiting=None
) -> dict:
    """Makes the dataset at `out`. workers: Ray tasks at a time (Ray must run already), 0: in this process, no Ray;
    waiting: called with a line for people while a dead builder's lease on S3 runs out.

    Returns {samples, rejected, rejects {reason: count}, shards, splits, seconds, skipped (shards found done), done
    (the whole dataset was)}. Raises ValueError: nothing to shard, or `out` holds another dataset or another build;
    lease.Held: someone else is building there; StorageError, PermissionError from the stores.
    """
    start = time.perf_counter()
    if workers < 0:
        raise ValueError(f"workers {workers}: 0 (in this process) or more")
    listing = sources.list_items(source_uri, recipe.labels)
    identity = _identity(source_uri, listing, recipe)
    info = _finished(out, identity)
    if info is not None and not _left_over(out):
        return _outcome(info, len(info["shards"]), True, start)
    with lease.claim(storage.join(out, LEASE), "millstream shard", waiting=waiting) as held:
        storage.sweep_partial(out)
        info, skipped, done = _finished(out, identity), 0, True
        if info is None:
            info, skipped = _make(source_uri, out, listing, recipe, identity, workers, progress, held.check)
            done = False
        storage.delete_tree(storage.join(out, WORK))
        storage.sweep_partial(out)  # again: a killed builder's tasks, still writing when we started, are dead by now
    return _outcome(info, skipped, done, start)


def _outcome(info: dict, skipped: int, done: bool, start: float) -> dict:
    splits = {name: {k: split[k] for k in ("samples", "shards")} for name, split in info["splits"].items()}
    counts = {"samples": info["samples"], "rejected": sum(info["rejected"].values()), "rejects": info["rejected"]}
    shards = {"shards": len(info["shards"]), "splits": splits, "skipped": skipped, "done": done}
    return {**counts, **shards, "seconds": time.perf_counter() - start}


# ---- what lies at OUT already


def _identity(source_uri: str, listing: Listing, recipe: Recipe) -> dict:
    kind = sources.parse(source_uri)[0].__name__.rpartition(".")[2]
    source = {"kind": kind, "items": listing.items.num_rows, "fingerprint": fingerprint(listing)}
    return {"source": source, "recipe": asdict(recipe)}


def _finished(out: str, identity: dict) -> dict | None:
    """dataset.json if this very dataset stands at `out`, None if none does. ValueError: another one does."""
    if not storage.exists(storage.join(out, index.DATASET)):
        return None
    info = index.load(out).info
    _same({"source": info["generations"][0]["source"], "recipe": info["recipe"]}, identity, out, "a dataset")
    return info


def _same(there: dict, wanted: dict, out: str, what: str) -> None:
    if there == wanted:
        return
    differences = [
        f"{part} {name}: {there[part].get(name)} there, {wanted[part].get(name)} asked for"
        for part in wanted
        for name in sorted(there[part].keys() | wanted[part].keys())
        if there[part].get(name) != wanted[part].get(name)
    ]
    raise ValueError(f"{out} holds {what} made otherwise ({'; '.join(differences)}): "
                     "choose another OUT, or delete that one")  # fmt: skip


def _left_over(out: str) -> bool:
    """Whether a finished build was killed while it cleared up."""
    return storage.exists(storage.join(out, LEASE)) or storage.exists(_job_path(out))


def _job_path(out: str) -> str:
    return storage.join(out, WORK, "job.json")


def _open(out: str, identity: dict) -> None:
    """Writes down what is being built at `out`, or finds that written. ValueError: something else lies there."""
    try:
        _same(json.loads(storage.read(_job_path(out))), identity, out, "an unfinished build")
    except FileNotFoundError:
        strangers = [file.path for file in storage.list_files(out) if not file.path.startswith(".")]
        if strangers:
            raise ValueError(f"{out} holds files that are no dataset ({strangers[0]}): choose an empty OUT") from None
        storage.write(_job_path(out), json.dumps(identity, indent=1).encode())


# ---- making it


def _make(uri, out, listing: Listing, recipe, identity, workers, progress, still_ours) -> tuple[dict, int]:
    """Returns (what dataset.json holds, number of shards found done)."""
    plans = plan(listing, recipe)
    _open(out, identity)
    job = Job(uri, out, recipe.image(listing.format), index.digest(identity))
    done = shard.standing(job)
    todo = [each for each in plans if each.name not in done]
    finished, samples, rejected = len(done), *(sum(counts[i] for counts in done.values()) for i in (0, 1))
    made = _run_here(job, todo, listing.items) if workers == 0 else _run_ray(job, todo, listing.items, workers)
    if progress:
        progress(finished, len(plans), samples, rejected)
    for more, failed in made:
        still_ours()
        finished, samples, rejected = finished + 1, samples + more, rejected + failed
        if progress:
            progress(finished, len(plans), samples, rejected)
    still_ours()
    records = (shard.read_record(job, each.name) for each in plans)
    made_of = (job.image.format, identity["recipe"], identity["source"])
    try:
        return index.commit(out, records, listing.classes, *made_of), len(done)
    except ValueError:  # not one sample: nothing here is worth a rerun, and it would refuse a mended source
        storage.delete_tree(storage.join(out, WORK))
        raise


def _run_here(job: Job, plans: list[ShardPlan], items: pa.Table) -> Iterator[tuple[int, int]]:
    for each in plans:
        yield shard.write(job, each.name, each.split, items.take(each.rows))


def _run_ray(job: Job, plans: list[ShardPlan], items: pa.Table, workers: int) -> Iterator[tuple[int, int]]:
    """One block, one task, one shard; yields each shard's counts as it is done, in any order."""
    if not plans:
        return
    import cv2
    import ray

    shared = ray.put(items)  # once on each node, read there without copying

    def work(row: dict) -> dict:
        cv2.setNumThreads(1)  # a task has one core
        part = ray.get(shared).take(np.frombuffer(row["rows"], dtype=np.int64))
        try:
            samples, rejected = shard.write(job, row["name"], row["split"], part)
        except Exception as error:  # carried home: Ray Data would log it twice, wrap it and lose the file's name
            return {"samples": 0, "rejected": 0, "error": pickle.dumps(error)}
        return {"samples": samples, "rejected": rejected, "error": b""}

    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.op_resource_reservation_enabled = False  # it keeps half the CPUs back for operators that are not there
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # the rest is noise beside a progress bar
    rows = [{"name": each.name, "split": each.split, "rows": each.rows.tobytes()} for each in plans]
    with ray.data.DataContext.current(context):
        pool = ray.data.TaskPoolStrategy(size=workers)
        tasks = ray.data.from_items(rows, override_num_blocks=len(rows)).map(work, num_cpus=1, compute=pool)
    for made in tasks.iter_rows():
        if made["error"]:
            raise pickle.loads(made["error"])
        yield made["samples"], made["rejected"]
