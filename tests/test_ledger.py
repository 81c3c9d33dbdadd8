"""Where the time of a run went: what is counted as what, and that the parts add up."""

import json
import time
import warnings

import pytest
import runs
from s3_server import wait_for
from test_fit import HERE
from test_run import stopped

from pipeline import storage
from pipeline.training import checkpoint, fit, ledger
from pipeline.training.ledger import Clock, Launch, Ledger
from pipeline.training.run import start


def test_a_clock_gives_each_moment_to_one_kind():
    clock, begin = Clock(), time.perf_counter()
    for kind in ("data", "compute", "data"):
        time.sleep(0.02)
        clock.lap(kind)
    assert set(clock.seconds) == {"data", "compute"}
    assert clock.seconds["data"] >= 0.04
    assert sum(clock.seconds.values()) <= time.perf_counter() - begin
    assert (clock.last, clock.moves) == ("data", 3)


def test_a_step_begun_counts_its_own_laps_and_each_item_is_a_sign_of_life():
    clock = Clock()
    clock.lap("data")
    clock.begin(7)
    clock.lap("compute")
    assert list(clock.ticking("abc")) == ["a", "b", "c"]
    assert (clock.step, clock.laps, clock.moves) == (7, 1, 5)


def record(attempt, command, began, updated, first, last, **seconds):
    return {
        "attempt": attempt, "workers": 1, "device": "cpu", "command": command, "began": began, "computing": began + 1,
        "from_samples": first, "samples": last, "first_step": began + 3, "ended": None, "updated": updated,
        "seconds": {"start": 1.0} | seconds,
    }  # fmt: skip


def written(run, *records):
    for each in records:
        storage.write(storage.join(run, "ledger", f"{each['attempt']:06d}.json"), json.dumps(each).encode())
    return ledger.summary(run)


def test_the_parts_of_a_run_add_up_to_its_wall_time(tmp_path):
    """A run killed at 300 samples, whose last checkpoint had 200; the same command restarted it; a day later another
    command ended it."""
    found = written(
        str(tmp_path),
        record(1, "a", 100.0, 112.0, 0, 300, data=3.0, compute=6.0, checkpoint=0.9),
        record(2, "a", 115.0, 125.0, 200, 400, data=2.0, compute=4.0, communication=1.0, validation=1.0),
        record(3, "b", 90_000.0, 90_007.0, 400, 500, compute=5.0),
    )
    assert found["wall"] == pytest.approx(12 + 3 + 10 + 7)
    assert sum(found["seconds"].values()) == pytest.approx(found["wall"])
    seconds = found["seconds"]
    assert seconds["start"] == pytest.approx(2)
    assert seconds["recovery"] == pytest.approx(3 + 2 + 2)
    assert seconds["wasted"] == pytest.approx(9.9 / 3)
    assert seconds["compute"] == pytest.approx(6 * 2 / 3 + 4 + 5)
    assert seconds["other"] == pytest.approx(0.1)
    assert (found["samples"], found["wasted_samples"], found["attempts"]) == (500, 100, 3)
    assert found["images_per_second"] == pytest.approx(500 / 32)
    worked = seconds["data"] + seconds["compute"] + seconds["communication"]
    assert found["rate"] == pytest.approx(500 / worked)
    assert found["goodput"] == pytest.approx((worked + seconds["validation"]) / 32)


def test_an_attempt_that_died_before_its_first_batch_is_all_start(tmp_path):
    dead = record(1, "a", 100.0, 104.0, 0, 0) | {"seconds": {}, "first_step": None}
    found = written(str(tmp_path), dead, record(2, "a", 105.0, 110.0, 0, 50, compute=3.0))
    assert found["seconds"]["start"] == pytest.approx(4)
    assert found["seconds"]["recovery"] == pytest.approx(1 + 2)
    assert found["wasted_samples"] == 0
    assert sum(found["seconds"].values()) == pytest.approx(found["wall"]) == pytest.approx(10)


def test_a_run_of_an_older_millstream_has_none(tmp_path):
    assert ledger.summary(str(tmp_path)) is None


def test_what_an_attempt_reached_is_known_while_it_runs(place, monkeypatch):
    monkeypatch.setattr(ledger, "_EVERY_S", 0.02)
    run, clock = storage.join(place, "run"), Clock()
    kept = Ledger(run, 3, 2, 640, clock, "cpu", Launch("me", 5.0))
    clock.lap("start")
    kept.reached(704)
    wait_for(lambda: ledger.read(run) and ledger.read(run)[0]["samples"] == 704, 20, "entry")
    (found,) = ledger.read(run)
    assert (found["attempt"], found["workers"], found["from_samples"], found["ended"]) == (3, 2, 640, None)
    assert (found["command"], found["began"]) == ("me", 5.0)
    assert "gpu_memory_bytes" not in found
    kept.end("stopped")
    assert ledger.read(run)[0]["ended"] == "stopped"


def test_a_ledger_that_cannot_be_written_is_a_warning_once(tmp_path, monkeypatch):
    def refuse(path, data):
        raise OSError(28, "No space left on device", path)

    monkeypatch.setattr(storage, "write", refuse)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        kept = Ledger(str(tmp_path), 1, 1, 0, Clock(), "cpu", Launch())
        kept.end("finished")
    assert [str(warning.message) for warning in told if "ledger cannot be written" in str(warning.message)] != []
    assert len(told) == 1


def test_a_run_resumed_knows_what_it_did_twice_and_each_start(digits, tmp_path):
    path = str(tmp_path / "run")
    stopped(path, runs.cnn(), digits, 13)
    resumed = checkpoint.lineage(path)[0].samples
    result = fit.train(start(path, "test", runs.cnn(), digits, 0), HERE, lambda row: None)
    found = result["ledger"]
    assert found == ledger.summary(path)
    assert found["attempts"] == 2
    assert found["wasted_samples"] == 13 * 64 - resumed
    assert found["samples"] == result["samples_seen"]
    assert sum(found["seconds"].values()) == pytest.approx(found["wall"], rel=0.02)
    assert 0 < found["goodput"] < 1
    assert [record["ended"] for record in ledger.read(path)] == ["failed: Stop", "finished"]
    assert all(found["seconds"][kind] > 0 for kind in ("data", "compute", "validation", "checkpoint", "wasted"))
