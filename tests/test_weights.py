"""A published model gives what the run gave, and a run begins where another ended, also with other classes."""

from dataclasses import replace

import numpy as np
import pytest
import runs
import safetensors.torch
import torch
from test_growth import RECIPE, names, paint

from jobs.__main__ import main
from pipeline import registry
from pipeline.shards import index
from pipeline.shards.build import build
from pipeline.training import checkpoint, fit, weights
from pipeline.training.rank import restored
from pipeline.training.resources import Resources
from pipeline.training.run import start

HERE = Resources(workers=0, threads=1)


def trained(path: str, config, data: str):
    opened = start(path, "test", config, data, 0)
    fit.train(opened, HERE, lambda row: None)
    return opened


def published(opened, root: str) -> str:
    task, _ = restored(opened)
    config = opened.config.task
    model = weights.described(config, opened.facts, opened.config.augment)
    version = registry.publish(root, "digits", weights.files(config, task), model, {"lineage": {"data": opened.data}})
    return registry.version_path(root, "digits", version)


@pytest.fixture(scope="module")
def cnn(digits, tmp_path_factory):
    root = tmp_path_factory.mktemp("cnn")
    opened = trained(str(root / "run"), runs.cnn(epochs=2), digits)
    return opened, published(opened, str(root / "models")), str(root / "models")


def test_a_published_classifier_answers_as_the_run_does_to_the_last_bit(cnn, digits):
    opened, path, _ = cnn
    mine, name = fit.evaluate(opened, digits, "val", HERE)
    theirs = fit.evaluate_published(path, digits, "val", HERE)
    assert np.array_equal(mine.confidence, theirs.confidence)
    assert np.array_equal(mine.predicted, theirs.predicted)
    best, other = fit.score(opened, False, [path], digits, [0], "val", HERE)
    assert np.array_equal(best.confidence, other.confidence)
    assert np.array_equal(best.confidence, mine.confidence)
    assert name == checkpoint.best(opened.path).name


def test_the_published_file_is_plain_safetensors_with_the_modules_names(cnn):
    opened, path, _ = cnn
    state = safetensors.torch.load_file(f"{path}/model.safetensors")
    assert state.keys() == opened.task("cpu").modules["model"].state_dict().keys()


def test_a_run_begins_with_the_weights_it_was_given(cnn, digits, tmp_path):
    _, path, root = cnn
    config = replace(runs.cnn(epochs=0.2), init=f"models:{root}/digits@{path.rpartition('/')[2]}")
    opened = start(str(tmp_path / "warm"), "test", config, digits, 0)
    assert opened.init == path
    task = opened.task("cpu")
    weights.begin_from(task, opened.init, config.task, opened.facts, config.optim)
    state = safetensors.torch.load_file(f"{path}/model.safetensors")
    assert all(torch.equal(task.modules[m].state_dict()[k], v) for m in ("model", "average") for k, v in state.items())
    first = []
    fit.train(opened, HERE, lambda row: first.append(row) if "step" in row else None)
    cold = []
    cold_run = start(str(tmp_path / "cold"), "test", runs.cnn(epochs=0.2), digits, 0)
    fit.train(cold_run, HERE, lambda row: cold.append(row) if "step" in row else None)
    assert first[0]["loss"] < 0.8 * cold[0]["loss"]
    again = start(str(tmp_path / "warm"), "test", config, digits, 0)
    assert fit.train(again, HERE, lambda row: None)["done"]
    with pytest.raises(ValueError, match=r"run of another configuration.*init"):
        start(str(tmp_path / "warm"), "test", runs.cnn(epochs=0.2), digits, 0)


def test_a_new_class_gets_a_new_row_and_the_others_keep_theirs(tmp_path):
    root, out = tmp_path / "in", str(tmp_path / "data")
    paint(root, *names("b", "d"))
    build(str(root), out, RECIPE, workers=0)
    config = runs.cnn(epochs=1, validate_every=1 << 40)
    config = replace(config, augment=replace(config.augment, image_size=16))
    opened = trained(str(tmp_path / "old"), config, out)
    path = published(opened, str(tmp_path / "models"))
    paint(root, *names("a"))
    build(str(root), out, RECIPE, workers=0)
    assert index.load(out).classes == ("b", "d", "a")
    grown = start(str(tmp_path / "new"), "test", replace(config, init=path), out, 0)
    task, drawn = grown.task("cpu"), grown.task("cpu")
    weights.begin_from(task, path, config.task, grown.facts, config.optim)
    state = safetensors.torch.load_file(f"{path}/model.safetensors")
    (head,) = [k for k in state if k.endswith("weight") and state[k].shape[0] == 2]
    found = task.modules["model"].state_dict()
    assert torch.equal(found[head][:2], state[head])
    assert torch.equal(found[head][2], drawn.modules["model"].state_dict()[head][2])
    assert all(torch.equal(found[k], v) for k, v in state.items() if not k.startswith(head.rpartition(".")[0]))
    fit.train(grown, HERE, lambda row: None)


def test_weights_that_do_not_fit_are_named(cnn, digits, tmp_path):
    _, path, _ = cnn
    config = runs.cnn()
    larger = replace(config, init=path, augment=replace(config.augment, image_size=24))
    with pytest.raises(ValueError, match="model, image size and channels must be the same"):
        start(str(tmp_path / "a"), "test", larger, digits, 0)
    with pytest.raises(ValueError, match="holds a classify model, not a gan"):
        start(str(tmp_path / "b"), "test", replace(runs.gan(), init=path), digits, 0)
    with pytest.raises(ValueError, match="no published model"):
        start(str(tmp_path / "c"), "test", replace(config, init=str(tmp_path)), digits, 0)
    assert not (tmp_path / "a").exists()


def test_a_gan_is_published_whole_and_gone_on_with(digits, tmp_path):
    opened = trained(str(tmp_path / "gan"), runs.gan(epochs=0.3), digits)
    path = published(opened, str(tmp_path / "models"))
    model = weights.load(path)
    state = checkpoint.newest(opened.path)[1]["task"]["modules"]
    for module in ("average", "discriminator"):
        assert all(torch.equal(model.task.modules[module].state_dict()[k], v) for k, v in state[module].items())
    task = opened.task("cpu")
    weights.begin_from(task, path, opened.config.task, opened.facts, opened.config.optim)
    assert all(torch.equal(task.modules["generator"].state_dict()[k], v) for k, v in state["average"].items())


def test_evaluate_and_sample_take_a_model_by_its_name(cnn, digits, tmp_path, capsys, monkeypatch):
    _, path, root = cnn
    registry.promote(root, "digits", path.rpartition("/")[2], registry.champion(root, "digits"), rule="hand", why="")
    monkeypatch.setenv("MILLSTREAM_MODELS", root)
    assert main(["evaluate", "models:digits@champion", "--workers", "0", "--json"]) == 0
    assert '"samples": 189' in capsys.readouterr().out
    assert main(["evaluate", "models:nobody", "--workers", "0"]) == 2
    assert "nobody has no champion" in " ".join(capsys.readouterr().err.split())
    assert main(["sample", "models:digits", "--out", str(tmp_path / "x.png")]) == 2
    assert "trains a classifier" in " ".join(capsys.readouterr().err.split())
