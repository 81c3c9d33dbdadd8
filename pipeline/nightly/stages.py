"""What a night does, stage by stage. Each takes the night and returns its result, plain JSON; one that has an `outcome`
ends it.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace

from pipeline import registry, storage
from pipeline.loading.selection import choose
from pipeline.nightly import answers, draws, drift, holdout, profile, record, verdicts
from pipeline.nightly.night import Night, Stage, Stopped
from pipeline.shards import build, index, pinned
from pipeline.training import fit, own, weights
from pipeline.training.rank import restored
from pipeline.training.run import open_run, start
from pipeline.training.tasks import GanConfig

_DAY_S = 86_400.0
_CONFIRM_S = 1800.0
_CONFIRMED = 512  # samples of the holdout


def fresh(night: Night) -> dict:
    """Whether there is anything to train on that was not trained on yet. Reads a listing, and starts nothing."""
    config = night.config
    plan = build.describe(config.source, config.data, config.shard)
    new, changed, vanished = plan["samples"], len(plan["changed"]), len(plan["vanished"])
    if changed and not config.prune:
        names = ", ".join(list(plan["changed"])[:3])
        raise ValueError(
            f"{changed} items changed under their names ({names}): give new content new names, or say prune: true, "
            f"which takes what they hold now for what they held"
        )
    last = next((doc for doc in record.newest_first(config.root) if "trained" in doc), {})
    trained, accepted = last.get("trained", []), verdicts.accepted(config.root)
    night.record.note(trained=trained, trained_at=last.get("trained_at", 0.0), trained_by=last.get("trained_by", ""))
    waiting = [number for number in accepted if number not in trained]
    if _has_dataset(config.data):  # a night was killed before it judged what it had sharded
        there = [generation["generation"] for generation in index.load(config.data).info["generations"]]
        waiting += [number for number in there if number not in verdicts.read(config.root)]
    age = round((time.time() - last["trained_at"]) / _DAY_S, 6) if last.get("trained_at") else None
    found = {"new": new, "changed": changed, "vanished": vanished, "waiting": waiting, "age_days": age}
    pruning = config.prune and (changed or vanished)
    if night.force or pruning or waiting or (new and new >= config.min_new):
        return found
    if age is not None and config.max_age_days and age >= config.max_age_days:
        return found | {"aged": True}
    if new:
        why = f"{new} new items, and min_new is {config.min_new}: they wait for more"
    else:
        held = [number for number, verdict in verdicts.read(config.root).items() if verdict["verdict"] == verdicts.HELD]
        why = "no new data" + (f" since {last['trained_by']}" if last.get("trained_by") else "")
        why += f"; generation {', '.join(map(str, held))} is held" if held else ""
    return found | {"outcome": "skipped", "reason": why}


def data(night: Night) -> dict:
    """New images become a generation of the dataset, which is accepted or held for how it differs from what the
    champion knows."""
    config, found = night.config, night.results["fresh"]
    if found["new"] or found["changed"] or found["vanished"] or not _has_dataset(config.data):
        workers = config.resources.most
        if workers:
            night.ray()

        def progress(*counts: int) -> None:
            if night.stop.is_set():  # what is sharded stands
                raise Stopped
            night.sharded(*counts)

        made = build.build(config.source, config.data, config.shard, workers, progress, night.say,
                           max_rejects=config.max_rejects, pruning=config.prune)  # fmt: skip
        said = {name: made[name] for name in ("added", "pruned", "rejects")}
    else:
        said = {"added": 0, "pruned": 0, "rejects": {}}
    dataset, known, judge = index.load(config.data), verdicts.read(config.root), f"the night {night.tick}"
    numbers = [generation["generation"] for generation in dataset.info["generations"]]
    new = [number for number in numbers if known.get(number, {"by": judge})["by"] == judge]  # before a kill, too
    accepted = [number for number in numbers if number not in new and known[number]["verdict"] == verdicts.ACCEPTED]
    report = None
    if new and accepted:
        before, now = (profile.measure(dataset, part, config.drift.images) for part in (_known(night, accepted), new))
        report = drift.compare(before, now, config.drift)
        said |= {"report": asdict(report), "before": asdict(before), "now": asdict(now)}
    verdict = verdicts.HELD if report and report.verdict == "fail" else verdicts.ACCEPTED
    verdicts.give(config.root, new, verdict, report.reason if report else "the first data", judge)
    accepted = verdicts.accepted(config.root)
    generations = [number for number in numbers if number in accepted]
    said |= {"new": new, "verdict": verdict if new else "", "generations": generations}
    if verdict == verdicts.HELD and not (set(generations) - set(night.record.doc["trained"])) and not night.force:
        which = ", ".join(map(str, new))
        why = f"generation {which} is held ({report.reason}): --accept {new[0]} lets it in"
        return said | {"outcome": "skipped", "reason": why}
    return said


def _known(night: Night, accepted: list[int]) -> list[int]:
    """The generations that the champion was trained on, as far as they are there; else all that were accepted."""
    if version := night.champion.version:
        info = registry.describe(registry.version_path(night.config.registry, night.config.name, version))
        from_here = info.get("lineage", {}).get("data") == night.config.data
        mine = [number for number in info.get("lineage", {}).get("numbers", []) if number in accepted]
        if from_here and mine:
            return mine
    return accepted


def train(night: Night) -> dict:
    """The challenger: a run of its own, from the champion's weights, on everything that was accepted."""
    config, numbers = night.config, night.results["data"]["generations"]
    path, resources = config.run_path(night.tick), config.resources
    dataset = pinned.of(index.load(config.data), numbers)
    holdout.freeze(config.root, dataset, config.holdout, numbers)  # before anything is trained that could know it
    wanted = _tonight(night, dataset, numbers)
    opened = start(path, config.preset, wanted, config.data, resources.workers, numbers)
    if not fit.finished(opened) and resources.most:
        night.ray()
    result = fit.train(opened, resources, night.report, waiting=night.say, stop=night.stop)
    if result["stopped"]:
        raise Stopped
    kept = ("run", "samples_seen", "epochs", "checkpoint", "metrics")
    return {name: result[name] for name in kept} | {"init": opened.init}


def _tonight(night: Night, dataset: index.Dataset, numbers: list[int]):
    config, wanted = night.config, night.train
    if storage.exists(storage.join(config.run_path(night.tick), "config.json")):
        init = open_run(config.run_path(night.tick)).init  # a run goes on as it began, whoever is champion by now
    elif config.warm_start and night.champion.version:
        init = registry.version_path(config.registry, config.name, night.champion.version)
    else:
        init = ""
    wanted = replace(wanted, init=init)
    new = len(set(numbers) - set(night.record.doc["trained"]))
    if init and config.recent and 0 < new < len(numbers):
        wanted = replace(wanted, selection=replace(wanted.selection, recent=config.recent, recent_generations=new))
    if config.samples:
        chosen = choose(dataset.split("train"), wanted.selection, wanted.loop.seed)
        wanted = replace(wanted, loop=replace(wanted.loop, epochs=config.samples / len(chosen.split)))
    return wanted


def score(night: Night) -> dict:
    """Challenger and champion on the frozen holdout, and what the gate says of the two."""
    opened = open_run(night.results["train"]["run"])
    said = (draws if isinstance(opened.config.task, GanConfig) else answers).score(night, opened, newest(night))
    said |= {"champion": night.champion.version, "anchor": night.champion.anchor}
    decision = said["decision"]
    return said if decision["promote"] else said | {"outcome": "rejected", "reason": decision["reason"]}


def newest(night: Night) -> bool:
    """Whether the last checkpoint is taken, not the best: that would be the best on the holdout itself where training
    validates on it; and nothing validates a GAN."""
    return night.config.holdout == "val" or isinstance(night.train.task, GanConfig)


def publish(night: Night) -> dict:
    """The challenger becomes a version of the registry; nobody is promoted yet."""
    config, opened = night.config, open_run(night.results["train"]["run"])
    task, manifest = restored(opened, newest=newest(night))
    frozen, numbers = holdout.read(config.root), night.results["data"]["generations"]
    lineage = {
        "data": config.data,
        "numbers": numbers,
        "generations": list(opened.generations),
        "run": opened.path,
        "checkpoint": manifest.name,
        "init": opened.init,
        "night": night.tick,
        "holdout": frozen.digest if frozen else "",
        "millstream": opened.about()["millstream"],
    }
    version = registry.publish(
        config.registry,
        config.name,
        weights.files(opened.config.task, task),
        weights.described(opened.config.task, opened.facts, opened.config.augment),
        {"metrics": night.results["score"]["decision"]["numbers"], "lineage": lineage},
    )
    return {"version": version}


def confirm(night: Night) -> dict:
    """A process that knows nothing of the run loads what was published, and must answer as the run did."""
    config, version = night.config, night.results["publish"]["version"]
    path = registry.version_path(config.registry, config.name, version)
    asked = {"path": path, "root": config.root, "data": config.data, "samples": _CONFIRMED}
    here = os.environ | {"PYTHONPATH": os.pathsep.join(part for part in sys.path if part)} | own.variables()
    command = [sys.executable, "-m", "pipeline.nightly.confirm", json.dumps(asked)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_CONFIRM_S, env=here)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{path}: a clean process took more than {_CONFIRM_S:.0f} s over it") from None
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        raise RuntimeError(f"{path} cannot be used by a clean process: {why}")
    said = json.loads(done.stdout)
    return (draws if "images" in said else answers).hold_against(night, said)


def promote(night: Night) -> dict:
    """One swap; nobody else may have become champion since the scores."""
    config, version = night.config, night.results["publish"]["version"]
    decision, seen = night.results["score"]["decision"], night.champion
    if seen.night == night.tick and seen.version == version:  # killed between the swap and its note
        return {"outcome": "promoted", "reason": seen.why, "epoch": seen.epoch, "version": version}
    if version in seen.blocked:
        return {"outcome": "rejected", "reason": f"{version} was rolled back, and is blocked"}
    if version == seen.version:
        return {"outcome": "rejected", "reason": f"{version} is the champion already, to the last bit"}
    night.held.check()
    new = registry.promote(config.registry, config.name, version, seen, rule=decision["rule"], why=decision["reason"],
                           night=night.tick)  # fmt: skip
    night.champion = new
    return {"outcome": "promoted", "reason": decision["reason"], "epoch": new.epoch, "version": version}


def _has_dataset(path: str) -> bool:
    return storage.exists(storage.join(path, index.DATASET))


STAGES: list[Stage] = [(stage.__name__, stage) for stage in (fresh, data, train, score, publish, confirm, promote)]
