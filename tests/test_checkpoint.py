"""Checkpoints are whole or invisible, damage is named and survived, and a successor's predecessor is never read."""

import fcntl
import json
import os
import threading
import time
import warnings

import pytest
import torch
from s3_server import wait_for

from pipeline import storage
from pipeline.training import checkpoint
from pipeline.training.checkpoint import Superseded
from pipeline.training.saver import HostMemory, Saver


def state_of(samples, attempt=1):
    return {"task": {"w": torch.full((50,), samples + attempt / 10)}, "samples": samples}


def rows_of(last, before=0):
    return [{"step": s // 10, "samples": s, "loss": 1 / s} for s in range(before + 10, last + 1, 10)]


def name(samples, attempt):
    return f"{samples:012d}-{attempt:04d}"


class Started:
    """A start of the run: claims, and saves every ten samples on request."""

    def __init__(self, run, keep=2, on_commit=None):
        self.attempt, self.found = checkpoint.claim(run)
        self.at = self.found.samples if self.found else 0
        self.saver = Saver(run, self.attempt, self.found, keep, on_commit)

    def save(self, samples, accuracy=None):
        validation = {} if accuracy is None else {"accuracy": accuracy}
        self.saver.save(state_of(samples, self.attempt), samples, rows_of(samples, self.at), validation)
        self.saver.wait()
        self.at = samples


def there(run):
    """Names of the checkpoints of which anything is left."""
    try:
        files = storage.list_files(storage.join(run, "checkpoints"))
    except FileNotFoundError:
        return set()
    return {file.path.partition("/")[0] for file in files}


@pytest.fixture
def run(place):
    """A run whose first start saved at 10, 20 and 30."""
    root = storage.join(place, "run")
    start = Started(root, keep=3)
    for samples in (10, 20, 30):
        start.save(samples)
    start.saver.close()
    return root


def file_of(run, samples, kind, attempt=1):
    return storage.join(run, "checkpoints", name(samples, attempt), kind)


def newest_samples(run):
    found = checkpoint.newest(run)
    if found is None:
        return None
    manifest, state = found
    assert torch.equal(state["task"]["w"], state_of(manifest.samples, manifest.attempt)["task"]["w"])
    assert state["samples"] == manifest.samples
    return manifest.samples


def test_a_run_without_checkpoints_starts_from_scratch(place):
    run = storage.join(place, "run")
    assert checkpoint.newest(run) is None
    assert checkpoint.best(run) is None
    assert checkpoint.read_metrics(run) == []
    assert checkpoint.claim(run) == (1, None)
    assert checkpoint.claim(run) == (2, None)


def test_what_was_saved_is_read_again(run):
    assert newest_samples(run) == 30
    assert [m.samples for m in checkpoint.lineage(run)] == [30, 20, 10]
    assert checkpoint.read_metrics(run) == rows_of(30)
    assert [json.loads(line) for line in storage.read(storage.join(run, "metrics.jsonl")).splitlines()] == rows_of(30)


def test_a_checkpoint_without_its_manifest_is_invisible(run):
    storage.delete(file_of(run, 30, "manifest.json"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert newest_samples(run) == 20
        assert checkpoint.read_metrics(run) == rows_of(20)


def spoil(path, how):
    if how == "missing":
        storage.delete(path)
        return
    data = storage.read(path)
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    storage.write(path, {"flipped": flipped, "truncated": data[:-1], "empty": b"", "longer": data + b"\0"}[how])


@pytest.mark.filterwarnings("ignore:checkpoint")
@pytest.mark.parametrize("how", ["flipped", "truncated", "missing", "empty", "longer"])
def test_a_damaged_state_is_passed_over_for_the_one_before_with_a_warning_that_names_it(run, how):
    spoil(file_of(run, 30, "state.pt"), how)
    with pytest.warns(UserWarning, match=f"checkpoint {name(30, 1)}.*going back to the checkpoint before"):
        assert newest_samples(run) == 20
    spoil(file_of(run, 20, "state.pt"), how)
    with pytest.warns(UserWarning, match=name(20, 1)):
        assert newest_samples(run) == 10
    with pytest.warns(UserWarning, match=name(20, 1)):
        start = Started(run)
    assert start.found.samples == 10
    spoil(file_of(run, 10, "state.pt"), how)
    with pytest.warns(UserWarning, match=name(10, 1)):
        assert checkpoint.newest(run) is None


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b"7", b'"text"', b"{}", b'{"name": "x"}', b"\xff\xfe", b"\0" * 300, b'{"files": 3}'],
)
def test_a_garbage_manifest_is_passed_over_with_a_warning_that_names_it(run, content):
    storage.write(file_of(run, 30, "manifest.json"), content)
    with pytest.warns(UserWarning, match=f"checkpoint {name(30, 1)} is skipped"):
        assert newest_samples(run) == 20


def test_a_manifest_of_another_checkpoint_is_passed_over(run):
    storage.write(file_of(run, 30, "manifest.json"), storage.read(file_of(run, 20, "manifest.json")))
    with pytest.warns(UserWarning, match=f"checkpoint {name(30, 1)} is skipped.*{name(20, 1)}"):
        assert newest_samples(run) == 20


@pytest.mark.filterwarnings("ignore:checkpoint")
def test_no_flipped_byte_of_a_manifest_is_believed(tmp_path):
    start = Started(str(tmp_path), keep=3)
    start.save(10)
    start.save(20, accuracy=0.5)
    path = file_of(str(tmp_path), 20, "manifest.json")
    data = storage.read(path)
    whole = checkpoint.lineage(str(tmp_path))[0]
    for at in range(len(data)):
        for flip in (1, 16):
            with open(path, "wb") as file:
                file.write(data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :])
            found = checkpoint.lineage(str(tmp_path))
            assert found[0] == whole or found[0].samples == 10, at


def test_other_files_beside_ours_do_no_harm(run):
    for path in ("attempts/.DS_Store", "attempts/notes.txt", "checkpoints/README", "checkpoints/old/manifest.json"):
        storage.write(storage.join(run, path), b"not ours")
    assert newest_samples(run) == 30
    assert checkpoint.claim(run)[0] == 2


# ---- starts


def test_each_start_goes_on_from_the_newest_and_every_step_stands_once(run):
    for attempt, samples in ((2, 50), (3, 60)):
        start = Started(run)
        assert (start.attempt, start.found.samples) == (attempt, start.at)
        start.save(samples)
    assert newest_samples(run) == 60
    assert checkpoint.read_metrics(run) == rows_of(60)
    assert [json.loads(line) for line in storage.read(storage.join(run, "metrics.jsonl")).splitlines()] == rows_of(60)


def test_steps_taken_again_after_damage_stand_once(run):
    spoil(file_of(run, 30, "state.pt"), "flipped")
    with pytest.warns(UserWarning, match=name(30, 1)):
        start = Started(run)
    start.save(30)
    start.save(40)
    assert checkpoint.read_metrics(run) == rows_of(40)


def test_what_an_orphan_stores_after_its_successors_claim_is_never_read(place, monkeypatch):
    run = storage.join(place, "run")
    orphan = Started(run, keep=5)
    orphan.save(10)
    successor = Started(run, keep=5)
    # A paused writer has passed its check before the claim: here it writes without one.
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "check_newest", lambda run, attempt: None)
        orphan.save(20)
        orphan.save(90, accuracy=1.0)
    assert newest_samples(run) == 10
    assert [m.name for m in checkpoint.lineage(run)] == [name(10, 1)]
    assert checkpoint.best(run).name == name(10, 1)
    assert checkpoint.read_metrics(run) == rows_of(10)
    successor.save(20)
    assert checkpoint.newest(run)[0].name == name(20, 2)
    third = Started(run)
    assert third.found.name == name(20, 2)
    third.save(30)
    assert checkpoint.read_metrics(run) == rows_of(30)


def test_an_orphan_deletes_nothing_of_its_successors(place):
    """It prunes with what it saw before the claim, however late it wakes up."""
    run = storage.join(place, "run")
    orphan = Started(run, keep=1)
    orphan.save(10)
    orphan.save(20)
    successor = Started(run, keep=5)
    for samples in (30, 40, 50):
        successor.save(samples)
    before = there(run)
    with pytest.raises(Superseded):
        checkpoint.prune(run, 1, 1, checkpoint.lineage(run)[-1], None)
    assert there(run) == before == {name(20, 1), name(30, 2), name(40, 2), name(50, 2)}


def test_an_orphan_whose_successor_begins_while_it_uploads_commits_nothing(place, monkeypatch):
    run = storage.join(place, "run")
    orphan = Started(run)
    orphan.save(10)
    write, successors = storage.write, []

    def begins(path, data):
        write(path, data)
        if path.endswith("state.pt") and not successors:
            successors.append(None)
            successors.append(checkpoint.claim(run))

    monkeypatch.setattr(storage, "write", begins)
    with pytest.raises(Superseded, match="attempt 2"):
        orphan.save(20)
    assert successors[1][1].name == name(10, 1)
    assert not storage.exists(file_of(run, 20, "manifest.json"))


def test_an_orphans_next_save_says_that_it_is_superseded(place):
    run = storage.join(place, "run")
    orphan = Started(run)
    orphan.save(10)
    Started(run)
    with pytest.raises(Superseded, match="attempt 2"):
        orphan.save(20)
    assert newest_samples(run) == 10


def test_racing_claims_get_different_numbers(place):
    run, taken, line = storage.join(place, "run"), [], threading.Barrier(6)

    def start():
        line.wait(30)
        taken.append(checkpoint.claim(run)[0])

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(taken) == [1, 2, 3, 4, 5, 6]


def test_the_ten_thousandth_start_is_one_like_the_others(tmp_path):
    run = str(tmp_path)
    storage.write(storage.join(run, "attempts/009999.json"), b'{"from": null}')
    start = Started(run)
    start.save(10)
    start.save(20)
    assert start.attempt == 10_000
    assert newest_samples(run) == 20
    assert Started(run).found.attempt == 10_000


# ---- what is kept


def test_the_newest_the_best_and_the_one_resumed_from_stay(place):
    run = storage.join(place, "run")
    first = Started(run, keep=2)
    for samples, accuracy in ((10, 0.1), (20, 0.9), (30, 0.3), (40, 0.4), (50, None)):
        first.save(samples, accuracy)
    assert there(run) == {name(20, 1), name(40, 1), name(50, 1)}
    second = Started(run, keep=2)
    for samples, accuracy in ((60, 0.2), (70, 0.9), (80, 0.5), (90, 0.1)):
        second.save(samples, accuracy)
    assert there(run) == {name(50, 1), name(70, 2), name(80, 2), name(90, 2)}
    assert checkpoint.best(run).name == name(70, 2)  # of two as good, the later
    third = Started(run, keep=1)
    third.save(100, 0.95)
    assert there(run) == {name(90, 2), name(100, 3)}


def test_without_validation_the_best_is_the_newest(run):
    assert checkpoint.best(run).samples == 30


def test_what_killed_writers_left_half_written_goes_with_the_next_save(run):
    storage.write(file_of(run, 40, "state.pt"), b"half")
    start = Started(run)
    start.save(40)
    assert there(run) == {name(30, 1), name(40, 2)}


def test_what_killed_writers_left_in_flight_goes_with_the_next_start(tmp_path):
    left = storage.partial(file_of(str(tmp_path), 40, "state.pt"))
    os.makedirs(os.path.dirname(left))
    with open(left, "wb") as file:
        file.write(b"half")
    Started(str(tmp_path))
    assert not os.path.exists(left)


def test_what_an_orphan_had_in_flight_when_it_died_after_its_successors_start_goes_with_a_save(tmp_path):
    left = storage.partial(file_of(str(tmp_path), 40, "state.pt"))
    os.makedirs(os.path.dirname(left))
    with open(left, "wb") as orphan:
        fcntl.flock(orphan, fcntl.LOCK_EX)
        start = Started(str(tmp_path))
        start.save(10)
        assert os.path.exists(left)  # its writer lives
    start.save(20)
    assert not os.path.exists(left)


# ---- what stays


def test_a_pinned_checkpoint_stays_until_it_is_let_go(run):
    checkpoint.pin(run, name(10, 1), "published as v1")
    start = Started(run, keep=1)
    for samples in (40, 50):
        start.save(samples)
    assert there(run) == {name(10, 1), name(30, 1), name(50, 2)}  # pinned, resumed from, newest
    assert checkpoint.pinned(run) == {name(10, 1)}
    checkpoint.unpin(run, name(10, 1))
    start.save(60)
    assert there(run) == {name(30, 1), name(60, 2)}


@pytest.mark.parametrize("absent", [name(70, 1), "../elsewhere", ""])
def test_what_is_not_there_cannot_be_pinned(run, absent):
    with pytest.raises(ValueError, match="no checkpoint"):
        checkpoint.pin(run, absent, "")
    assert not checkpoint.pinned(run)


def test_nothing_goes_for_a_checkpoint_that_is_not_there_as_written(run, monkeypatch):
    start = Started(run, keep=1)
    write = storage.write

    def cut(path, data):
        write(path, bytes(data)[:-1] if path.endswith("state.pt") else data)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write", cut)
        with pytest.warns(UserWarning, match=f"state.pt of checkpoint {name(40, 2)}"):
            start.save(40)
    assert there(run) == {name(10, 1), name(20, 1), name(30, 1), name(40, 2)}
    with pytest.warns(UserWarning, match="going back"):
        assert newest_samples(run) == 30


def test_each_manifest_says_what_its_checkpoint_comes_from(place):
    run = storage.join(place, "run")
    attempt, found = checkpoint.claim(run)
    saver = Saver(run, attempt, found, about={"config": {"lr": 0.1}, "generations": ["ab"], "millstream": "1"})
    saver.save(state_of(10), 10, [], {})
    saver.wait()
    saver.close()
    assert checkpoint.lineage(run)[0].about == {"config": {"lr": 0.1}, "generations": ["ab"], "millstream": "1"}


def test_a_manifest_of_an_older_millstream_is_read(run):
    path = file_of(run, 30, "manifest.json")
    content = json.loads(storage.read(path))
    del content["about"], content["digest"]
    storage.write(path, json.dumps(content).encode())
    assert newest_samples(run) == 30
    assert checkpoint.lineage(run)[0].about == {}


# ---- the copy


def test_the_copy_is_in_memory_that_is_used_again():
    host, state = HostMemory(), {"a": torch.arange(6.0), "b": [torch.ones(2, 3), ("x", 1)], "c": torch.tensor(3)}
    first = host.copy(state)
    where = first["a"].data_ptr(), first["b"][0].data_ptr()
    state["a"] += 1
    assert first["a"].tolist() == list(range(6))
    second = host.copy(state)
    assert (second["a"].data_ptr(), second["b"][0].data_ptr()) == where
    assert second["a"].tolist() == list(range(1, 7))
    assert second["b"][1] == ("x", 1)
    assert second["c"].item() == 3


def test_a_state_that_grows_or_changes_shape_is_copied_whole():
    """As an optimiser's does with its first step."""
    host, first, second = HostMemory(), {"w": torch.ones(3)}, {"s": torch.zeros(4), "w": torch.full((3, 2), 5.0)}
    host.copy(first)
    copied = host.copy(second)
    assert all(torch.equal(copied[key], second[key]) for key in second)
    assert torch.equal(host.copy(first)["w"], first["w"])


def test_a_view_is_stored_without_what_it_is_a_view_of(tmp_path):
    whole = torch.zeros(1_000_000)
    copied = HostMemory().copy({"view": whole[:10], "wide": torch.zeros(1).expand(4), "last": torch.ones(2, 3, 4, 4).to(
        memory_format=torch.channels_last)})  # fmt: skip
    torch.save(copied, tmp_path / "state.pt")
    assert (tmp_path / "state.pt").stat().st_size < 10_000
    assert copied["last"].is_contiguous(memory_format=torch.channels_last)
    assert copied["wide"].tolist() == [0] * 4


# ---- failures


def failing(monkeypatch, times, error, where="state.pt"):
    """storage.write fails so often for a path of that name; the list of failures so far."""
    write, failures = storage.write, []

    def fail(path, data):
        if path.endswith(where) and len(failures) < times:
            failures.append(path)
            raise error
        write(path, data)

    monkeypatch.setattr(storage, "write", fail)
    return failures


@pytest.mark.parametrize("where", ["state.pt", "0010-0001.jsonl", "manifest.json"])
@pytest.mark.parametrize(
    "error", [storage.StorageError(11, "no answer", "s3://there"), OSError(28, "No space left on device")]
)
def test_a_store_that_fails_for_a_while_is_asked_again(place, monkeypatch, where, error):
    run = storage.join(place, "run")
    start = Started(run)
    start.saver._over.wait = lambda seconds: None  # no need to wait here
    failures = failing(monkeypatch, 3, error, where)
    with pytest.warns(UserWarning, match="cannot be stored yet") as told:
        start.save(10)
    assert len(failures) == 3
    assert [str(w.message)[-12:] for w in told if "is stored" in str(w.message)] == ["at attempt 4"]
    start.save(20)
    assert newest_samples(run) == 20
    assert checkpoint.read_metrics(run) == rows_of(20)


def test_patience_ends(tmp_path, monkeypatch):
    attempt, found = checkpoint.claim(str(tmp_path))
    saver = Saver(str(tmp_path), attempt, found, patience=0.2)
    failing(monkeypatch, 10**9, storage.StorageError(11, "no answer", "s3://there"))
    saver.save(state_of(10), 10, [], {})
    with pytest.raises(storage.StorageError, match="no answer"):
        saver.wait()
    saver.close()


def test_a_writer_that_waits_for_its_store_gives_up_when_training_ends(tmp_path, monkeypatch):
    attempt, found = checkpoint.claim(str(tmp_path))
    saver = Saver(str(tmp_path), attempt, found)
    failures = failing(monkeypatch, 10**9, storage.StorageError(11, "no answer", "s3://there"))
    saver.save(state_of(10), 10, [], {})
    wait_for(lambda: len(failures) >= 2, 20, "second attempt")
    before = time.monotonic()
    saver.close()
    assert time.monotonic() - before < 30  # not ten minutes
    assert saver.newest() is None


def test_what_cannot_be_mended_by_waiting_is_raised_at_once(tmp_path, monkeypatch):
    start = Started(str(tmp_path))
    failures = failing(monkeypatch, 1, PermissionError(13, "not yours"))
    with pytest.raises(PermissionError):
        start.save(10)
    assert len(failures) == 1


def test_a_store_that_does_not_answer_is_no_reason_to_go_back_to_an_older_checkpoint(run, monkeypatch):
    read, failures = storage.read, []

    def fail(path):
        if path.endswith("state.pt") and len(failures) < 2:
            failures.append(path)
            raise storage.StorageError(11, "no answer", path)
        return read(path)

    monkeypatch.setattr(storage, "read", fail)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.warns(UserWarning, match="cannot be read yet"):
        assert newest_samples(run) == 30


def break_folder(run):
    """Checkpoints can no longer be written: a file lies where their folder must be."""
    os.rename(os.path.join(run, "checkpoints"), os.path.join(run, "aside"))
    storage.write(os.path.join(run, "checkpoints"), b"")


def test_what_went_wrong_in_a_save_surfaces_at_the_next_call(tmp_path):
    run = str(tmp_path)
    start = Started(run)
    start.save(10)
    break_folder(run)
    start.saver.save(state_of(20), 20, [], {})  # in flight: nothing is known yet
    with pytest.raises(OSError, match=name(20, 1)):
        start.saver.save(state_of(30), 30, [], {})
    start.saver.save(state_of(40), 40, [], {})
    with pytest.raises(OSError, match=name(40, 1)):
        start.saver.wait()
    start.saver.wait()  # told once
    start.saver.close()
    os.unlink(os.path.join(run, "checkpoints"))
    os.rename(os.path.join(run, "aside"), os.path.join(run, "checkpoints"))
    assert newest_samples(run) == 10


def test_training_may_change_the_tensors_while_they_are_written(place):
    run = storage.join(place, "run")
    start = Started(run)
    state = {"task": {"w": torch.zeros(300_000)}, "samples": 10}
    start.saver.save(state, 10, rows_of(10), {})
    state["task"]["w"].fill_(7)
    start.saver.wait()
    assert checkpoint.newest(run)[1]["task"]["w"].abs().max() == 0


def test_lost_metrics_are_a_warning_and_no_reason_to_stop(run):
    storage.delete(storage.join(run, "metrics", f"{name(20, 1)}.jsonl"))
    with pytest.warns(UserWarning, match=f"metrics up to checkpoint {name(20, 1)} are lost"):
        start = Started(run)
    start.save(40)
    with pytest.warns(UserWarning, match=name(20, 1)):
        assert checkpoint.read_metrics(run) == [*rows_of(10), *rows_of(40, 20)]


def test_segments_are_handed_on_as_they_are_written(place):
    seen = []
    start = Started(storage.join(place, "run"), on_commit=lambda *given: seen.append(given))
    start.save(20)
    start.save(30)
    assert seen == [(name(20, 1), rows_of(20)), (name(30, 1), rows_of(30, 20))]


def test_who_is_told_of_a_segment_finds_its_checkpoint_and_cannot_spoil_it(place):
    run = storage.join(place, "run")

    def told(segment, rows):
        assert checkpoint.lineage(run)[0].name == segment
        raise RuntimeError("the tracker is down")

    start = Started(run, on_commit=told)
    with pytest.warns(UserWarning, match="could not be tracked: the tracker is down"):
        start.save(20)
    assert newest_samples(run) == 20


def test_a_state_is_data_and_never_code(run):
    class Code:
        def __reduce__(self):
            return os.system, ("true",)

    start = Started(run)
    start.saver.save({"task": Code(), "samples": 40}, 40, [], {})
    start.saver.wait()
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        checkpoint.read_state(run, checkpoint.lineage(run)[0])
