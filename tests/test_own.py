"""A preset and a model in a file of the user's own: run from RUN/code, known by its content, never from a stranger."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import runs
import torch

from jobs import presets
from jobs.__main__ import main
from pipeline import registry, storage
from pipeline.nightly import config as nightly
from pipeline.training import fit, own, weights
from pipeline.training.rank import restored
from pipeline.training.resources import Resources
from pipeline.training.run import open_run, start

HERE = Resources(workers=0, threads=1)
MINE = """
from dataclasses import dataclass
import torch
from torch import nn
from pipeline.loading.augment import Augment
from pipeline.training.cadence import LoopConfig
from pipeline.training.run import TrainConfig
from pipeline.training.tasks import ClassifyConfig

@dataclass
class Shape:
    width: int = 8

class Net(nn.Module):
    def __init__(self, channels, image_size, classes):
        super().__init__()
        width = Shape().width
        self.conv, self.norm = nn.Conv2d(channels, width, 3, 2), nn.BatchNorm2d(width)
        self.drop, self.fc = nn.Dropout(0.2), nn.Linear(width * 9, classes)

    def forward(self, images):
        maps = torch.relu(self.norm(self.conv(images)))
        return self.fc(self.drop(nn.functional.adaptive_avg_pool2d(maps, 3).flatten(1)))

def lazy(channels, image_size, classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))

def my_run():
    loop = LoopConfig(epochs=0.4, batch=64, micro_batches=2, checkpoint_every=192)
    return TrainConfig(ClassifyConfig(model="mine.py:Net", ema_half_life=300), loop=loop, augment=Augment(16))
"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """As in a process that has run nobody's code; call it to begin another."""

    def begin():
        monkeypatch.setattr(own, "_loaded", {})

    monkeypatch.delenv(own.TRUST, raising=False)
    begin()
    return begin


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path / "mine.py"


def begun(out, data, spec="./mine.py:my_run"):
    return start(str(out), spec, presets.get(spec), data, 0)


class Stop(Exception):
    pass


def stop_at(step):
    def report(row):
        if row.get("step") == step:
            raise Stop

    return report


def test_a_run_of_a_model_of_ones_own_goes_on_elsewhere_and_ends_as_one_never_broken(mine, digits, tmp_path, fresh):
    fit.train(begun(tmp_path / "whole", digits), HERE, lambda row: None)
    with pytest.raises(Stop):
        fit.train(begun(tmp_path / "run", digits), HERE, stop_at(5))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    mine.rename(elsewhere / "mine.py")
    fresh()
    with pytest.raises(Stop):  # without the file: another node, or a command that names the run alone
        fit.train(open_run(str(tmp_path / "run")), HERE, stop_at(8))
    fresh()
    result = fit.train(begun(tmp_path / "run", digits, f"{elsewhere}/mine.py:my_run"), HERE, lambda row: None)
    assert result["samples_seen"] == 704
    assert runs.ends_alike(str(tmp_path / "run"), str(tmp_path / "whole"))
    stored = json.loads((tmp_path / "run/config.json").read_text())
    assert stored["task"]["model"] == "mine.py:Net"
    assert (tmp_path / "run/code/mine.py").read_text() == MINE


def test_its_file_is_kept_with_the_run_wherever_that_is(mine, digits, place, fresh):
    opened = begun(f"{place}/run", digits)
    expected = opened.task("cpu").modules["model"].state_dict()
    assert storage.read(f"{place}/run/code/mine.py").decode() == MINE
    mine.unlink()
    fresh()
    found = open_run(opened.path).task("cpu")
    assert all(torch.equal(value, expected[name]) for name, value in found.modules["model"].state_dict().items())
    fresh()
    storage.write(f"{place}/run/code/mine.py", b"raise SystemExit('not this')")
    with pytest.raises(ValueError, match=r"code/mine.py was changed"):
        open_run(opened.path).task("cpu")
    storage.delete(f"{place}/run/code/mine.py")
    with pytest.raises(ValueError, match=r"code/mine.py is missing"):
        open_run(opened.path).task("cpu")


def test_another_file_is_another_configuration(mine, digits, tmp_path):
    begun(tmp_path / "run", digits)
    os.remove(tmp_path / "run/code/mine.py")
    assert begun(tmp_path / "run", digits).code == open_run(str(tmp_path / "run")).code
    assert (tmp_path / "run/code/mine.py").exists()  # as after a kill between the two
    mine.write_text(MINE + "# another\n")
    with pytest.raises(ValueError, match=r"mine.py is not the file that this run began with, .*another --out"):
        begun(tmp_path / "run", digits)
    mine.write_text(MINE.replace("epochs=0.4", "epochs=3"))
    with pytest.raises(ValueError, match=r"another configuration .*loop.epochs 0.4 -> 3.*code"):
        begun(tmp_path / "run", digits)
    assert (tmp_path / "run/code/mine.py").read_text() == MINE


def test_two_versions_of_a_file_in_one_process_do_not_mix(mine, digits, tmp_path):
    old = begun(tmp_path / "old", digits)
    mine.write_text(MINE.replace("width: int = 8", "width: int = 4"))
    new = begun(tmp_path / "new", digits)
    widths = [len(run.task("cpu").modules["model"].conv.bias) for run in (old, new, old)]
    assert widths == [8, 4, 8]


def test_a_model_serves_any_preset_and_names_are_meant_from_their_folder(mine, digits, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for number, model in enumerate(("mine.py:lazy", "~/mine.py:Net", f"{mine}:Net")):
        config = replace(runs.cnn(), task=replace(runs.cnn().task, model=model))
        opened = start(str(tmp_path / f"run{number}"), "test", config, digits, 0)
        assert opened.config.task.model == f"mine.py:{model.rpartition(':')[2]}"
    monkeypatch.chdir("/")
    assert presets.get(f"{mine}:my_run").task.model == f"{mine}:Net"
    for asked, meant in (("../mine.py:my_run", f"{mine}:my_run"), ("digits_cnn", "digits_cnn")):
        text = f"{{name: a, source: 'digits:', root: out, preset: '{asked}'}}"
        storage.write(str(tmp_path / "conf/n.yaml"), text.encode())
        assert nightly.load(str(tmp_path / "conf/n.yaml")).preset == meant


PRESETS = {
    "no such file": (None, "run", r"there is no file .*/mine\.py$"),
    "a near name": ("def my_run(): pass", "my_rn", r"mine\.py has no 'my_rn', .*did you mean mine\.py:my_run\?"),
    "no name": ("import os\ndef a(): pass\ndef b(): pass", "", r"mine\.py: say which of it, .*there are a, b$"),
    "arguments": ("def run(lr, *rest, b=1): pass", "run", r"mine\.py:run wants arguments \(lr\)"),
    "something else": ("def run(): return 3", "run", r"mine\.py:run returns a int: a TrainConfig is wanted"),
    "a syntax error": ("x = 1\ny = (", "run", r"mine\.py:2: .*never closed"),
    "an import": ("\nimport nosuch", "run", r"mine\.py:2: ModuleNotFoundError: .*must be installed"),
    "a failure": ("def run():\n  return 1 / 0", "run", r"mine\.py:2: ZeroDivisionError: division by zero"),
    "an exit": ("raise SystemExit(3)", "run", r"mine\.py:1: SystemExit: 3"),
    "a wrong value": ("from pipeline.training.optim import OptimConfig as O\ndef run(): return O(lr=0)", "run",
                      r"mine\.py:2: ValueError: lr 0 must be above 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", PRESETS)
def test_what_is_wrong_with_a_file_is_one_line_with_its_place(mine, capsys, case):
    content, name, said = PRESETS[case]
    mine.unlink() if content is None else mine.write_text(content)
    assert main(["train", f"./mine.py:{name}" if name else "./mine.py", "--data", "d", "--out", "o"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(said, line.removeprefix("error: "))


MODELS = {
    "no module": ("def f(channels, image_size, classes): return 3", r"mine\.py:f gives a int: an nn\.Module is wanted"),
    "another call": ("def f(): pass", r"mine\.py:f: TypeError: f\(\) got an unexpected keyword argument 'channels'"),
    "another answer": ("from torch import nn\ndef f(channels, image_size, classes): return nn.Flatten()",
                       r"answers images \(2, 1, 16, 16\) with \(2, 256\): \(n, classes\) is wanted, \(2, 10\)"),
    "another answer in training": (
        "from torch import nn\nclass f(nn.Module):\n  def __init__(self, **k): \n    super().__init__()\n"
        "    self.a = nn.Linear(16, 10)\n  def forward(self, x): x = self.a(x[:, 0, 0]); "
        "return (x, x) if self.training else x",
        r"mine\.py:f answers images .* with a tuple"),
    "a failure": ("from torch import nn\nclass f(nn.Module):\n  def __init__(self, **k): super().__init__()\n"
                  "  def forward(self, x): return x @ x[:, :, 1:]", r"mine\.py:4: RuntimeError: .*f was given images"),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_what_is_no_classifier_is_said_before_anything_is_written(mine, digits, tmp_path, case):
    mine.write_text(MODELS[case][0])
    config = replace(runs.cnn(), task=replace(runs.cnn().task, model="mine.py:f"))
    with pytest.raises(ValueError, match=MODELS[case][1]):
        start(str(tmp_path / "run"), "test", config, digits, 0)
    assert not (tmp_path / "run").exists()


def test_a_published_model_s_code_is_run_only_for_whom_it_is_known_to(mine, digits, tmp_path, fresh, monkeypatch):
    opened = begun(tmp_path / "run", digits)
    fit.train(opened, HERE, lambda row: None)
    task, _ = restored(opened)
    content, root = weights.files(opened.config.task, task), str(tmp_path / "models")
    assert content["code/mine.py"].decode() == MINE
    about = weights.described(opened.config.task, opened.facts, opened.config.augment)
    path = registry.version_path(root, "m", registry.publish(root, "m", content, about, {}))
    known = own.variables()
    fresh()
    shutil.move(tmp_path / "run", tmp_path / "moved")
    for words in ("", "0" * 12, opened.code[:11]):
        monkeypatch.setenv(own.TRUST, words)
        with pytest.raises(ValueError, match=rf"code/mine.py, which nobody.*{own.TRUST}={opened.code[:12]}"):
            weights.load(path)
    assert not own._loaded
    for words in ("1", opened.code[:12].upper(), f"{'0' * 64}, {opened.code}", known[own.TRUST]):
        fresh()
        monkeypatch.setenv(own.TRUST, words)
        model = weights.load(path)
        state = model.task.modules["average"].state_dict()
        assert all(torch.equal(state[k], v) for k, v in task.modules["average"].state_dict().items())
    fresh()
    monkeypatch.delenv(own.TRUST)
    presets.get("./mine.py:my_run")  # as a nightly is given it
    assert weights.load(path).config.model == "mine.py:Net"
    fresh()
    config = replace(runs.cnn(), task=replace(runs.cnn().task, model="cnn"), init=path)
    with pytest.raises(ValueError, match="weights of another model"):  # which are looked at without its code
        start(str(tmp_path / "warm"), "test", config, digits, 0)
    assert not own._loaded


def test_train_shows_the_fields_of_ones_own_preset_and_how_to_name_one(mine, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "./mine.py:my_run", "--help"])
    assert ended.value.code == 0
    assert "--ema-half-life" in capsys.readouterr().out
    assert main(["train"]) == 2
    assert "train ./mine.py:my_run" in capsys.readouterr().err
    assert main(["train", "nosuch.pi:x", "--data", "d", "--out", "o"]) == 2
    assert "no preset 'nosuch.pi:x'" in capsys.readouterr().err


def test_the_file_in_the_readme_trains_and_is_scored_without_it(mine, digits, tmp_path, fresh, capsys):
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "(nn.Module)" in block]
    mine.write_text(code)
    words = ["--data", digits, "--out", str(tmp_path / "run"), "--workers", "0", "--threads", "1", "--json"]
    assert main(["train", "./mine.py:my_run", *words, "--epochs", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["val_accuracy"] > 0.4
    mine.unlink()
    fresh()
    assert main(["evaluate", str(tmp_path / "run"), "--workers", "0", "--threads", "1"]) == 0
