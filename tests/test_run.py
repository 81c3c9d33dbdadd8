"""A run is its directory: the same command goes on, another is refused, and the record holds each step once."""

import json
import os
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
import runs
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_growth import names, paint

from jobs import audit
from pipeline import storage
from pipeline.loading.augment import Augment
from pipeline.loading.order import Batching
from pipeline.loading.selection import Selection
from pipeline.shards import index, pinned
from pipeline.shards.build import build
from pipeline.shards.plan import Recipe
from pipeline.training import checkpoint, fit
from pipeline.training import rank as rank_module
from pipeline.training.compute import ComputeConfig
from pipeline.training.rank import draw_classes, restored, train_rank
from pipeline.training.resources import Resources
from pipeline.training.run import describe, open_run, start
from pipeline.training.tasks import ClassifyConfig
from pipeline.training.world import Contact, World

HERE = Resources(workers=0, threads=1)


def trained(path, config, data, report=lambda row: None):
    return fit.train(start(path, "test", config, data, 0), HERE, report)


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    """Unbroken runs of an epoch, by kind."""
    root = tmp_path_factory.mktemp("whole")
    for kind, config in runs.KINDS.items():
        trained(str(root / kind), config(), digits)
    return root


class Stop(Exception):
    pass


def stopped(path, config, data, step):
    """A run whose process was stopped at a step, as by Ctrl-C."""

    def report(row):
        if row["step"] == step:
            raise Stop

    with pytest.raises(Stop):
        trained(path, config, data, report)


@pytest.mark.parametrize("kind", runs.KINDS)
@pytest.mark.parametrize("steps", [(1,), (3, 12), (8, 20, 25)])
def test_the_same_command_goes_on_and_ends_as_one_never_stopped(digits, whole, tmp_path, kind, steps):
    for step in steps:
        stopped(str(tmp_path), runs.KINDS[kind](), digits, step)
    result = trained(str(tmp_path), runs.KINDS[kind](), digits)
    assert runs.ends_alike(str(tmp_path), str(whole / kind))
    assert runs.numbers(str(tmp_path)) == runs.numbers(str(whole / kind))
    assert [row["step"] for row in runs.numbers(str(tmp_path))] == list(range(1, 27))
    assert (result["samples_seen"], result["done"]) == (1664, False)
    assert result["samples_seen"] - runs.SAMPLES < 64


def test_a_finished_run_does_no_work(digits, whole, tmp_path):
    shutil.copytree(whole / "cnn", tmp_path / "run")
    before = {path: os.stat(path).st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    result = trained(str(tmp_path / "run"), runs.cnn(), digits)
    assert result["done"]
    assert result["samples_seen"] == 1664
    assert result["metrics"]["val_accuracy"] == result["metrics"]["best_accuracy"]
    assert before == {path: os.stat(path).st_mtime_ns for path in (tmp_path / "run").rglob("*")}


@pytest.mark.filterwarnings("ignore:checkpoint")
def test_a_finished_run_whose_last_checkpoint_is_damaged_is_finished_again(digits, whole, tmp_path):
    shutil.copytree(whole / "cnn", tmp_path / "run")
    last = checkpoint.lineage(str(tmp_path / "run"))[0].name
    os.truncate(tmp_path / "run/checkpoints" / last / "state.pt", 1000)
    result = trained(str(tmp_path / "run"), runs.cnn(), digits)
    assert not result["done"]
    assert runs.ends_alike(str(tmp_path / "run"), str(whole / "cnn"))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (replace(runs.cnn(), optim=replace(runs.cnn().optim, lr=0.5)), r"optim.lr 0.002 -> 0.5"),
        (runs.cnn(seed=6), r"loop.seed 5 -> 6"),
        (runs.cnn(batch=128), r"loop.batch 64 -> 128"),
        (runs.cnn(micro_batches=4), r"loop.micro_batches 2 -> 4"),
        (runs.cnn(epochs=2), r"loop.epochs 1 -> 2"),
        (replace(runs.cnn(), augment=Augment(16)), r"augment.crop 'pad' -> 'none'"),
        (replace(runs.cnn(), task=ClassifyConfig()), r"task.ema_half_life 300 -> 0.0"),
        (runs.gan(), r"kind 'classify' -> 'gan'"),
    ],
)
def test_another_configuration_is_refused_with_the_field(digits, whole, changed, said):
    with pytest.raises(ValueError, match=f"{said}.*another --out"):
        start(str(whole / "cnn"), "test", changed, digits, 0)


def test_what_is_kept_and_how_often_may_change(digits, whole):
    start(str(whole / "cnn"), "another name", runs.cnn(keep=7, checkpoint_every=64), digits, 1)


def test_the_dataset_may_move_but_not_change(digits, whole, tmp_path):
    moved, other = str(tmp_path / "moved"), str(tmp_path / "other")
    shutil.copytree(digits, moved)
    assert start(str(whole / "cnn"), "test", runs.cnn(), moved, 0).data == moved
    build("digits:", other, Recipe(samples_per_shard=300, seed=9), workers=0)
    with pytest.raises(ValueError, match=r"other is not the dataset that was.*generation 0.*another --out"):
        start(str(whole / "cnn"), "test", runs.cnn(), other, 0)


def test_a_dataset_changed_under_a_running_run_is_refused(digits, tmp_path):
    data = str(tmp_path / "data")
    shutil.copytree(digits, data)
    run = start(str(tmp_path / "run"), "test", runs.cnn(), data, 0)
    shutil.rmtree(data)
    build("digits:", data, Recipe(samples_per_shard=300, seed=9), workers=0)
    with pytest.raises(ValueError, match="is not the dataset that was"):
        train_rank(run, World(), HERE, 1, Contact())


def test_workers_that_cannot_share_a_step_are_told_which_can(digits, whole, tmp_path):
    for path in (tmp_path / "new", whole / "cnn"):
        with pytest.raises(ValueError, match=r"3 workers cannot share 2 micro-batches.*\[1, 2\] workers"):
            start(str(path), "test", runs.cnn(), digits, 3)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="batch 65"):
        start(str(tmp_path / "new"), "test", runs.cnn(batch=65), digits, 1)


@pytest.mark.parametrize(("workers", "expected"), [(0, 2), (1, 2), (2, 2), (3, 4), (5, 8), (64, 64)])
def test_micro_batches_default_to_the_power_of_two_that_serves_the_workers(digits, tmp_path, workers, expected):
    config = runs.cnn(micro_batches=0)
    asked = start(str(tmp_path), "test", config, digits, workers if workers in (0, expected) else expected)
    assert asked.config.loop.micro_batches == expected
    again = start(str(tmp_path), "test", config, digits, 1)
    assert again.config.loop.micro_batches == expected  # a run keeps what it was started with
    assert again.batching == Batching(64, expected)


def test_a_run_opened_is_the_run_that_was_started(digits, whole):
    for kind, config in runs.KINDS.items():
        assert open_run(str(whole / kind)) == start(str(whole / kind), "test", config(), digits, 0)
    with pytest.raises(ValueError, match=r"is not a run.*millstream train"):
        open_run(str(whole))


def test_two_first_starts_at_once_agree_or_one_is_refused(digits, tmp_path):
    line, opened = threading.Barrier(4), []

    def begin():
        line.wait(30)
        opened.append(start(str(tmp_path / "run"), "test", runs.cnn(), digits, 0))

    threads = [threading.Thread(target=begin) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(opened) == 4
    assert len(set(map(str, opened))) == 1


# ---- what the data decides


def test_size_and_channels_come_from_the_data(digits, photos, tmp_path):
    augment, facts = describe(index.load(digits), Augment())
    assert (augment.image_size, augment.channels, facts.channels, len(facts.mean)) == (32, 1, 1, 1)
    with pytest.raises(ValueError, match=r"differ in size.*--image-size"):
        describe(index.load(photos), Augment())
    augment, facts = describe(index.load(photos), Augment(image_size=20))
    assert (augment.image_size, augment.channels, len(facts.mean), len(facts.std)) == (20, 3, 3, 3)
    augment, facts = describe(index.load(digits), Augment(channels=3))
    assert (facts.channels, len(facts.mean)) == (3, 3)
    augment, facts = describe(index.load(photos), Augment(image_size=20, channels=1))
    assert facts.mean == pytest.approx([np.mean(index.load(photos).info["mean"])])


def test_a_dataset_resized_when_sharded_says_its_size(photos, tmp_path):
    source = index.load(photos).root.replace("shards", "in")
    build(f"folder:{source}", str(tmp_path / "small"), Recipe(samples_per_shard=30, size=36), workers=0)
    assert describe(index.load(str(tmp_path / "small")), Augment())[0].image_size == 36


@pytest.mark.parametrize("kind", runs.KINDS)
def test_images_of_differing_sizes_train(photos, tmp_path, kind):
    config = replace(runs.KINDS[kind](batch=16), augment=Augment(16, crop="resized", flip=True))
    assert trained(str(tmp_path), config, photos)["samples_seen"] >= 60


def test_what_cannot_be_built_is_said_before_anything_is_written(photos, tmp_path):
    with pytest.raises(ValueError, match="images of 4 px vanish"):
        start(str(tmp_path / "run"), "test", replace(runs.cnn(), augment=Augment(4)), photos, 0)
    with pytest.raises(ValueError, match="no dataset at"):
        start(str(tmp_path / "run"), "test", runs.cnn(), str(tmp_path / "nothing"), 0)
    assert not (tmp_path / "run").exists()


# ---- what is read back


@pytest.mark.parametrize("how", ["flipped", "missing"])
def test_a_damaged_best_checkpoint_is_passed_over_with_a_warning(digits, tmp_path, how):
    run = start(str(tmp_path), "test", runs.cnn(keep=9), digits, 0)
    fit.train(run, HERE, lambda row: None)
    best = checkpoint.best(run.path)
    assert restored(run)[1] == best
    path = tmp_path / "checkpoints" / best.name / "state.pt"
    if how == "missing":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.warns(UserWarning, match=best.name):
        assert restored(run)[1].samples < best.samples
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match=r"no checkpoint that can be read: train it first"):
        restored(run)


def test_a_gan_draws_equal_shares_or_one_class(whole):
    run = open_run(str(whole / "gan"))
    images, name = draw_classes(run, 20)
    assert (len(images), images[0].shape, images[0].dtype) == (20, (16, 16, 1), np.uint8)
    assert name == checkpoint.best(run.path).name
    again, _ = draw_classes(run, 20)
    assert all(np.array_equal(a, b) for a, b in zip(images, again, strict=True))
    assert len(draw_classes(run, 3, label="7")[0]) == 3
    with pytest.raises(ValueError, match="no class 'x'"):
        draw_classes(run, 3, label="x")
    with pytest.raises(ValueError, match="trains a classifier"):
        draw_classes(open_run(str(whole / "cnn")), 3)


def events(path):
    """{tag: steps} of what TensorBoard shows."""
    accumulator = EventAccumulator(path, size_guidance={"scalars": 0})
    accumulator.Reload()
    return {tag: [event.step for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


@pytest.mark.filterwarnings("ignore:checkpoint")
def test_tensorboard_shows_each_step_once_whatever_happened(digits, tmp_path):
    path = str(tmp_path / "run")
    stopped(path, runs.cnn(), digits, 13)
    last = checkpoint.lineage(path)[0].name
    os.truncate(os.path.join(path, "checkpoints", last, "state.pt"), 100)  # its steps come again
    stopped(path, runs.cnn(), digits, 17)
    trained(path, runs.cnn(), digits)
    shown = events(os.path.join(path, "tensorboard"))
    assert shown["loss"] == shown["lr"] == shown["accuracy"] == list(range(64, 1665, 64))
    assert shown["val_accuracy"] == [1664]
    names = {file.removeprefix("events.out.tfevents.") for file in os.listdir(os.path.join(path, "tensorboard"))}
    assert names == set(checkpoint.lineage(path)[0].segments)


def test_the_record_is_complete(whole):
    stored = json.loads((whole / "cnn/config.json").read_text())
    assert stored["preset"] == "test"
    assert {"task", "optim", "loop", "augment", "facts", "data", "generations", "millstream"} <= stored.keys()
    rows = [json.loads(line) for line in (whole / "cnn/metrics.jsonl").read_text().splitlines()]
    assert rows == checkpoint.read_metrics(str(whole / "cnn"))
    assert rows[-1]["samples"] == 1664


@pytest.mark.filterwarnings("ignore:sample set aside")
def test_samples_that_went_bad_are_counted_in_the_result(digits, tmp_path):
    shutil.copytree(digits, tmp_path / "data")
    split = index.load(str(tmp_path / "data")).split("train")
    for row in (3, 800, 1600):
        with open(os.path.join(split.root, split.shards[split.shard[row]]), "r+b") as file:
            file.seek(int(split.offset[row]) + 40)
            file.write(b"\0\1\2\3")
    result = trained(str(tmp_path / "run"), runs.cnn(), str(tmp_path / "data"))
    assert result["metrics"]["quarantined"] == 3
    assert result["samples_seen"] == 1664


def test_run_and_data_on_s3_as_on_disk(digits, whole, s3):
    root = s3.fresh()
    for file in storage.list_files(digits):
        storage.write(storage.join(root, "data", file.path), storage.read(os.path.join(digits, file.path)))
    run = storage.join(root, "run")
    stopped(run, runs.cnn(), storage.join(root, "data"), 12)
    trained(run, runs.cnn(), storage.join(root, "data"))
    assert runs.ends_alike(run, str(whole / "cnn"))
    assert runs.numbers(run) == runs.numbers(str(whole / "cnn"))


@pytest.mark.parametrize("kind", runs.KINDS)
def test_growing_images_are_refused_for_a_model_of_one_size(digits, tmp_path, kind):
    config = runs.KINDS[kind]()
    config = replace(config, augment=replace(config.augment, image_size=32, start_size=16, ramp_to=1))
    with pytest.raises(ValueError, match="--start-size 16: the model takes images of 32 px only"):
        start(str(tmp_path / "run"), "test", config, digits, 0)
    assert not (tmp_path / "run").exists()


SELECTIONS = {
    "half, balanced": Selection(fraction=0.5, balance=True),
    "a fold": Selection(folds=4, fold=1),
}


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
def test_a_run_on_a_part_of_the_samples_is_resumed_alike_and_stands_an_audit(digits, tmp_path, selection):
    config = replace(runs.cnn(checkpoint_every=128), selection=selection)
    whole = trained(str(tmp_path / "whole"), config, digits)
    stopped(str(tmp_path / "stopped"), config, digits, 5)
    trained(str(tmp_path / "stopped"), config, digits)
    assert runs.ends_alike(str(tmp_path / "whole"), str(tmp_path / "stopped"))
    run = open_run(str(tmp_path / "whole"))
    chosen = run.chosen(index.load(digits))
    assert run.config.selection == selection
    assert run.steps() == -(-len(chosen.split) // 64) == whole["samples_seen"] // 64
    assert audit.run(audit.Args(run=str(tmp_path / "stopped")))["holds"]
    with pytest.raises(ValueError, match="selection"):
        start(str(tmp_path / "whole"), "test", runs.cnn(), digits, 0)


def test_a_fold_that_is_held_out_is_what_the_run_is_validated_on(digits, tmp_path, monkeypatch):
    seen, real = [], rank_module.evaluate_rank

    def noted(run, task, split, *more):
        seen.append(split)
        return real(run, task, split, *more)

    monkeypatch.setattr(rank_module, "evaluate_rank", noted)
    config = replace(runs.cnn(), selection=Selection(folds=4, fold=1))
    trained(str(tmp_path / "run"), config, digits)
    train = index.load(digits).split("train")
    chosen = open_run(str(tmp_path / "run")).chosen(index.load(digits))
    assert {len(split) for split in seen} == {len(chosen.held_out)}
    assert len(chosen.split) + len(chosen.held_out) == len(train)


def test_a_run_made_before_there_were_selections_can_still_be_opened(digits, tmp_path):
    start(str(tmp_path / "run"), "test", runs.cnn(), digits, 0)
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    del stored["selection"], stored["augment"]["policy"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(stored))
    assert open_run(str(tmp_path / "run")).config.selection == Selection()


def test_a_run_keeps_to_the_dataset_it_began_with_when_that_grows(tmp_path):
    source, data, path, whole = (str(tmp_path / name) for name in ("in", "data", "run", "whole"))
    recipe = Recipe(samples_per_shard=40, val_fraction=0.2)
    paint(tmp_path / "in", *names("b", "d", end=150))
    build(source, data, recipe, workers=0)
    config = runs.cnn(batch=16, checkpoint_every=64)
    trained(whole, config, data)
    stopped(path, config, data, 7)
    paint(tmp_path / "in", *names("a", "b", start=150, end=200))
    build(source, data, recipe, workers=0)
    grown = index.load(data)
    assert len(grown.info["generations"]) == 2
    assert grown.classes == ("b", "d", "a")
    trained(path, config, data)
    assert runs.ends_alike(path, whole)
    assert runs.numbers(path) == runs.numbers(whole)
    assert audit.main(["--run", path]) == 0
    about = checkpoint.lineage(path)[0].about
    assert about["generations"] == pinned.generations(grown)[:1]
    assert about["config"]["optim"]["lr"] == config.optim.lr
    assert len(pinned.generations(grown)) == 2
    fresh = start(str(tmp_path / "fresh"), "test", config, data, 0)
    assert list(fresh.generations) == pinned.generations(grown)


@pytest.mark.parametrize(("step", "kept"), [(1, "there is no checkpoint yet"), (8, "the last good checkpoint is 0")])
def test_a_loss_that_is_not_finite_names_its_samples_and_the_checkpoint_that_is_good(
    digits, tmp_path, monkeypatch, step, kept
):
    path, real, calls = str(tmp_path / "run"), rank_module.train, []

    def spoiled(config, optim, task, *more):
        loss = task.phases[0].loss

        def poisoned(batch):
            calls.append(batch.rows)
            each, numbers = loss(batch)
            if len(calls) == 2 * step:
                each = each * torch.where(torch.arange(len(each)) == 3, torch.nan, 1.0)
                numbers["loss"] = each.detach().sum()
            return each, numbers

        task.phases[0].loss = poisoned
        return real(config, optim, task, *more)

    monkeypatch.setattr(rank_module, "train", spoiled)
    with pytest.raises(FloatingPointError, match=rf"at step {step} .* {kept}.*--skip-nonfinite") as found:
        trained(path, runs.cnn(), digits)
    key = index.load(digits).split("train").keys[int(calls[-1][3])].as_py()
    assert f"on the samples {key};" in str(found.value)
    calls.clear()
    trained(path, runs.cnn(skip_nonfinite=1), digits)
    rows = checkpoint.read_metrics(path)
    assert [row["step"] for row in rows] == list(range(1, 27))
    assert sum("skipped" in row for row in rows) == 1
    assert checkpoint.newest(path)[1]["skipped"] == 1


def test_a_run_that_has_no_patience_left_is_finished_and_says_so(digits, tmp_path):
    config = runs.cnn(epochs=30, validate_every=64, patience=2)
    run = start(str(tmp_path / "run"), "test", config, digits, 0)
    result = fit.train(run, HERE, lambda row: None)
    accuracies = [row["val_accuracy"] for row in checkpoint.read_metrics(run.path)]
    assert result["early_stop"]
    assert result["samples_seen"] == len(accuracies) * 64 < 700 * 64
    assert max(accuracies[-2:]) <= max(accuracies[:-2])
    assert all(max(accuracies[: at - 2]) < max(accuracies[at - 2 : at]) for at in range(3, len(accuracies)))
    again = fit.train(start(run.path, "test", config, digits, 0), HERE, lambda row: None)
    broken, stop = start(str(tmp_path / "broken"), "test", config, digits, 0), threading.Event()
    last = result["samples_seen"] - 128  # it stops a step later, one validation of the two having gone by
    fit.train(broken, HERE, lambda row: row["samples"] == last and stop.set(), stop=stop)
    assert checkpoint.newest(broken.path)[0].samples == last + 64
    assert fit.train(broken, HERE, lambda row: None)["samples_seen"] == result["samples_seen"]
    assert (again["done"], again["samples_seen"]) == (True, result["samples_seen"])


def test_batch_norm_over_ranks_wants_a_worker_for_each_micro_batch(digits, tmp_path):
    config = replace(runs.cnn(), compute=ComputeConfig(sync_bn=True))
    for workers in (0, 1, "1..2"):
        with pytest.raises(ValueError, match=r"--sync-bn: .* its 2 micro-batches, .* use --workers 2"):
            start(str(tmp_path / "run"), "test", config, digits, workers)
    start(str(tmp_path / "two"), "test", config, digits, 2)
    alone = replace(config, loop=replace(config.loop, micro_batches=1))
    start(str(tmp_path / "one"), "test", alone, digits, 0)
