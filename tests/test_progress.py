"""What people see of a run that trains: a line for what matters, few where nobody watches."""

import time

import pytest

from jobs.command import TrainingProgress


def row(samples, **more):
    return {"samples": samples, "epoch": samples / 100, "loss": 0.5, "data_wait": 0.25, "workers": 2} | more


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def lines(capsys):
    return capsys.readouterr().err.splitlines()


def test_where_nobody_watches_a_validation_is_a_line_and_so_is_each_minute(clock, capsys):
    with TrainingProgress(1000) as show:
        for samples in range(10, 310, 10):
            clock[0] += 5
            show(row(samples, **({"val_loss": 0.4, "val_accuracy": 0.9} if samples == 100 else {})))
    said = lines(capsys)
    assert [int(line.split()[2]) for line in said] == [100, 220]
    assert said[0].startswith("epoch  1.00")
    for part in ("loss 0.5000", "val_accuracy 0.9000", "2/s", "data wait 25%", "2 workers"):
        assert part in said[0], part


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        ({"restart": 2, "why": "it is gone"}, "workers failed (it is gone): restart 2 from the newest checkpoint"),
        ({"saved": 6400, "why": "there is room"}, "saved at 6,400 samples: there is room"),
        ({"resize": 4, "why": "there is room for 4 workers"}, "going on with 4 workers (there is room for 4 workers)"),
        ({"note": "waiting for 2 workers"}, "waiting for 2 workers"),
    ],
)  # fmt: skip
def test_what_happens_between_attempts_is_said(event, expected, capsys):
    with TrainingProgress(1000) as show:
        show(event)
    assert lines(capsys) == [expected]


def test_the_rate_after_a_restart_is_its_own(clock, capsys):
    with TrainingProgress(1000) as show:
        show(row(10))
        clock[0] += 1
        show(row(600))
        show({"restart": 1, "why": "x"})
        clock[0] += 30
        show(row(300))
        clock[0] += 1
        show(row(340, val_loss=1.0))
    assert "| 40/s" in lines(capsys)[-1]
