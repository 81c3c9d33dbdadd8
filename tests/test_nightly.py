"""The nightly on real images: shards, verdicts, training, scores and promotion by the verb, as people run it."""

import dataclasses
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from jobs import demo_nights, nights, presets
from jobs.__main__ import main
from pipeline import registry, storage
from pipeline.evaluation import report
from pipeline.nightly import config as nightly
from pipeline.nightly import holdout, record, stages, verdicts
from pipeline.shards import index
from pipeline.sources.digits import digit_images
from pipeline.training import checkpoint, fit, weights
from pipeline.training.run import open_run

BASE = {
    "name": "digits",
    "source": "folder:raw",
    "root": "lake",
    "preset": "digits_cnn",
    "train": {"validate_every": 1000000, "image_size": 16, "crop": "none", "ema_half_life": 200},
    "shard": {"format": "png", "samples_per_shard": 300},
    "samples": 1600,
    "holdout": "test",
    "resources": {"workers": 0, "threads": 1},
}


class Nightly:
    """A configuration on disk, its raw images, and the verb."""

    def __init__(self, folder, capsys):
        self.folder, self.capsys, self.path = folder, capsys, str(folder / "nightly.yaml")
        # In their own order they come writer by writer, which is a drift.
        self.images, self.labels = (each[np.random.default_rng(0).permutation(1797)] for each in digit_images())
        self.held_out = np.arange(len(self.images)) % 5 == 0
        self.write()

    def write(self, **changes) -> None:
        text = yaml.safe_dump(BASE | changes)
        storage.write(self.path, text.encode())
        self.config = nightly.load(self.path)

    def arrive(self, split: str, rows, shift: int = 0, look=lambda image: image) -> None:
        for row in rows:
            label = (self.labels[row] + shift) % 10
            path = self.folder / "raw" / split / str(label) / f"{row:04d}-{shift}.png"
            storage.write(str(path), report.png(look(self.images[row])))

    def first(self, images: int = 150) -> None:
        self.arrive("test", np.flatnonzero(self.held_out))
        self.arrive("train", np.flatnonzero(~self.held_out)[:images])

    def more(self, start: int, end: int, **how) -> None:
        self.arrive("train", np.flatnonzero(~self.held_out)[start:end], **how)

    def __call__(self, *words, code: int = 0) -> dict:
        self.capsys.readouterr()
        found = main(["nightly", self.path, *map(str, words), "--json"])
        out, self.said = self.capsys.readouterr()
        assert found == code, self.said
        return json.loads(out) if out else {}

    def champion(self) -> registry.Champion:
        return registry.champion(self.config.registry, "digits")


@pytest.fixture
def night(tmp_path, capsys):
    return Nightly(tmp_path, capsys)


def test_nights_promote_what_is_better_reject_what_is_worse_and_skip_what_is_old(night):
    night.first()
    one = night("--tick", "1")
    assert (one["outcome"], one["stages"]["score"]["decision"]["rule"]) == ("promoted", "floors")
    assert "the first model" in one["reason"]
    night.more(150, 1000)
    two = night("--tick", "2")
    assert two["outcome"] == "promoted", two["reason"]
    assert two["stages"]["train"]["init"].endswith(one["stages"]["publish"]["version"])
    opened = open_run(two["stages"]["train"]["run"])
    assert opened.config.selection.recent == 0.5  # half of what is drawn is new, half replays what was there
    night.more(1000, 1400, shift=3)
    three = night("--tick", "3")
    assert three["outcome"] == "rejected"
    assert "wins" in three["reason"]
    assert night.champion().version == two["stages"]["promote"]["version"]
    before = storage.list_files(night.config.data)
    night.write(resources={"workers": 2})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nights, "ray_session", None)  # what is called would fail
        four = night("--tick", "4")
    night.write()
    assert (four["outcome"], four["reason"]) == ("skipped", "no new data since 3")
    assert four["stages"].keys() == {"fresh"}
    assert storage.list_files(night.config.data) == before
    assert four["seconds"] < 10  # the bar of the issue, and fifty times what it takes
    assert night("--tick", "4")["done"]
    # What it looked at is what was frozen first, and each look was counted.
    frozen = holdout.read(night.config.root)
    assert (frozen.samples, frozen.looks) == (360, ("1", "2", "3"))
    pages = {file.path for file in storage.list_files(storage.join(night.config.root, "nights"))}
    assert {"index.html", "1.html", "2.html", "3.html", "4.html"} <= pages
    page = storage.read(storage.join(night.config.root, "nights", "3.html")).decode()
    assert "rejected" in page
    assert "New data" in page
    # and people can take it back
    assert main(["models", "rollback", "digits", "--models", night.config.registry, "--why", "try"]) == 0
    assert night.champion().version == one["stages"]["promote"]["version"]
    night.write(train=BASE["train"], max_age_days=1e-9)
    assert night("--tick", "5")["outcome"] in ("promoted", "rejected")  # the last training has aged
    assert night.champion().blocked == (two["stages"]["promote"]["version"],)


def test_data_of_another_kind_is_held_until_people_let_it_in(night):
    night.first(400)
    night("--tick", "1")
    night.more(400, 700, look=lambda image: image // 4)
    night.write(notify_on=["held"])
    real, given = record.Record.mark, []

    def killed(self, stage, *results, **more):
        if stage == "data" and not given:
            given.append(verdicts.read(night.config.root)[1]["verdict"])
            raise KeyboardInterrupt
        return real(self, stage, *results, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record.Record, "mark", killed)
        night("--tick", "2", code=130)
    assert given == ["held"]  # killed between the verdict and its note: the reason is found again
    two = night("--tick", "2")
    assert two["outcome"] == "skipped"
    assert "generation 1 is held" in two["reason"]
    assert "brightness" in two["reason"]
    assert verdicts.accepted(night.config.root) == [0]
    three = night("--tick", "3")
    assert (three["outcome"], three["reason"]) == ("skipped", "no new data since 1; generation 1 is held")
    assert night("--accept", 1) == {"verdicts": {"0": "accepted", "1": "accepted"}}
    four = night("--tick", "4")
    assert four["stages"]["data"]["generations"] == [0, 1]
    assert four["outcome"] in ("promoted", "rejected")
    assert night("--hold", 1)["verdicts"]["1"] == "held"
    night.more(700, 800)
    assert night("--tick", "5")["stages"]["data"]["generations"] == [0, 2]  # what is held in between is left out
    assert night("--accept", 7, code=2) == {}
    assert "no generation 7" in night.said


def test_a_night_killed_while_it_trains_goes_on_from_its_checkpoint(night, monkeypatch):
    night.write(train=BASE["train"] | {"checkpoint_every": 320})
    night.first()
    real = fit.train

    def dying(opened, resources, report, **more):
        def row(values):
            if values.get("step") == 12:
                raise KeyboardInterrupt
            report(values)

        return real(opened, resources, row, **more)

    monkeypatch.setattr(fit, "train", dying)
    night("--tick", "1", code=130)
    monkeypatch.setattr(fit, "train", real)
    ended = night("--tick", "1")
    assert ended["outcome"] == "promoted"
    attempts = [f.path for f in storage.list_files(storage.join(ended["stages"]["train"]["run"], "attempts"))]
    assert attempts == ["000001.json", "000002.json"]
    assert record.read(night.config.root, "1")["attempts"] == 2


def test_a_published_model_that_answers_otherwise_is_not_promoted(night, monkeypatch):
    night.first()
    real = weights.files

    def spoiled(config, task):
        with torch.no_grad():
            for parameter in task.modules["average"].parameters():
                parameter.add_(0.05)
        return real(config, task)

    monkeypatch.setattr(stages.weights, "files", spoiled)
    ended = night("--tick", "1", code=1)
    assert ended["outcome"] == "failed"
    assert "does not answer as the run did" in ended["reason"]
    assert night.champion().version is None


def test_limits_and_floors_hold_a_model_back(night):
    night.first()
    night.write(gate={"floor": 0.999, "max_mb": 0.001, "max_latency_ms": 1000})
    ended = night("--tick", "1")
    assert ended["outcome"] == "rejected"
    checks = {check["name"]: check["passed"] for check in ended["stages"]["score"]["decision"]["checks"]}
    assert checks == {"accuracy": False, "recall of each class": True, "size": False, "latency": True}
    assert night.champion().version is None


def test_a_champion_that_counts_its_classes_otherwise_is_compared_by_their_names(night):
    night.first(600)
    one = night("--tick", "1")
    path = registry.version_path(night.config.registry, "digits", one["stages"]["promote"]["version"])
    model, found = registry.describe(path)["model"], weights.load(path)
    turned = [*model["facts"]["classes"][3:], *model["facts"]["classes"][:3]]
    with torch.no_grad():
        for module in found.task.modules.values():
            for parameter in list(module.parameters())[-2:]:
                parameter.copy_(parameter.roll(-3, 0))
    other = registry.publish(night.config.registry, "digits", weights.files(found.config, found.task),
                             model | {"facts": model["facts"] | {"classes": turned}}, {})  # fmt: skip
    registry.promote(night.config.registry, "digits", other, night.champion(), rule="hand", why="")
    night.write(samples=64, warm_start=False)
    numbers = night("--tick", "2", "--force")["stages"]["score"]["decision"]["numbers"]
    assert numbers["champion_accuracy"] == one["stages"]["score"]["decision"]["numbers"]["accuracy"]


def test_a_gan_is_retrained_and_judged_by_kid(night):
    night.write(preset="digits_gan", train={"width": 8, "latent": 16, "image_size": 16}, samples=640)
    night.first(400)
    one = night("--tick", "1")
    assert one["outcome"] == "promoted", one["reason"]
    assert "KID" in one["reason"]
    night.more(400, 500)
    night.write(preset="digits_gan", train={"width": 8, "latent": 16, "image_size": 16, "lr": 1e-9}, samples=64)
    two = night("--tick", "2")
    assert two["outcome"] == "rejected", two["reason"]  # nothing was learned
    assert two["stages"]["score"]["decision"]["numbers"]["champion_kid"] is not None
    named = f"models:{night.config.registry}/digits"
    assert main(["sample", named, "--out", str(night.folder / "grid.png")]) == 0
    assert Image.open(night.folder / "grid.png").size[0] > 16


def test_a_holdout_that_was_tampered_with_is_refused_until_it_is_frozen_anew(night):
    night.first()
    night("--tick", "1")
    next((night.folder / "raw" / "test" / "3").iterdir()).unlink()
    night.more(150, 300)
    night.write(prune=True)
    ended = night("--tick", "2", code=2)
    assert ended["outcome"] == "failed"
    assert "360 samples then, 359 now" in ended["reason"]
    night("--freeze")
    assert night("--tick", "2")["outcome"] in ("promoted", "rejected")
    assert holdout.read(night.config.root).looks == ("2",)


def test_changed_items_are_a_mistake_that_says_what_to_do(night):
    night.first()
    night("--tick", "1")
    path = next((night.folder / "raw" / "train" / "3").iterdir())
    Image.new("L", (32, 32), 9).save(path)
    ended = night("--tick", "2", code=2)
    assert "1 items changed under their names" in ended["reason"]
    assert "prune: true" in ended["reason"]


def test_few_new_items_wait_for_more_and_a_holdout_of_val_chooses_no_checkpoint(night):
    night.write(holdout="val", train=BASE["train"] | {"checkpoint_every": 640, "keep": 5})
    night.first(300)
    one = night("--tick", "1")["stages"]
    chain = checkpoint.lineage(one["train"]["run"])
    assert len(chain) > 1
    assert one["score"]["checkpoint"] == chain[0].name  # validated on the same images, the best would be theirs
    assert 20 < one["score"]["samples"] < 50
    night.more(300, 305)
    night.write(min_new=10, holdout="val")
    assert night("--tick", "2")["reason"] == "5 new items, and min_new is 10: they wait for more"
    assert len(index.load(night.config.data).info["generations"]) == 1


def test_those_who_want_to_know_are_told_once_and_tokens_stay_in_the_environment(night, monkeypatch):
    told = []

    class Ear(BaseHTTPRequestHandler):
        def do_POST(self):
            told.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Ear) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        night.first()
        night.write(notify=[f"json://127.0.0.1:{server.server_port}/${{MS_TOKEN}}"], notify_on=["promoted"])
        assert night("--tick", "1")["outcome"] == "promoted"
        assert "warning: tell: notify wants MS_TOKEN from the environment" in night.said
        monkeypatch.setenv("MS_TOKEN", "s3cret")
        for _ in range(2):
            assert night("--tick", "1")["done"]
        server.shutdown()
    assert [path for path, _ in told] == ["/s3cret"]
    assert told[0][1]["title"] == "digits: promoted (1)"
    assert "the first model" in told[0][1]["message"]
    assert "s3cret" not in night.said


def test_promotions_are_mirrored_to_mlflow(night, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    night.first()
    night.write(mlflow=True)
    version = night("--tick", "1")["stages"]["promote"]["version"]
    assert "warning" not in night.said
    found = MlflowClient().get_model_version_by_alias("digits", "champion")
    assert found.tags["millstream"] == version


def test_runs_of_older_nights_go_and_what_was_promoted_stays(night):
    night.first()
    night.write(keep_runs=1)
    night("--tick", "1")
    night.more(150, 300)
    night("--tick", "2")
    runs = {file.path.partition("/")[0] for file in storage.list_files(storage.join(night.config.root, "runs"))}
    assert runs == {"2"}
    assert night.champion().version


def test_a_dry_run_says_what_is_new_and_writes_nothing(night):
    night.first()
    found = night("--dry-run")
    assert (found["samples"], found["champion"], found["outcome"]) == (510, None, None)
    assert not (night.folder / "lake").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scedule": "0 2 * * *"}, "no key 'scedule': did you mean 'schedule'?"),
        ({"gate": {"alhpa": 0.1}}, "gate: no key 'alhpa': did you mean 'alpha'?"),
        ({"gate": {"alpha": 3}}, "alpha is 3"),
        ({"gate": {"floor": "high"}}, "gate.floor: Input should be a valid number"),
        ({"preset": "digit_cnn"}, "did you mean 'digits_cnn'?"),
        ({"train": {"epoks": 3}}, "train: no key 'epoks': did you mean 'epochs'?"),
        ({"train": {"lr": "fast"}}, "train: lr: Input should be a valid number"),
        ({"train": {"lr": -1}}, "lr -1.0 must be above 0"),
        ({"holdout": "train"}, "holdout 'train'"),
        ({"schedule": "0 2 * *"}, "0 2 * *"),
        ({"schedule": "0 2 * * *", "timezone": "Europe/Berlni"}, "Europe/Berlin"),
        ({"source": None}, "source: Input should be a valid string"),
        ({"name": "a/b"}, "name 'a/b'"),
        ({"recent": 1}, "recent 1"),
        ({"notify_on": ["never"]}, "notify_on 'never'"),
        ({"resources": {"workers": "many"}}, "workers 'many'"),
        ({"holdout": "nosuch"}, "holdout 'nosuch'"),
    ],
)
def test_each_mistake_in_the_file_is_one_line_that_names_it(tmp_path, capsys, change, said):
    Image.new("L", (32, 32)).save(folder_of(tmp_path, "0") / "a.png")
    Image.new("L", (32, 32)).save(folder_of(tmp_path, "1") / "b.png")
    (tmp_path / "n.yaml").write_text(yaml.safe_dump(BASE | change))
    assert main(["nightly", str(tmp_path / "n.yaml"), "--tick", "1"]) == 2
    err = capsys.readouterr().err
    assert said in " ".join(err.split())
    assert "Traceback" not in err


def folder_of(root, label: str):
    folder = root / "raw" / label
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: b: c", "\x00"])
def test_a_file_that_is_no_configuration_is_one_line(tmp_path, capsys, text):
    (tmp_path / "n.yaml").write_text(text)
    assert main(["nightly", str(tmp_path / "n.yaml")]) == 2
    assert main(["nightly", str(tmp_path / "nosuch.yaml")]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_an_empty_source_is_a_mistake(night):
    (night.folder / "raw").mkdir()
    assert night("--tick", "1", code=2)["outcome"] == "failed"


def test_every_field_of_the_configuration_can_be_written_down(tmp_path, monkeypatch):
    """What `load` gives, written as YAML, gives the same again."""
    storage.write(str(tmp_path / "n.yaml"), yaml.safe_dump(BASE | {"schedule": "0 2 * * *"}).encode())
    one = nightly.load(str(tmp_path / "n.yaml"))
    plain = json.loads(json.dumps(dataclasses.asdict(one)))
    storage.write(str(tmp_path / "again.yaml"), yaml.safe_dump(plain).encode())
    assert nightly.load(str(tmp_path / "again.yaml")) == one
    assert one.source == f"folder:{tmp_path}/raw"


def test_the_configuration_in_the_readme_is_one(tmp_path):
    text = (Path(__file__).parents[1] / "README.md").read_text()
    storage.write(str(tmp_path / "n.yaml"), text.partition("```yaml\n")[2].partition("```")[0].encode())
    config = nightly.load(str(tmp_path / "n.yaml"))
    assert nightly.changed(presets.get(config.preset), config.train).augment.crop == "resized"


def test_models_lists_shows_promotes_and_tells_the_history(night, capsys, monkeypatch):
    night.first()
    night("--tick", "1")
    monkeypatch.setenv("MILLSTREAM_MODELS", night.config.registry)
    run = open_run(night.config.run_path("1")).path

    def models(*words, code=0) -> dict:
        capsys.readouterr()
        assert main(["models", *words, "--json"]) == code
        out, models.said = capsys.readouterr()
        return json.loads(out) if out else {}

    first = night.champion().version
    assert models("list")["models"]["digits"] | {"since": ""} == {"champion": first, "since": "", "versions": 1}
    assert models("publish", "digits", run)["version"] == first  # the same weights are the same version
    monkeypatch.chdir(night.folder)
    other = registry.publish(night.config.registry, "digits", {"weights": b"x"}, {}, {})
    assert models("promote", "digits", other, "--why", "I say so")["previous"] == first
    shown = {row["version"]: row["marks"] for row in models("list", "digits")["versions"]}
    assert shown == {other: ["champion"], first: ["previous"]}
    assert models("rollback", "digits")["version"] == first
    assert [entry["action"] for entry in models("history", "digits")["history"]] == ["rollback", "promote", "promote"]
    assert models("show", "digits")["lineage"]["night"] == "1"
    assert models("pin", "digits", other)["pinned"] == {other: "pinned by hand"}
    assert models("unpin", "digits", other)["pinned"] == {}
    models("promote", "digits", other, code=2)
    assert "was rolled back, and is blocked" in models.said
    for what in ("show", "list", "history", "rollback"):
        models(what, "nobody", code=2)
        assert "no model 'nobody'" in models.said
        assert "there are digits" in " ".join(models.said.split())
    models("promote", "digits", code=2)
    assert "millstream models promote NAME VERSION" in models.said
    models("lsit", code=2)
    monkeypatch.delenv("MILLSTREAM_MODELS")
    models("list", code=2)
    assert "MILLSTREAM_MODELS" in models.said


@pytest.mark.slow
def test_the_demo_of_four_nights_ends_as_it_says(tmp_path, capsys):
    assert main(["demo", "--nightly", "--out", str(tmp_path), "--workers", "0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [night["outcome"] for night in found["nights"]] == ["promoted", "promoted", "rejected", "skipped"]
    assert all(night["reason"] for night in found["nights"])
    assert len(demo_nights.NIGHTS) == 4
