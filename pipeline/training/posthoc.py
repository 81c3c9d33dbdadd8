"""Post-hoc EMA: the average of a run's weights whose length is chosen once the run has ended (see `averaging`)."""

import warnings
from collections.abc import Callable

import torch

from pipeline import lease, storage
from pipeline.training import checkpoint, fit
from pipeline.training.averaging import SPREADS, combination, gamma
from pipeline.training.checkpoint import Manifest
from pipeline.training.rank import evaluate_rank, use_threads
from pipeline.training.resources import Resources
from pipeline.training.run import Run
from pipeline.training.saver import Saver
from pipeline.training.tasks import ClassifyConfig, Task
from pipeline.training.world import World

_FAR = 0.15  # from the profile that is asked for, as `combination` says


def snapshots(run: Run) -> list[Manifest]:
    """The checkpoints that averages are made of, oldest first. ValueError if there are none, or the run goes on."""
    if not run.config.task.ema_snapshots:
        raise ValueError(f"{run.path} keeps no snapshots to make averages of: train with --ema-snapshots 12")
    if not fit.finished(run):
        raise ValueError(f"{run.path} has not ended: an average over all of it needs its last checkpoint")
    chain, wanted = checkpoint.lineage(run.path), run.snapshot()
    one_each = {m.samples: m for m in chain if m is chain[0] or wanted(m.samples)}
    return [one_each[samples] for samples in sorted(one_each)]


def choose(run: Run, spreads: list[float], resources: Resources, report: Callable[[dict], None]) -> dict:
    """Validates the averages of these spreads (`averaging.gamma`), in this process, and stores the one of the highest
    accuracy as the run's newest checkpoint, if it is higher than the best one's. Of a GAN, which has no accuracy to
    choose by, the one that is asked for is stored. `report` sees each row.

    Returns {run, best: accuracy before, averages: [{spread, away, accuracy, loss}], spread and checkpoint, or None if
    none is better}. Raises ValueError, or `lease.Held` if the run is being trained.
    """
    scored = isinstance(run.config.task, ClassifyConfig)
    if not scored and len(spreads) != 1:
        raise ValueError("a GAN has no accuracy to choose by: ask for one spread")
    with lease.claim(storage.join(run.path, ".lease"), "millstream average"):
        found, before, rows = snapshots(run), checkpoint.best(run.path), []
        state = checkpoint.read_state(run.path, found[-1])
        modules = state["task"]["modules"]
        target = "average" if "average" in modules else "model"
        task = run.task(fit.device_here(resources))
        averages = _averages(run, found, spreads, {name for name, _ in task.modules[target].named_parameters()})
        for spread, (weights, away) in averages.items():
            rows.append({"spread": spread, "away": away})
            if scored:
                task.modules[target].load_state_dict(modules[target] | weights)
                rows[-1] |= _validated(run, task, resources)
            report(rows[-1])
        best = max(rows, key=lambda row: row.get("accuracy", 0))
        was = before.validation.get("accuracy", -1.0)
        better = not scored or best["accuracy"] > was
        modules[target] |= averages[best["spread"]][0]
        name = _store(run, state, {k: v for k, v in best.items() if k in ("accuracy", "loss")}) if better else None
    chosen = {"spread": best["spread"] if better else None, "checkpoint": name}
    return {"run": run.path, "best": was if scored else None, "averages": rows} | chosen


def _validated(run: Run, task: Task, resources: Resources) -> dict:
    dataset = run.dataset()
    split = run.validation(dataset, run.chosen(dataset))
    if split is None:
        raise ValueError(f"{run.data} has no val split to choose by")
    world = World(device=next(task.modules["model"].parameters()).device)
    answers = evaluate_rank(run, task, split, world, use_threads(resources.threads))
    return {"accuracy": answers.accuracy, "loss": answers.loss}


def _store(run: Run, state: dict, validation: dict) -> str:
    """As the checkpoint of an attempt of its own; its name."""
    attempt, found = checkpoint.claim(run.path)
    saver = Saver(run.path, attempt, found, run.config.loop.keep, about=run.about(), stays=run.snapshot())
    try:
        saver.save(state, state["samples"], [], validation)
        saver.wait()
    finally:
        saver.close()
    return saver.newest()


def _averages(
    run: Run, found: list[Manifest], spreads: list[float], parameters: set[str]
) -> dict[float, tuple[dict[str, torch.Tensor], float]]:
    """{spread: (its average of each parameter, how far its profile is from the one asked for)}"""
    end = found[-1].samples
    kept = [(manifest.samples / end, gamma(spread)) for manifest in found for spread in SPREADS.values()]
    shares = {spread: combination(kept, (1.0, gamma(spread))) for spread in spreads}
    for spread, (_, away) in list(shares.items()):
        if away > _FAR:
            said = f"an average of spread {spread} cannot be made of {len(found)} snapshots ({away:.0%} away from it)"
            warnings.warn(f"{said}: --ema-snapshots of the next run decides", stacklevel=3)
            del shares[spread]
    if not shares:
        raise ValueError(f"none of the spreads can be made of {len(found)} snapshots: ask for 0.05 to 0.1")
    sums: dict[float, dict[str, torch.Tensor]] = {spread: {} for spread in shares}
    for number, manifest in enumerate(found):
        try:
            modules = checkpoint.read_state(run.path, manifest)["task"]["modules"]
        except ValueError as error:
            warnings.warn(f"{error}; going on without it", stacklevel=3)
            return _averages(run, [other for other in found if other is not manifest], spreads, parameters)
        for place, name in enumerate(SPREADS, number * len(SPREADS)):
            for spread, (share, _) in shares.items():
                for key in parameters:
                    sums[spread][key] = sums[spread].get(key, 0) + share[place] * modules[name][key].double()
    singles = {spread: {key: value.float() for key, value in total.items()} for spread, total in sums.items()}
    return {spread: (singles[spread], away) for spread, (_, away) in shares.items()}
