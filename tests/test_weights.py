"""A published model gives what the run gave, and a run begins where another ended, also with other classes."""

import argparse
import hashlib
import os
import pickle
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
import runs
import safetensors.torch
import torch
from test_growth import RECIPE, names, paint
from test_own import MINE

from jobs.__main__ import main
from pipeline import registry, storage
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
    with pytest.raises(ValueError, match=r"no published model.*no run and no file of weights"):
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


# ---- from another run


def test_a_run_begins_with_the_average_of_another_s_best_checkpoint_and_of_no_other(cnn, digits, tmp_path):
    source = str(tmp_path / "source")
    shutil.copytree(cnn[0].path, source)
    best = checkpoint.best(source)
    average = checkpoint.read_state(source, best)["task"]["modules"]["average"]
    config = replace(runs.cnn(epochs=0.2), init=source)
    opened = start(str(tmp_path / "warm"), "test", config, digits, 0)
    assert opened.init == f"{source}/checkpoints/{best.name}#{best.files['state.pt']['sha256']}"
    for init in (source, f"{source}/checkpoints/{best.name}", opened.init):
        task = opened.task("cpu")
        assert weights.begin_from(task, init, config.task, opened.facts, config.optim) == (opened.init, "")
        for module in ("model", "average"):
            assert all(torch.equal(v, average[k]) for k, v in task.modules[module].state_dict().items())
    later = start(str(tmp_path / "later"), "test", config, digits, 0)
    fit.train(opened, HERE, lambda row: None)
    shutil.rmtree(source)
    assert fit.train(start(opened.path, "test", config, digits, 0), HERE, lambda row: None)["done"]
    with pytest.raises(ValueError, match=f"no checkpoint {best.name} to begin from"):  # it has none of its own yet
        fit.train(start(later.path, "test", config, digits, 0), HERE, lambda row: None)
    again = replace(runs.cnn(epochs=2, seed=6), task=cnn[0].config.task)
    with pytest.raises(ValueError, match="has no checkpoint to begin from: train it first"):
        start(str(tmp_path / "x"), "test", replace(config, init=start(source, "t", again, digits, 0).path), digits, 0)
    fit.train(start(source, "t", again, digits, 0), HERE, lambda row: None)  # another run in its place
    with pytest.raises(ValueError, match=r"is not what it was when the run began|no checkpoint"):
        fit.train(start(later.path, "test", config, digits, 0), HERE, lambda row: None)


def test_a_gan_begins_from_another_s_run(digits, tmp_path):
    opened = trained(str(tmp_path / "gan"), runs.gan(epochs=0.1), digits)
    begun = start(str(tmp_path / "new"), "test", replace(runs.gan(), init=opened.path), digits, 0)
    task, state = begun.task("cpu"), checkpoint.newest(opened.path)[1]["task"]["modules"]
    weights.begin_from(task, begun.init, begun.config.task, begun.facts, begun.config.optim)
    for module, source in (("generator", "average"), ("average", "average"), ("discriminator", "discriminator")):
        assert all(torch.equal(v, state[source][k]) for k, v in task.modules[module].state_dict().items())


# ---- from a file


class Foreign:
    """A model with batch norm, its weights in a file as somebody else would save them, and runs that begin with it."""

    def __init__(self, data, root):
        (root / "mine.py").write_text(MINE)
        self.data, self.root, self.number = data, root, 0
        self.config = replace(runs.cnn(), task=replace(runs.cnn().task, model=f"{root}/mine.py:Net"))
        self.state = start(str(root / "first"), "test", self.config, data, 0).task("cpu").modules["model"].state_dict()
        for value in self.state.values():
            value += 1

    def save(self, name, content):
        path = str(self.root / name)
        safetensors.torch.save_file(content, path) if name.endswith("rs") else torch.save(content, path)
        return path

    def start(self, path, config=None):
        self.number += 1
        config = replace(config or self.config, init=path)
        return start(str(self.root / f"run{self.number}"), "test", config, self.data, 0)

    def begun(self, path):
        opened = self.start(path)
        task = opened.task("cpu")
        weights.begin_from(task, opened.init, opened.config.task, opened.facts, opened.config.optim)
        return {name: module.state_dict() for name, module in task.modules.items()}


@pytest.fixture
def foreign(digits, tmp_path):
    return Foreign(digits, tmp_path)


WRAPPED = {
    "plain.pth": lambda state: state,
    "plain.safetensors": lambda state: state,
    "old.pth": lambda state: {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
    "references.pth": lambda state: {"model": state, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
    "lightning.ckpt": lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}},
    "compiled.pt": lambda state: {"model": {f"_orig_mod.module.{k}": v for k, v in state.items()}},
    "timm.pth": lambda state: {"state_dict": {}, "state_dict_ema": state, "arch": "net"},
    "ema.pth": lambda state: {"model": {}, "model_ema": {"n_averaged": torch.tensor(3)}
                              | {f"module.{k}": v for k, v in state.items()}},
    "half.safetensors": lambda state: {k: v.half() if v.is_floating_point() else v for k, v in state.items()},
}  # fmt: skip


def test_files_of_weights_are_taken_as_others_save_them(foreign):
    for name, wrapped in WRAPPED.items():
        with warnings.catch_warnings(action="error"):
            found = foreign.begun(foreign.save(name, wrapped(foreign.state)))
        close = {"rtol": 1e-3, "atol": 1e-3} if name.startswith("half") else {"rtol": 0, "atol": 0}
        for key, value in foreign.state.items():
            expected = value * 0 if name == "old.pth" and key.endswith("tracked") else value
            for module in ("model", "average"):
                torch.testing.assert_close(found[module][key], expected, **close, msg=f"{name} {key}")


def test_a_head_for_other_classes_starts_anew_and_a_line_says_so(foreign, digits):
    other = foreign.state | {"fc.weight": torch.ones(7, 72), "fc.bias": torch.ones(7)}
    drawn = start(str(foreign.root / "first"), "test", foreign.config, digits, 0).task("cpu").modules["model"]
    for state, rows in ((other, "7 rows"), ({k: v for k, v in other.items() if "fc" not in k}, "not there")):
        path = foreign.save("other.pth", state)
        with pytest.warns(UserWarning, match="the head starts anew") as said:
            found = foreign.begun(path)["model"]
        assert [str(warning.message) for warning in said] == [
            f"fc.bias, fc.weight of {path} ({rows}) do not fit this run's 10 classes: the head starts anew"
        ]
        assert torch.equal(found["fc.weight"], drawn.state_dict()["fc.weight"])
        assert torch.equal(found["conv.weight"], foreign.state["conv.weight"])


def test_a_file_that_does_not_fit_is_refused_with_names_and_shapes(foreign, tmp_path):
    path = foreign.save("colour.pth", foreign.state | {"conv.weight": torch.ones(8, 3, 3, 3)})
    with pytest.raises(ValueError, match=r"conv.weight is \(8, 3, 3, 3\), this run's is \(8, 1, 3, 3\): .*--chann"):
        foreign.start(path)
    path = foreign.save("other.pth", {f"x{i}": torch.ones(i) for i in range(9)})
    said = r"conv.weight \(8, 1, 3, 3\) is missing; .*x0 \(0,\) is unknown to this run's; .*x2.*--model"
    with pytest.raises(ValueError, match=said) as error:
        foreign.start(path)
    assert "x3" not in str(error.value)
    with pytest.raises(ValueError, match="holds a classify model, not a gan"):
        foreign.start(foreign.save("net.pth", foreign.state), runs.gan())


class Mischief:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


@pytest.mark.filterwarnings("ignore:Detected pickle")
def test_nothing_but_tensors_is_read_from_a_file(foreign, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = (tmp_path / "plain.pth", tmp_path / "plain.safetensors")
    for path in whole:
        foreign.save(path.name, foreign.state)
    files = {
        "pickled.pt": (pickle.dumps(Mischief()), "damaged|more than tensors"),
        "cut.pth": (whole[0].read_bytes()[:3000], "is damaged, or no file of weights"),
        "cut.safetensors": (whole[1].read_bytes()[:-9], "is damaged, or no safetensors"),
        "page.html": (b"<html>404</html>", "is damaged, or no file of weights"),
        "empty.pth": (b"", "is damaged, or no file of weights"),
    }
    for name, (content, said) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=said):
            foreign.start(str(tmp_path / name))
    for name, content, said in (
        ("module.pth", torch.nn.Linear(2, 2), r"more than tensors \(torch.nn.modules.linear.Linear\)"),
        ("mischief.pth", {"model": foreign.state, "x": Mischief()}, r"more than tensors \(posix.mkdir\)"),
        ("numbers.pth", {"epoch": 3}, r"no weights by their names \(epoch\)"),
    ):
        with pytest.raises(ValueError, match=said):
            foreign.start(foreign.save(name, content))
    assert not (tmp_path / "unpickled").exists()


def test_a_run_that_has_no_checkpoint_yet_begins_with_the_same_file_or_not_at_all(foreign, s3):
    path = f"{s3.fresh()}/net.safetensors"
    content = safetensors.torch.save(foreign.state)
    storage.write(path, content)
    opened = foreign.start(path)
    assert opened.init == f"{path}#{hashlib.sha256(content).hexdigest()}"
    storage.write(path, safetensors.torch.save(foreign.state | {"fc.bias": torch.zeros(10)}))
    again = start(opened.path, "test", replace(foreign.config, init=path), foreign.data, 0)
    with pytest.raises(ValueError, match="is not what it was when the run began"):
        fit.train(again, HERE, lambda row: None)
    storage.write(path, content)
    fit.train(again, HERE, lambda row: None)
    storage.delete(path)
    again = start(opened.path, "test", replace(foreign.config, init=path), foreign.data, 0)
    assert fit.train(again, HERE, lambda row: None)["done"]


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
