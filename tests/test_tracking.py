"""What TensorBoard and MLflow see: each step once, whatever was killed, damaged or down; nor does it stop a run."""

import json
import os

import mlflow
import pytest
import runs
from test_fit import HERE
from test_run import events, stopped

from pipeline import storage
from pipeline.training import checkpoint, fit
from pipeline.training.run import start
from pipeline.training.saver import Saver
from pipeline.training.tracking import Trackers, numbers

CONFIG = {"optim": {"lr": 0.1}, "preset": "x" * 600}


@pytest.fixture
def client(tmp_path, monkeypatch):
    """MLflow's own store in a folder: the client writes it as it would speak to a server."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlflow'}")
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    return mlflow.MlflowClient()


def rows_of(first, last):
    return [
        {"step": s, "samples": s * 10, "loss": 1 / s, "time": 1e9 + s, "samples_digest": "ab"}
        for s in range(first, last + 1)
    ]


class Start:
    """A start of the run that saves ten steps at a time."""

    def __init__(self, run):
        attempt, self.found = checkpoint.claim(run)
        self.trackers = Trackers(run, CONFIG, self.found.segments if self.found else [])
        self.saver = Saver(run, attempt, self.found, 9, self.trackers)
        self.step = self.found.samples // 10 if self.found else 0

    def save(self, told=True):
        self.saver.on_commit = self.trackers if told else None  # not told: it was killed just before
        self.saver.save({}, (self.step + 10) * 10, rows_of(self.step + 1, self.step + 10), {})
        self.saver.wait()
        self.step += 10


def logged(client, run):
    """(steps, values) of the loss in MLflow."""
    number = json.loads(storage.read(storage.join(run, "mlflow.json")))["run_id"]
    points = client.get_metric_history(number, "loss")
    return [p.step for p in points], [p.value for p in points]


def test_mlflow_has_each_step_once_over_starts_that_died_before_they_told_it(client, place):
    run = storage.join(place, "run")
    first = Start(run)
    first.save()
    first.save(told=False)
    second = Start(run)
    assert logged(client, run)[0] == list(range(1, 21))
    second.save()
    steps, losses = logged(client, run)
    assert steps == list(range(1, 31))
    assert losses == [1 / s for s in steps]
    number = json.loads(storage.read(storage.join(run, "mlflow.json")))["run_id"]
    point = client.get_metric_history(number, "loss")[4]
    assert (point.step, point.timestamp) == (5, int(1e12) + 5000)
    found = client.get_run(number)
    assert found.info.run_name == "run"
    assert client.get_experiment(found.info.experiment_id).name == "millstream"
    assert found.data.params["optim.lr"] == "0.1"
    assert found.info.status == "RUNNING"
    second.trackers.end("finished")
    assert client.get_run(number).info.status == "FINISHED"
    assert len(client.search_runs([found.info.experiment_id])) == 1


def test_steps_taken_again_after_damage_are_in_mlflow_once(client, place):
    run = storage.join(place, "run")
    first = Start(run)
    first.save()
    first.save()
    storage.write(storage.join(run, "checkpoints", checkpoint.lineage(run)[0].name, "state.pt"), b"damaged")
    with pytest.warns(UserWarning, match="going back"):
        second = Start(run)
    assert second.step == 10
    second.save()
    second.save()
    assert logged(client, run)[0] == list(range(1, 31))


def test_many_numbers_are_sent_in_requests_of_a_thousand_and_a_step_cut_in_two_is_sent_whole(client, tmp_path):
    run = str(tmp_path / "run")
    trackers, sent = Trackers(run, {}, []), []
    rows = [{"step": s, "samples": s, "time": 1.0} | {f"n{i}": float(i) for i in range(7)} for s in range(1, 301)]
    trackers.mlflow.log([rows[0]])
    real = trackers.mlflow.client.log_batch

    def log_batch(number, metrics, tags):
        if len(sent) == 1:
            sent.append(None)
            raise ConnectionError("cut")
        sent.append(len(metrics))
        real(number, metrics=metrics, tags=tags)

    trackers.mlflow.client.log_batch = log_batch
    with pytest.warns(UserWarning, match="MLflow does not see this run for now: cut"):
        trackers.mlflow.log(rows[1:])
    trackers.mlflow.log([])
    assert [n for n in sent if n] == [1000, 1000, 299 * 7 - 2000 + 1000 % 7]  # the cut step's numbers once more
    number = trackers.mlflow.id
    for i in range(7):
        steps = [p.step for p in client.get_metric_history(number, f"n{i}")]
        assert sorted(set(steps)) == list(range(1, 301))


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "nonsense://x"])
def test_a_tracker_that_is_down_is_a_warning_and_what_it_missed_is_caught_up_with(client, tmp_path, monkeypatch, uri):
    run, there = str(tmp_path / "run"), os.environ["MLFLOW_TRACKING_URI"]
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.warns(UserWarning, match="MLflow does not see this run for now"):
        first = Start(run)
    with pytest.warns(UserWarning, match="MLflow does not see this run for now"):
        first.trackers.mlflow.log(rows_of(1, 10))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", there)
    first.trackers.mlflow.log(rows_of(11, 20))
    assert logged(client, run)[0] == list(range(1, 21))


def test_a_run_that_the_user_names_is_the_one_that_is_written(client, tmp_path, monkeypatch):
    number = client.create_run(client.create_experiment("theirs")).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", number)
    Start(str(tmp_path / "run")).save()
    assert [p.step for p in client.get_metric_history(number, "loss")] == list(range(1, 11))
    assert not os.path.exists(tmp_path / "run" / "mlflow.json")


def test_without_the_package_a_run_is_told_what_to_install(client, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mlflow", None)
    with pytest.warns(UserWarning, match="pip install mlflow-skinny"):
        Start(str(tmp_path / "run"))


def test_tensorboard_gets_what_it_was_not_told_before_a_kill(place):
    run = storage.join(place, "run")
    Start(run).save(told=False)
    second = Start(run)
    second.save()
    names = [storage.name(file.path) for file in storage.list_files(storage.join(run, "tensorboard"))]
    assert names == [f"events.out.tfevents.{segment}" for segment in checkpoint.lineage(run)[0].segments]


def test_only_finite_numbers_are_drawn():
    row = {"step": 1, "samples": 2, "time": 3.0, "loss": float("nan"), "accuracy": 1, "lr": 0.1, "samples_digest": "x"}
    assert numbers(row) == {"accuracy": 1.0, "lr": 0.1}


def test_a_run_trained_in_two_sittings_is_one_mlflow_run(client, digits, tmp_path):
    path = str(tmp_path / "run")
    stopped(path, runs.cnn(), digits, 13)
    fit.train(start(path, "test", runs.cnn(), digits, 0), HERE, lambda row: None)
    steps, losses = logged(client, path)
    rows = checkpoint.read_metrics(path)
    assert steps == [row["step"] for row in rows]
    assert losses == [row["loss"] for row in rows]
    assert events(os.path.join(path, "tensorboard"))["loss"] == [row["samples"] for row in rows]
