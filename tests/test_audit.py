"""The audit proves what holds and finds what does not: in the order itself, and in what a run logged."""

import contextlib
import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import runs
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jobs import audit as verb
from jobs.__main__ import main
from pipeline.loading import audit
from pipeline.loading.order import LANES, Batching, Order
from pipeline.shards import index
from pipeline.shards.build import build
from pipeline.shards.plan import Recipe
from pipeline.training import checkpoint, fit
from pipeline.training.resources import Resources
from pipeline.training.run import start

HERE = Resources(workers=0, threads=1)
shard_counts = st.lists(st.integers(0, 500), min_size=1, max_size=9).filter(lambda counts: sum(counts) > 0)


@pytest.fixture
def audited(capsys):
    """audited(*words) -> (exit code, what --json printed, stderr as one line), in this process."""

    def call(*words) -> tuple[int, dict, str]:
        capsys.readouterr()
        code = main(["audit", *map(str, words), "--json"])
        out, err = capsys.readouterr()
        return code, json.loads(out or "{}"), " ".join(err.split())

    return call


# ---- digests


@given(st.integers(1, 300), st.integers(1, 64), st.integers(0, 2**40))
def test_parts_of_ranks_add_up_to_the_digest_of_the_whole_even_in_float32(n, ranks, first):
    rows, epochs = first + np.arange(n), np.arange(n) % 3
    owner = rows * 7 % ranks
    shares = [audit.digest_parts(epochs[owner == r], rows[owner == r]).astype(np.float32) for r in range(ranks)]
    assert audit.digest(np.sum(shares, axis=0, dtype=np.float32)) == audit.digest(audit.digest_parts(epochs, rows))


def test_sums_of_the_most_ranks_are_exact_in_float32():
    most = np.float32(0)
    for _ in range(LANES):
        most += np.float32(2**16 - 1)
    assert audit.digest([int(most)] * 4) == audit.digest([LANES * (2**16 - 1)] * 4)


@pytest.mark.parametrize("what", ["another row", "another epoch", "a row twice", "a row less"])
def test_a_digest_changes_with_any_sample_and_not_with_their_order(what):
    epochs, rows = np.full(256, 3), np.arange(1000, 1256)
    whole = audit.digest_parts(epochs, rows)
    assert np.array_equal(audit.digest_parts(epochs, rows[::-1]), whole)
    if what == "a row less":
        epochs, rows = epochs[1:], rows[1:]
    elif what == "another epoch":
        epochs[7] += 1
    else:
        rows[7] = 5 if what == "another row" else 1000
    assert not np.array_equal(audit.digest_parts(epochs, rows), whole)


def test_digests_of_samples_never_change_between_releases():
    why = "digests have changed: runs logged by older code would not pass the audit"
    parts = audit.digest_parts(np.array([0, 0, 1]), np.array([0, 1, 2]))
    assert audit.written(audit.digest(parts)) == "f1825ad670977319", why


# ---- replays


@settings(max_examples=40, deadline=None)
@given(shard_counts, st.integers(1, 6), st.integers(1, 40), st.lists(st.sampled_from([1, 2, 4, 8, 16]), min_size=1))
def test_chains_draw_what_an_unbroken_run_draws_each_sample_once_an_epoch(counts, batch_per, stop, worlds):
    n, batch = sum(counts), 16 * batch_per
    steps = Batching(batch).steps(2 * n)

    def replayed(starts):
        return audit.replay(lambda: Order(counts, 3), batch, 16, starts)

    alone, chained = replayed([(1, 0, steps)]), replayed(audit.chain(worlds, stop, steps))
    assert chained.same(alone)
    assert (chained.repeats, chained.drops, chained.epochs) == (0, 0, steps * batch // n)
    positions = np.arange(steps * batch)
    drawn = Order(counts, 3).samples(positions)[0]
    each = [slice(s * batch, (s + 1) * batch) for s in range(steps)]
    expected = [audit.digest(audit.digest_parts(positions[one] // n, drawn[one])) for one in each]
    assert chained.digests.tolist() == expected


def test_chains_take_every_step_once_in_turns_of_the_sizes():
    assert audit.chain([1, 2, 4], 3, 11) == [(1, 0, 3), (2, 3, 6), (4, 6, 9), (1, 9, 11)]
    assert audit.chain([2], 50, 11) == [(2, 0, 11)]


class Broken(Order):
    """An order with one of the faults that the audit is there to find."""

    how, made = "", 0

    def __init__(self, counts, seed):
        Broken.made += 1
        super().__init__(counts, seed + (Broken.made if self.how == "every process its own seed" else 0))

    def samples(self, positions):
        drawn = super().samples(positions)
        if self.how == "a sample twice":
            drawn[0][drawn[0] == 11] = 12
        if self.how == "an epoch of one sample":
            drawn[0][positions // self.n == 1] = 5
        return drawn


@pytest.mark.parametrize("how", ["every process its own seed", "a sample twice", "an epoch of one sample"])
def test_what_does_not_hold_is_found_and_the_exit_code_says_so(digits, audited, monkeypatch, how):
    monkeypatch.setattr(verb, "Order", Broken)
    monkeypatch.setattr(Broken, "how", how)
    code, found, said = audited(digits, "--world", "2", "--batch", 64)
    assert (code, found["holds"]) == (1, False)
    assert "IT DOES NOT HOLD" in said
    if how == "every process its own seed":
        assert not any(one["same"] for one in found["replays"])
        assert "OTHER global batches" in said
    elif how == "a sample twice":
        assert (found["repeats"], found["drops"]) == (2, 2)
        assert all((one["same"], one["repeats"], one["drops"]) == (True, 2, 2) for one in found["replays"])
    else:
        assert found["repeats"] == found["drops"] == runs.SAMPLES - 1


def test_a_dataset_is_audited_at_each_size_and_over_chains_of_them(digits, audited):
    code, found, said = audited(digits, "--world", "1,2,3,4,8", "--batch", 64, "--seed", 5, "--stop", 200)
    assert (code, found["holds"], found["refused"]) == (0, True, [3])
    assert (found["repeats"], found["drops"], found["epochs"], found["samples"]) == (0, 0, 2, runs.SAMPLES)
    assert found["steps"] == len(found["digests"]) == 51
    names = [one["name"] for one in found["replays"]]
    assert names[:4] == ["1 worker", "2 workers", "4 workers", "8 workers"]
    assert [name.partition(" workers,")[0] for name in names[4:]] == [
        "1 -> 2 -> 4 -> 8 -> 1 -> ...", "2 -> 4 -> 8 -> 1 -> 2 -> ...",
        "4 -> 8 -> 1 -> 2 -> 4 -> ...", "8 -> 1 -> 2 -> 4 -> 8 -> ...",
    ]  # fmt: skip
    assert [one["starts"] for one in found["replays"]] == [1] * 4 + [17] * 4  # a stop every 3 steps
    assert all(one["same"] and one["digest"] == found["digest"] for one in found["replays"])
    assert "3 workers: cannot share 64 lanes evenly, so a run refuses it" in said
    for step in (1, 2, 3, 51):
        assert f"step {step}: {found['digests'][step - 1]}" in said


def test_another_seed_draws_other_batches_and_a_size_alone_the_same(digits, audited):
    whole, other, alone, refused = (
        audited(digits, "--batch", 64, "--seed", seed, "--world", world)
        for seed, world in ((5, "1,2"), (6, "1,2"), (5, "64"), (5, "3"))
    )
    assert whole[1]["digests"] == alone[1]["digests"] == refused[1]["digests"]
    assert not set(whole[1]["digests"]) & set(other[1]["digests"])
    assert (refused[0], refused[1]["replays"], refused[1]["refused"]) == (0, [], [3])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--world", "1,two"], r"world '1,two'.*--world 1,2,4,8"),
        (["--world", "0"], "world '0'"),
        (["--batch", "20", "--world", "8"], "batch 20 is not a multiple of its 8 micro-batches: use 16"),
        (["--epochs", "0"], r"epochs 0\.0 must be above 0"),
        (["--stop", "0"], "stop 0 at least 1"),
        (["--split", "trian"], "no split 'trian'"),
    ],
)
def test_a_value_that_cannot_work_is_named(digits, audited, words, said):
    code, _, err = audited(digits, *words)
    assert code == 2
    assert re.search(said, err)


# ---- shuffling


def test_the_order_shuffles_like_a_random_permutation():
    order = Order([1000] * 40, seed=4)
    assert audit.travel(order) == pytest.approx(1, rel=0.05)
    assert 0.7 < audit.travel(order, LANES) < 0.97  # one window in eight is shared


def test_an_order_that_does_not_shuffle_shows():
    class Same(Order):
        def samples(self, positions):
            rows = np.asarray(positions) % self.n
            return np.stack([rows, rows, rows + 1])

    order = Same([1000] * 4, 0)
    assert audit.travel(order) < 0.001
    assert audit.travel(Order([1], 0)) == 1


@pytest.mark.parametrize("sorted_", [True, False])
def test_shards_sorted_by_class_are_warned_of_and_mixed_ones_are_not(digits, capsys, sorted_):
    labels = np.repeat(np.arange(5, dtype=np.int32), 2000)  # more samples than the open windows hold at once
    labels = labels if sorted_ else np.random.default_rng(0).permutation(labels)
    split = index.load(digits).split("train")
    split = dataclasses.replace(split, counts=np.full(10, 1000), label=labels, offset=np.arange(10_000))
    found = verb._shuffle(verb.Args(batch=64), split)
    said = capsys.readouterr().err
    assert found["near_random"] == (not sorted_)
    assert ("warning: further than 5% from random: adjacent_ratio" in said) == sorted_
    assert found["travel"] == pytest.approx(1, abs=0.05)


def test_samples_without_labels_are_measured_by_distance_alone(tmp_path, audited):
    (tmp_path / "in").mkdir()
    for i in range(40):
        Image.new("L", (8, 8), 4 * i).save(tmp_path / "in" / f"{i}.png")
    build(f"folder:{tmp_path / 'in'}", str(tmp_path / "out"), Recipe(labels="none", val_fraction=0), workers=0)
    code, found, _ = audited(tmp_path / "out", "--batch", 256)  # larger than the dataset
    assert (code, found["steps"], found["epochs"]) == (0, 1, 6)
    assert found["shuffle"].keys() == {"travel", "lane_travel", "travel_noise", "near_random"}


# ---- what a run logged


class Stop(Exception):
    pass


def trained(path, data, stop=None, **loop):
    """A short run of digits; stopped, as by a signal, when `stop` steps are taken."""

    def report(row):
        if row["step"] == stop:
            raise Stop

    with pytest.raises(Stop) if stop else contextlib.nullcontext():
        fit.train(start(str(path), "test", runs.cnn(**loop), data, 0), HERE, report)


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    """A run of 32 steps over an epoch's border, with a checkpoint every five; tests copy it."""
    path = tmp_path_factory.mktemp("audited") / "run"
    trained(path, digits, epochs=1.25)
    return path


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def edit(file, change):
    """Applies change(rows) -> rows to a file of metric rows."""
    rows = change([json.loads(line) for line in file.read_text().splitlines()])
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def segments(run):
    return [run / "metrics" / f"{name}.jsonl" for name in checkpoint.lineage(str(run))[0].segments]


def test_a_run_that_drew_what_it_should_passes(run, digits, audited):
    code, found, said = audited("--run", run)
    assert (code, found["holds"], found["steps"], found["checked"], found["unlogged"]) == (0, True, 32, 32, 0)
    assert found["metrics.jsonl"]["checked"] == 32
    assert "32 of 32 steps are stored" in said
    assert "drew just what the order says: 32 steps" in said
    logged = [row["samples_digest"] for row in checkpoint.read_metrics(str(run))]
    assert audited(digits, "--batch", 64, "--seed", 5, "--world", "2")[1]["digests"][:32] == logged


def test_a_run_stopped_and_resumed_passes_and_one_that_is_still_running(digits, tmp_path, audited):
    trained(tmp_path / "run", digits, stop=8, epochs=1.25)
    code, found, said = audited("--run", tmp_path / "run")
    assert (code, found["steps"], found["checked"]) == (0, 5, 5)
    assert "5 of 32 steps are stored" in said
    trained(tmp_path / "run", digits, stop=21, epochs=1.25)
    trained(tmp_path / "run", digits, epochs=1.25)
    code, found, _ = audited("--run", tmp_path / "run")
    assert (code, found["checked"], found["metrics.jsonl"]["checked"]) == (0, 32, 32)


def change_digest(rows):
    return [row | ({"samples_digest": "0123456789abcdef"} if row["step"] == 7 else {}) for row in rows]


def drop_digest(rows):
    return [{k: v for k, v in row.items() if (k, row["step"]) != ("samples_digest", 7)} for row in rows]


TAMPERED = {
    "a digest changed": (change_digest, {"differ": [7]}, "drew other samples{}: step 7"),
    "a digest taken out": (drop_digest, {"differ": [7]}, "drew other samples{}: step 7"),
    "a step lost": (lambda rows: [r for r in rows if r["step"] != 7], {"missing": [7]}, "missing{}: step 7"),
    "a step twice": (lambda rows: [*rows, rows[1]], {"repeated": [7]}, "there twice{}: step 7"),
    "a step renamed": (
        lambda rows: [r | {"step": 8 if r["step"] == 7 else r["step"]} for r in rows],
        {"missing": [7], "repeated": [8], "differ": [8]},
        "there twice{}: step 8",
    ),
}


@pytest.mark.parametrize("where", ["segment", "metrics.jsonl"])
@pytest.mark.parametrize("how", TAMPERED)
def test_tampered_metrics_fail_and_the_step_is_named(run, audited, how, where):
    change, expected, message = TAMPERED[how]
    if where == "segment":
        edit(segments(run)[1], change)
    else:  # all rows in one file: the second of steps 6 to 10 is row 7
        edit(run / "metrics.jsonl", lambda rows: [*rows[:5], *change(rows[5:10]), *rows[10:]])
    code, found, said = audited("--run", run)
    part, sound = (found, found["metrics.jsonl"]) if where == "segment" else (found["metrics.jsonl"], found)
    assert (code, found["holds"]) == (1, False)
    assert {name: part[name] for name in expected} == expected
    assert message.format("" if where == "segment" else " in metrics.jsonl") in said
    assert sound["checked"] == 32


def test_rows_of_no_step_of_the_run_fail(run, audited):
    edit(segments(run)[1], lambda rows: [*rows, rows[0] | {"step": 99}])
    code, found, said = audited("--run", run)
    assert (code, found["strange"]) == (1, 1)
    assert "of no step of this run: 1 rows" in said


def test_a_line_that_is_not_json_fails(run, audited):
    segments(run)[0].write_text('{"step": 1, ')
    code, _, said = audited("--run", run)
    assert code == 1
    assert "metrics" in said
    assert "damaged" in said


@pytest.mark.filterwarnings("ignore:metrics up to")
def test_a_lost_segment_is_missing_steps(run, audited):
    segments(run)[1].unlink()
    code, found, said = audited("--run", run)
    assert (code, found["missing"], found["checked"]) == (1, [6, 7, 8, 9, 10], 27)
    assert "missing: step 6, 7, 8 and 2 more" in said


def test_a_copy_cut_short_by_a_kill_is_no_fault_of_the_run(run, audited):
    edit(run / "metrics.jsonl", lambda rows: rows[:20])
    code, found, _ = audited("--run", run)
    assert (code, found["checked"], found["metrics.jsonl"]["checked"]) == (0, 32, 20)
    (run / "metrics.jsonl").unlink()
    assert audited("--run", run)[0] == 0


@pytest.mark.parametrize(("field", "value"), [("seed", 6), ("batch", 32)])
def test_a_run_that_drew_by_another_seed_or_batch_fails(run, audited, field, value):
    config = json.loads((run / "config.json").read_text())
    config["loop"][field] = value
    (run / "config.json").write_text(json.dumps(config))
    code, found, said = audited("--run", run)
    assert (code, found["checked"], len(found["differ"])) == (1, 0, 32)
    assert "drew other samples: step 1, 2, 3 and 29 more" in said


@pytest.mark.filterwarnings("ignore:sample set aside")
def test_steps_with_samples_set_aside_are_named_and_not_failed(digits, tmp_path, audited):
    data = shutil.copytree(digits, tmp_path / "data")
    split = index.load(str(data)).split("train")
    places = Order(split.counts, 5).epoch(0).tolist()
    for row in (places[70], places[100], places[1000]):  # two of step 2, one of step 16
        with open(data / split.shards[split.shard[row]], "r+b") as file:
            file.seek(int(split.offset[row]) + 40)
            file.write(b"\0\1\2\3")
    trained(tmp_path / "run", str(data))
    code, found, said = audited("--run", tmp_path / "run")
    assert (code, found["checked"], found["set_aside"]) == (0, 24, {"2": 2, "16": 1})
    assert "step 2: 2 of its samples could not be read, so it cannot be compared" in said


def strip(rows):
    return [{k: v for k, v in row.items() if k != "samples_digest"} for row in rows]


def test_a_run_of_an_older_millstream_is_said_to_be_one(run, digits, audited):
    files = [*segments(run), run / "metrics.jsonl"]
    edit(files[0], strip)
    code, found, said = audited("--run", run)
    assert (code, found["unlogged"], found["checked"]) == (0, 5, 27)
    assert "by an older millstream, which logged no digest: the first 5 steps" in said
    for file in files:
        edit(file, strip)
    code, _, said = audited("--run", run)
    assert code == 2
    assert "logged no digest of their samples" in said
    assert f"millstream audit {digits} --seed 5 --batch 64" in said


def test_data_may_have_moved_but_not_changed(run, digits, tmp_path, audited):
    moved = shutil.copytree(digits, tmp_path / "moved")
    assert audited(moved, "--run", run)[0] == 0
    build("digits:", str(tmp_path / "other"), Recipe(samples_per_shard=300, seed=9), workers=0)
    code, _, said = audited(tmp_path / "other", "--run", run)
    assert code == 2
    assert "is not the dataset that" in said


def test_what_cannot_be_audited_is_said(run, audited, tmp_path):
    assert "say what to audit" in audited()[2]
    code, _, said = audited("--run", run, "--seed", 4)
    assert code == 2
    assert "--seed is the run's own with --run" in said
    assert "is not a run" in audited("--run", tmp_path)[2]
    shutil.rmtree(run / "checkpoints")
    assert "has no checkpoint yet" in audited("--run", run)[2]
