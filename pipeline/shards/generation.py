"""Making what a build adds: fingerprints where wanted, plan, shards, index. No Ray: it is told who runs the tasks."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.shards import changes, fingerprints, index, shard
from pipeline.shards.commit import Generation, ShardRecord, commit
from pipeline.shards.plan import Recipe, ShardPlan, plan
from pipeline.shards.shard import WORK, Job, Outcome
from pipeline.shards.work import Work
from pipeline.sources.listing import Listing

Task = Callable[[str, str, pa.Table], Outcome]  # of a plan's name, split and items
Runner = Callable[[Task, list[ShardPlan], pa.Table], Iterable[tuple[str, Outcome]]]
Progress = Callable[[int, int, int, int], None]  # tasks done, tasks in all, samples so far, rejects so far


class TooManyRejects(RuntimeError):
    """More items cannot be used than --max-rejects allows. Nothing was committed; finished shards are kept."""


@dataclass
class Building:
    """A build under way. run: does a task for every plan, and yields (name, outcome) as each is done, in any order;
    still_ours: raises if the lease was lost. `added`, `skipped`: samples, and shards found done, so far."""

    uri: str
    out: str
    recipe: Recipe
    max_rejects: int | None
    run: Runner
    still_ours: Callable[[], None]
    progress: Progress
    added: int = 0
    skipped: int = 0

    def each(self, task: Task, plans: list[ShardPlan], items: pa.Table) -> Iterator[tuple[str, Outcome]]:
        for name, outcome in self.run(task, plans, items):
            self.still_ours()
            yield name, outcome


def make(begun: Work, building: Building) -> None:
    """Makes and commits the generation. ValueError: the dataset would hold nothing. TooManyRejects."""
    listing, recipe, out = begun.listing, building.recipe, building.out
    items, repeated = listing.items, index.REJECTS.empty_table()
    hashes, near, wanted = np.zeros(len(items), "V16"), None, None
    if recipe.dedup != "none":
        hashes, near = fingerprint(listing, building, near=recipe.dedup == "near")
        wanted, repeated = fingerprints.unrepeated(items, hashes, near, begun.earlier_sources(out))
    plans = plan(listing, recipe, wanted, begun.earlier["next_shard"] if begun.earlier else {})
    form, labelled = recipe.image(listing.format), bool(listing.classes)
    job = Job(building.uri, out, form, labelled, begun.generation, index.digest(begun.identity))
    _write_shards(job, plans, items, building)

    def records() -> Iterator[ShardRecord]:
        for each in plans:
            record, read = shard.read_record(job, each.name)
            hashes[each.rows] = read  # what became of the sample, whatever a fingerprint saw before
            yield record

    made = Generation(
        begun.generation, begun.identity["source"], lambda: changes.sources_table(items, hashes, near), repeated
    )
    building.still_ours()
    try:
        commit(out, begun.earlier, records(), made, begun.identity["recipe"], listing.classes)
    except ValueError:  # not one sample: nothing here is worth a rerun, and it would refuse a mended source
        storage.delete_tree(storage.join(out, WORK))
        raise


def _write_shards(job: Job, plans: list[ShardPlan], items: pa.Table, building: Building) -> None:
    limit = building.max_rejects if building.max_rejects is not None else max(10, len(items) // 100)
    done, samples, rejected = [], 0, 0
    building.progress(0, len(plans), 0, 0)
    for name, outcome in building.each(lambda *args: shard.write(job, *args), plans, items):
        done.append(name)
        samples, rejected = samples + outcome.samples, rejected + outcome.rejects
        building.added += outcome.samples
        building.skipped += outcome.stood
        building.progress(len(done), len(plans), samples, rejected)
        if rejected > limit:
            raise TooManyRejects(_why_rejected(job, sorted(done), rejected, limit))


def _why_rejected(job: Job, names: list[str], rejected: int, limit: int) -> str:
    rejects = [row for name in names for row in shard.read_record(job, name)[0].rejects.to_pylist()]
    reasons = ", ".join(f"{reason} {n}" for reason, n in Counter(row["reason"] for row in rejects).most_common())
    shown = "; ".join(f"{row['source']!r}: {row['reason']} ({row['detail']})" for row in rejects[:3])
    return (
        f"{rejected} items cannot be used ({reasons}) and --max-rejects is {limit}; for example {shown}. Finished "
        f"shards are kept: run again with a higher --max-rejects, or delete {job.out}/{WORK} and mend the source"
    )


def fingerprint(listing: Listing, building: Building, near: bool) -> tuple[np.ndarray, pa.Array | None]:
    """(content hash of each item, void16 (n,); perceptual hash, uint64 (n,), if asked for): read once, then cached in
    OUT/.build."""
    plans = fingerprints.chunks(len(listing.items))
    folder = storage.join(building.out, WORK)
    job = fingerprints.Job(building.uri, folder, near, fingerprints.digest(listing.items))
    made = building.each(lambda *args: fingerprints.write(job, *args), plans, listing.items)
    for number, _ in enumerate(made):
        building.progress(number + 1, len(plans), 0, 0)
    hashes, looks = fingerprints.read(job, plans)
    return hashes, looks if near else None
