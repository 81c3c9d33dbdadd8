"""The command line: what people and programs see, and one clear line with an honest exit code for every mistake."""

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from s3_server import wait_for

from jobs.__main__ import VERBS, main
from pipeline.training import checkpoint

SHORT = ["--epochs", "0.2", "--workers", "0"]


@pytest.fixture(scope="module")
def classifier(digits, tmp_path_factory):
    run = str(tmp_path_factory.mktemp("runs") / "cnn")
    assert main(["train", "digits_cnn", "--data", str(digits), "--out", run, *SHORT]) == 0
    return run


@pytest.fixture(scope="module")
def gan(digits, tmp_path_factory):
    run = str(tmp_path_factory.mktemp("runs") / "gan")
    assert main(["train", "digits_gan", "--data", str(digits), "--out", run, *SHORT]) == 0
    return run


def picture(path, colour=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 24), (colour % 256, 30, 200)).save(path)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(cli, verb):
    code, out, err = cli(verb, "--help")
    assert code == 0
    assert "usage: millstream" in out + err or "millstream bench" in err


def test_a_preset_explains_its_fields_with_its_own_values(cli):
    code, out, _ = cli("train", "fashion_cnn", "--help")
    assert code == 0
    assert "(default: 128)" in out
    assert "--label-smoothing" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["shrad"], "did you mean 'shard'"),
        (["train", "digits_cn", "--data", "d", "--out", "r"], "did you mean 'digits_cnn'"),
        (["train", "digits_cnn", "--data", "d", "--out", "r", "--epoch", "3"], "--epochs"),
        (["shard", "digits:", "out", "--qualty", "80"], "--quality"),
        (["bench", "trian"], "did you mean 'train'"),
        (["shard", "fodler:x", "out"], "folder"),
    ],
)
def test_a_mistyped_word_names_the_nearest_known_one(cli, words, said):
    code, out, err = cli(*words)
    assert code == 2
    assert said in err
    assert not out


def test_mistakes_about_sources_are_one_line(cli, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    picture(tmp_path / "flat" / "a.png")
    for source, said in [
        ("folder:/no/such/place", "/no/such/place"),
        (f"folder:{tmp_path}/empty", "empty"),
        (f"folder:{tmp_path}/flat", "--labels none"),
        (f"idx:{tmp_path}/empty", "idx"),
    ]:
        code, _, err = cli("shard", source, out, "--workers", "0")
        assert code == 2, source
        assert said in err
        assert "Traceback" not in err
        assert not out.exists() or not list(out.iterdir())
    for option, value in [
        ("--quality", "0"),
        ("--val-fraction", "1.5"),
        ("--samples-per-shard", "0"),
        ("--size", "-4"),
    ]:
        code, _, err = cli("shard", "digits:", out, option, value, "--workers", "0")
        assert code == 2
        assert value in err


def test_a_flat_folder_without_labels_serves_a_gan_and_refuses_a_classifier(cli, tmp_path):
    for i in range(40):
        picture(tmp_path / "flat" / f"{i}.png", i * 5)
    data = tmp_path / "data"
    assert cli("shard", f"folder:{tmp_path}/flat", data, "--labels", "none", "--workers", "0")[0] == 0
    code, _, err = cli("train", "digits_cnn", "--data", data, "--out", tmp_path / "c", *SHORT)
    assert (code, "at least 2 classes" in err) == (2, True)
    assert not (tmp_path / "c").exists()
    words = ("--data", data, "--out", tmp_path / "g", "--batch", "16", "--epochs", "1", "--workers", "0")
    assert cli("train", "digits_gan", *words)[0] == 0
    assert cli("sample", tmp_path / "g", "--n", "9", "--out", tmp_path / "grid.png")[0] == 0
    assert Image.open(tmp_path / "grid.png").size[0] > 3 * 24


def test_a_classifier_is_refused_on_one_class(cli, tmp_path):
    for i in range(12):
        picture(tmp_path / "one" / "cat" / f"{i}.png", i)
    assert cli("shard", f"folder:{tmp_path}/one", tmp_path / "data", "--workers", "0")[0] == 0
    code, _, err = cli("train", "digits_cnn", "--data", tmp_path / "data", "--out", tmp_path / "run", *SHORT)
    assert code == 2
    assert "at least 2 classes, the dataset has 1" in err


def test_mistakes_about_datasets_and_runs_are_one_line(cli, tmp_path, digits, classifier, gan):
    for words, said in [
        (["inspect", tmp_path], "no dataset at"),
        (["train", "digits_cnn", "--data", tmp_path / "none", "--out", tmp_path / "r", *SHORT], "no dataset at"),
        (["evaluate", tmp_path, "--workers", "0"], "is not a run"),
        (["evaluate", classifier, "--split", "tset", "--workers", "0"], "no split 'tset'"),
        (["evaluate", gan, "--workers", "0"], "has no accuracy"),
        (["sample", classifier, "--out", tmp_path / "x.png"], "draws nothing"),
        (["sample", gan, "--out", tmp_path / "x.png", "--n", "0"], "n 0"),
        (["sample", gan, "--out", tmp_path / "x.png", "--label", "cat"], "no class 'cat'"),
        (["train", "digits_cnn", "--data", digits, "--out", classifier, "--lr", "0.1", *SHORT], "optim.lr"),
        (["train", "digits_cnn", "--data", digits, "--out", digits, *SHORT], "is a dataset"),
        (["train", "digits_cnn", "--data", digits, "--out", tmp_path / "r", "--lr", "-1", *SHORT], "-1"),
        (["train", "digits_cnn", "--data", digits, "--out", tmp_path / "r", "--workers", "3"], "[1, 2]"),
        (
            ["train", "digits_cnn", "--data", digits, "--out", tmp_path / "r", "--image-size", "4", *SHORT],
            "--image-size",
        ),
    ]:
        code, out, err = cli(*words)
        assert code == 2, (words, err)
        assert said in err
        assert "Traceback" not in err
        assert not out


def test_json_is_alone_on_stdout_and_people_read_stderr(cli, tmp_path, digits, classifier, gan):
    keys = {
        "shard": {"samples", "rejected", "shards", "seconds", "startup_seconds"},
        "train": {"run", "samples_seen", "epochs", "checkpoint", "metrics"},
        "evaluate": {"samples", "accuracy"},
        "inspect": {"samples", "splits", "rejects"},
        "sample": {"out", "images"},
    }
    words = {
        "shard": ["digits:", tmp_path / "data", "--workers", "0"],
        "train": ["digits_cnn", "--data", digits, "--out", classifier, *SHORT],
        "evaluate": [classifier, "--workers", "0"],
        "inspect": [digits, "--preview", tmp_path / "sheet.png"],
        "sample": [gan, "--out", tmp_path / "grid.png"],
    }
    for verb, expected in keys.items():
        code, out, err = cli(verb, *words[verb], "--json")
        assert code == 0, err
        assert expected <= json.loads(out).keys()
        assert err, f"{verb} said nothing to people"
        code, out, _ = cli(verb, *words[verb])
        assert (code, out) == (0, "")
    assert Image.open(tmp_path / "sheet.png").size[0] > 500
    assert np.asarray(Image.open(tmp_path / "grid.png")).std() > 5


def test_dry_runs_write_nothing(cli, tmp_path, digits):
    code, out, _ = cli("shard", "digits:", tmp_path / "data", "--dry-run", "--json")
    assert (code, json.loads(out)["samples"]) == (0, 1797)
    code, out, _ = cli("train", "digits_cnn", "--data", digits, "--out", tmp_path / "run", "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["steps"] > 100
    assert not list(tmp_path.iterdir())


def test_rejected_images_are_counted_and_listed_and_not_fatal(cli, tmp_path):
    for i in range(20):
        picture(tmp_path / "raw" / "ab"[i % 2] / f"{i}.png", i)
    (tmp_path / "raw" / "a" / "bad.jpg").write_bytes(b"\xff\xd8\xff nothing")
    (tmp_path / "raw" / "b" / "empty.png").write_bytes(b"")
    code, out, _ = cli("shard", f"folder:{tmp_path}/raw", tmp_path / "data", "--workers", "0", "--json")
    assert code == 0
    assert (json.loads(out)["samples"], json.loads(out)["rejected"]) == (20, 2)
    _, _, err = cli("inspect", tmp_path / "data")
    assert "b/empty.png: empty" in err
    assert "a/bad.jpg" in err


def test_images_of_many_sizes_train_once_told_a_size(cli, tmp_path):
    for i in range(40):
        path = tmp_path / "raw" / "xy"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30 + i, 50 - i // 2), (255 * (i % 2), 99, 0)).save(path)
    data, run = tmp_path / "data", tmp_path / "run"
    assert cli("shard", f"folder:{tmp_path}/raw", data, "--workers", "0")[0] == 0
    words = ["train", "digits_cnn", "--data", data, "--out", run, "--batch", "8", "--epochs", "1", "--workers", "0"]
    code, _, err = cli(*words)
    assert (code, "--image-size" in err) == (2, True)
    assert cli(*words, "--image-size", "32", "--crop", "resized")[0] == 0


def test_mistakes_about_object_storage_are_one_line(cli, s3, monkeypatch):
    there = s3.fresh()
    code, _, err = cli("shard", "digits:", "s3://no-such-bucket/data", "--workers", "0")
    assert (code, "no bucket no-such-bucket" in err) == (2, True)
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        code, _, err = cli("shard", "digits:", there, "--workers", "0")
        assert (code, "AWS_SECRET_ACCESS_KEY" in err) == (2, True)
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        code, _, err = cli("inspect", there)
        assert (code, "127.0.0.1:9 does not answer" in err) == (1, True)
    assert "Traceback" not in err


def millstream(*words) -> subprocess.Popen:
    command = [sys.executable, "-m", "jobs", *(str(word) for word in words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_second_training_of_a_run_is_told_who_holds_it(tmp_path, digits, cli):
    words = ["train", "digits_cnn", "--data", digits, "--out", tmp_path, "--epochs", "500", "--workers", "0"]
    first = millstream(*words)
    try:
        wait_for(lambda: list(tmp_path.glob("checkpoints/*/manifest.json")), 60, "a checkpoint")
        code, _, err = cli(*words)
        assert code == 2
        assert f"pid {first.pid}" in err
    finally:
        first.kill()
        first.communicate(timeout=20)


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_who_stops_a_training_loses_nothing_and_the_same_command_goes_on(tmp_path, digits, cli, number, expected):
    words = ["train", "digits_cnn", "--data", digits, "--out", tmp_path, "--epochs", "5", "--workers", "0"]
    first = millstream(*words)
    wait_for(lambda: list(tmp_path.glob("checkpoints/*/manifest.json")), 60, "a checkpoint")
    os.kill(first.pid, number)
    _, err = first.communicate(timeout=30)
    assert first.returncode == expected
    saved = int(re.search(r"stopped at ([\d,]+) samples, all saved: the same command", err)[1].replace(",", ""))
    assert saved == checkpoint.newest(str(tmp_path))[0].samples == checkpoint.read_metrics(str(tmp_path))[-1]["samples"]
    assert "Traceback" not in err
    code, out, _ = cli(*words, "--json")
    assert code == 0
    assert json.loads(out)["epochs"] >= 5
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))


def test_checkpoints_are_listed_and_pinned_by_name(classifier, cli):
    code, out, err = cli("checkpoints", classifier, "--json")
    assert code == 0
    (only,) = json.loads(out)["checkpoints"]
    assert only["best"]
    assert not only["pinned"]
    assert only["name"] in err
    code, out, _ = cli("checkpoints", classifier, "--pin", only["name"], "--why", "published", "--json")
    assert (code, json.loads(out)["checkpoints"][0]["pinned"]) == (0, True)
    code, _, err = cli("checkpoints", classifier, "--pin", "000000000001-0001")
    assert code == 2
    assert only["name"] in err
    code, out, _ = cli("checkpoints", classifier, "--unpin", only["name"], "--json")
    assert (code, json.loads(out)["checkpoints"][0]["pinned"]) == (0, False)
