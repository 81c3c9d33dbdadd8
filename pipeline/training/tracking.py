"""What other tools see of a run: TensorBoard always, MLflow where MLFLOW_TRACKING_URI is set. Each step once.

RUN/tensorboard/    one event file a checkpoint, so that restarts leave no step twice
RUN/mlflow.json     the id of the MLflow run, which all starts share (MLFLOW_RUN_ID, if set, names another)

A tracker is told of a segment of metrics once its checkpoint stands. What it missed, because a process died in between
or a server was down, it catches up with: at the next commit, or at the next start, from the segments of the lineage.
MLflow cannot forget points: it is given the steps beyond the last that it has. Steps that are taken again after damage
to a checkpoint are not logged again: being resumed exactly, they are equal.
"""

import contextlib
import json
import math
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from pipeline import storage
from pipeline.training import checkpoint
from pipeline.training.run import flat

_NO_NUMBERS = {"step", "samples", "time", "samples_digest"}  # of a row
_LOGGED = "millstream.step"  # a tag: the last step the MLflow run has
_BATCH = 1000  # metrics in one request, MLflow's limit
_LONGEST = 500  # characters of a parameter
_BOUNDS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}


class Trackers:
    """The trackers of one start, for rank 0. `segments`: of the checkpoint the run goes on from; config: the run's."""

    def __init__(self, run: str, config: dict, segments: list[str]):
        self.run = run
        _sweep(run, segments)
        there = {storage.name(path) for path in _event_files(run)}
        for segment, rows in _rows(run, [s for s in segments if f"events.out.tfevents.{s}" not in there]):
            _write_events(run, segment, rows)
        self.mlflow = _MLflow(run, config) if os.environ.get("MLFLOW_TRACKING_URI") else None
        if self.mlflow:
            self.mlflow.log([row for _, rows in _rows(run, segments) for row in rows])

    def __call__(self, segment: str, rows: list[dict]) -> None:
        """A segment was committed."""
        _write_events(self.run, segment, rows)
        if self.mlflow:
            self.mlflow.log(rows)

    def end(self, how: str) -> None:
        """finished, stopped, or what went wrong."""
        if self.mlflow:
            self.mlflow.end({"finished": "FINISHED", "stopped": "KILLED"}.get(how, "FAILED"))


def _rows(run: str, segments: list[str]) -> Iterator[tuple[str, list[dict]]]:
    for segment in segments:
        with contextlib.suppress(FileNotFoundError):  # `checkpoint` warns of what is lost
            yield segment, checkpoint.read_segment(run, segment)


def numbers(row: dict) -> dict[str, float]:
    """What of a row can be drawn: its finite numbers."""
    found = {name: value for name, value in row.items() if name not in _NO_NUMBERS and isinstance(value, int | float)}
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}


# ---- TensorBoard


def _event_files(run: str) -> list[str]:
    try:
        return [file.path for file in storage.list_files(storage.join(run, "tensorboard"))]
    except FileNotFoundError:
        return []


def _sweep(run: str, segments: list[str]) -> None:
    """Removes the event files of checkpoints that the run did not go on from: their steps are about to come again."""
    for path in _event_files(run):
        if path.rpartition("tfevents.")[2] not in segments:
            storage.delete(storage.join(run, "tensorboard", path))


def _write_events(run: str, segment: str, rows: list[dict]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            for row in rows:
                for tag, value in numbers(row).items():
                    writer.add_scalar(tag, value, row["samples"], walltime=row["time"])
        (events,) = Path(folder).iterdir()
        # Named by position: TensorBoard reads the files of a folder in the order of their names.
        storage.write(storage.join(run, "tensorboard", f"events.out.tfevents.{segment}"), events.read_bytes())


# ---- MLflow


class _MLflow:
    """One MLflow run. Whatever goes wrong with it is a warning; rows wait until it is there."""

    def __init__(self, run: str, config: dict):
        self.run, self.config, self.client, self.id = run, config, None, ""
        self.waiting: list[dict] = []

    def log(self, rows: list[dict]) -> None:
        self.waiting += rows
        with self._warning():
            self._connect()
            done = self.last
            points = [(row, *point) for row in self.waiting if row["step"] > done for point in numbers(row).items()]
            for start in range(0, len(points), _BATCH):
                self._send(points[start : start + _BATCH], last=start + _BATCH >= len(points))
            self.waiting = []

    def _send(self, points: list[tuple[dict, str, float]], last: bool) -> None:
        from mlflow.entities import Metric, RunTag

        metrics = [Metric(name, value, round(row["time"] * 1000), row["step"]) for row, name, value in points]
        step = points[-1][0]["step"] - (not last)  # the rest of a step cut in two is still to come
        # In one request with the points: what it has is known from what it has.
        self.client.log_batch(self.id, metrics=metrics, tags=[RunTag(_LOGGED, str(step))])
        self.last = step

    def end(self, status: str) -> None:
        with self._warning():
            if self.client:
                self.client.set_terminated(self.id, status)

    def _connect(self) -> None:
        if self.client:
            return
        for name, value in _BOUNDS.items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        try:
            from mlflow import MlflowClient
        except ImportError:
            raise ImportError(
                "MLFLOW_TRACKING_URI is set, but mlflow is not installed (pip install mlflow-skinny)"
            ) from None
        client = MlflowClient()
        self.id = os.environ.get("MLFLOW_RUN_ID") or self._id(client)
        client.update_run(self.id, status="RUNNING")
        self.last = int(client.get_run(self.id).data.tags.get(_LOGGED, 0))
        self.client = client

    def _id(self, client) -> str:
        path = storage.join(self.run, "mlflow.json")
        with contextlib.suppress(FileNotFoundError):
            return json.loads(storage.read(path))["run_id"]
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "millstream")
        experiment = client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else client.create_experiment(name)
        made = client.create_run(number, run_name=storage.name(self.run)).info.run_id
        for key, value in flat(self.config).items():
            client.log_param(made, key, str(value)[:_LONGEST])
        try:
            storage.write_new(path, json.dumps({"run_id": made, "experiment": name}).encode())
        except FileExistsError:  # two starts at once
            client.delete_run(made)
            return json.loads(storage.read(path))["run_id"]
        return made

    @contextlib.contextmanager
    def _warning(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of a server, a network or a package that is not ours
            why = str(error).strip().splitlines() or [type(error).__name__]
            warnings.warn(f"MLflow does not see this run for now: {why[0]}", stacklevel=3)
