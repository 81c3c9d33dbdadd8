"""Averages of the weights: what each time counts in them, and that their length can be chosen after training."""

import dataclasses
import json
import os
import shutil
import threading

import numpy as np
import pytest
import runs
import torch
from torch import nn

from pipeline.training import averaging, checkpoint, fit, posthoc
from pipeline.training.averaging import combination, gamma, power_law
from pipeline.training.resources import Resources
from pipeline.training.run import open_run, start
from pipeline.training.tasks import ClassifyConfig, GanConfig

HERE = Resources(workers=0, threads=1)


def followed(values: np.ndarray, spread: float, step: int = 1) -> np.ndarray:
    """What an average of that spread is after each of `values`."""
    module, average, found = nn.Linear(1, 1, bias=False).double(), nn.Linear(1, 1, bias=False).double(), []
    for number, value in enumerate(values, 1):
        nn.init.constant_(module.weight, value)
        averaging.average_into(average, module, power_law(spread)(step, number * step))
        found.append(average.weight.item())
    return np.array(found)


def profile(spread: float, steps: int) -> np.ndarray:
    """What each step counts at the end, (steps,), by the definition: the integral of t ** gamma over it."""
    return np.diff((np.arange(steps + 1) / steps) ** (gamma(spread) + 1))


@pytest.mark.parametrize("spread", [0.01, 0.05, 0.1, 0.25])
@pytest.mark.parametrize("step", [1, 64])
def test_a_power_law_counts_each_time_as_its_exponent_says_and_spreads_as_asked(spread, step):
    values = np.random.default_rng(0).normal(size=500)
    counts = profile(spread, len(values))
    assert followed(values, spread, step)[-1] == pytest.approx(counts @ values, rel=1e-9)
    times = (np.arange(500) + 0.5) / 500
    assert np.sqrt(counts @ times**2 - (counts @ times) ** 2) == pytest.approx(spread, rel=1e-2)


@pytest.mark.parametrize("spread", [0, -0.1, 0.26, float("nan")])
def test_a_spread_that_no_power_law_has_is_named(spread):
    with pytest.raises(ValueError, match=f"spread {spread}"):
        gamma(spread)


def test_an_average_that_was_kept_is_itself_and_others_come_close_from_twelve_snapshots():
    values = np.cumsum(np.random.default_rng(1).normal(size=1200))
    at = np.arange(100, 1201, 100)
    kept = [(float(time), gamma(spread)) for time in at for spread in averaging.SPREADS.values()]
    stored = np.stack([followed(values, spread)[at - 1] for spread in averaging.SPREADS.values()], 1).ravel()
    for spread in averaging.SPREADS.values():
        shares, away = combination(kept, (1200.0, gamma(spread)))
        assert shares == pytest.approx([float(one == (1200.0, gamma(spread))) for one in kept], abs=1e-4)
        assert away < 1e-4
    for spread in (0.03, 0.04, 0.07, 0.12, 0.2):
        shares, away = combination(kept, (1200.0, gamma(spread)))
        assert shares.sum() == pytest.approx(1)
        counted = shares @ np.stack([np.pad(profile(s, t), (0, 1200 - t)) for t in at for s in (0.05, 0.1)])
        wanted = profile(spread, 1200)
        assert np.linalg.norm(counted - wanted) / np.linalg.norm(wanted) == pytest.approx(away, abs=0.02)
        assert away < 0.07
        assert shares @ stored == pytest.approx(wanted @ values, abs=0.02 * values.std())
    assert combination(kept, (1200.0, gamma(0.01)))[1] > 0.4


def config(snapshots=4, **loop):
    """A rate so high that the weights themselves are worse than averages of them."""
    loop = {"epochs": 4, "keep": 1, "checkpoint_every": 256, "validate_every": 1 << 40} | loop
    task = ClassifyConfig(model="resnet9", width=4, ema_snapshots=snapshots)
    return runs.with_options(vars(task), {"optimizer": "sgd", "lr": 0.8, "schedule": "constant"}, **loop)


@pytest.fixture(scope="module")
def ended(digits, tmp_path_factory):
    """A finished run of four snapshots, stopped twice on the way."""
    run, stop = start(str(tmp_path_factory.mktemp("snapshots")), "test", config(), digits, 0), threading.Event()

    def report(row):
        if row["step"] in (13, 40):
            stop.set()

    for _ in range(3):
        stop.clear()
        fit.train(run, HERE, report, stop=stop)
    return run.path


def copied(ended, tmp_path):
    shutil.copytree(ended, tmp_path / "run")
    return open_run(str(tmp_path / "run"))


def test_snapshots_stay_whoever_wrote_them(ended):
    samples = {manifest.samples for manifest in checkpoint.lineage(ended)}
    assert samples == {26 * 64, 51 * 64, 76 * 64, 101 * 64} | {41 * 64}  # of 101 steps; and the one resumed from
    assert [manifest.samples for manifest in posthoc.snapshots(open_run(ended))] == [s * 64 for s in (26, 51, 76, 101)]


def test_the_average_that_scores_best_becomes_the_runs_best_checkpoint(ended, tmp_path, cli):
    run = copied(ended, tmp_path)
    last = checkpoint.newest(run.path)[0]
    code, out, err = cli("average", run.path, "--dry-run", "--json")
    assert (code, len(json.loads(out)["snapshots"])) == (0, 4)
    assert checkpoint.newest(run.path)[0] == last
    code, out, err = cli("average", run.path, "--threads", "1", "--json")
    assert code == 0, err
    found = json.loads(out)
    accuracies = {row["spread"]: row["accuracy"] for row in found["averages"]}
    assert set(accuracies) >= {0.05, 0.07, 0.1, 0.15}
    assert accuracies[found["spread"]] == max(accuracies.values()) > found["best"] == last.validation["accuracy"]
    best = checkpoint.best(run.path)
    assert (best.name, best.samples) == (found["checkpoint"], last.samples)
    assert best.validation["accuracy"] == max(accuracies.values())
    answers, name = fit.evaluate(run, run.data, "val", HERE)
    assert (name, answers.accuracy) == (best.name, best.validation["accuracy"])
    assert fit.train(run, HERE, lambda row: None)["done"]
    rows = checkpoint.read_metrics(run.path)
    assert [row["step"] for row in rows] == list(range(1, 102))
    code, out, err = cli("average", run.path, "--threads", "1", "--json")
    assert (code, json.loads(out)["checkpoint"]) == (0, None)  # none is better than itself
    assert "nothing is changed" in err
    assert checkpoint.best(run.path) == best


def test_the_average_stored_is_the_one_that_was_kept_where_that_is_asked_for(ended, tmp_path):
    run = copied(ended, tmp_path)
    before = checkpoint.newest(run.path)[1]["task"]["modules"]
    assert posthoc.choose(run, [0.1], HERE, lambda row: None)["spread"] == 0.1
    after = checkpoint.newest(run.path)[1]["task"]["modules"]
    for name, value in after["model"].items():
        kept = before["average_10"][name]
        assert torch.allclose(value, kept, atol=1e-4) if value.is_floating_point() else torch.equal(value, kept)
    assert not torch.allclose(after["model"]["head.weight"], before["model"]["head.weight"], atol=1e-3)


def test_a_damaged_snapshot_is_done_without_and_a_spread_that_is_too_far_is_left_out(ended, tmp_path):
    run = copied(ended, tmp_path)
    first = posthoc.snapshots(run)[0].name
    os.truncate(f"{run.path}/checkpoints/{first}/state.pt", 100)
    with pytest.warns(UserWarning, match="going on without it|cannot be made") as caught:
        found = posthoc.choose(run, [0.01, 0.05], HERE, lambda row: None)
    assert [row["spread"] for row in found["averages"]] == [0.05]
    said = " ".join(str(warning.message) for warning in caught)
    assert (
        f"checkpoint {first}: state.pt is not what its manifest says (damaged or truncated); going on without" in said
    )
    assert "spread 0.01 cannot be made of 4 snapshots" in said
    with (
        pytest.warns(UserWarning, match="cannot be made"),
        pytest.raises(ValueError, match="none of the spreads can be made"),
    ):
        posthoc.choose(run, [0.01], HERE, lambda row: None)


def test_of_a_gan_the_average_that_is_asked_for_is_what_it_draws_from(digits, tmp_path, cli):
    task = {**vars(runs.gan().task), "ema_snapshots": 2}
    run = start(str(tmp_path / "run"), "test", dataclasses.replace(runs.gan(), task=GanConfig(**task)), digits, 0)
    fit.train(run, HERE, lambda row: None)
    code, _, err = cli("average", run.path)
    assert (code, "a GAN has no accuracy to choose by" in err) == (2, True)
    code, out, _ = cli("average", run.path, "--spreads", "0.05", "--json")
    assert (code, json.loads(out)["best"]) == (0, None)
    assert checkpoint.best(run.path).name == json.loads(out)["checkpoint"]
    modules = checkpoint.newest(run.path)[1]["task"]["modules"]
    for name, value in modules["average"].items():
        assert torch.allclose(value.double(), modules["average_5"][name].double(), atol=1e-4)


@pytest.mark.parametrize("mistake", ["none", "unfinished", "wide", "no gpu"])
def test_what_cannot_be_averaged_is_said_before_anything_is_read(ended, digits, tmp_path, cli, monkeypatch, mistake):
    run, words = ended, []
    if mistake == "none":
        run = str(tmp_path)
        fit.train(start(run, "test", config(0, epochs=0.1), digits, 0), HERE, lambda row: None)
    elif mistake == "unfinished":
        run = start(str(tmp_path), "test", config(), digits, 0).path
    elif mistake == "wide":
        words = ["--spreads", "0.05", "0.5"]
    else:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        words = ["--device", "cuda"]
    code, _, err = cli("average", run, *words)
    said = {"none": "--ema-snapshots 12", "unfinished": "has not ended", "wide": "spread 0.5: more than 0"}
    assert (code, said.get(mistake, "torch finds no GPU") in err) == (2, True), err
