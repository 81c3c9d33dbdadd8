"""A night is done once, goes on where it was killed, and ends with one outcome that says why."""

import json
import threading

import pytest
import scheduler

from pipeline import lease, registry, storage
from pipeline.nightly import record, verdicts
from pipeline.nightly.config import NightConfig
from pipeline.nightly.night import Night, Stopped, Superseded, run
from pipeline.nightly.stages import promote
from pipeline.storage import Conflict


class Killed(BaseException):
    pass


def config(root: str) -> NightConfig:
    return NightConfig("race", "nowhere", root, "none")


def night(root: str, tick: str = "t1", **more) -> Night:
    return Night(config(root), None, tick, **more)


def stages(done: list[str], **instead):
    """Stages that only note that they ran; `instead`: what some of them do."""

    def stage(name, result):
        def body(night):
            done.append(name)
            return result(night) if callable(result) else result

        return name, body

    usual = {
        "fresh": {},
        "data": {"generations": [0]},
        "train": {},
        "score": lambda night: {"champion": night.champion.version, "decision": scheduler.DECISION},
        "publish": lambda night: {"version": scheduler.published(night.config, night.tick)},
        "promote": promote,
    }
    return [stage(name, result) for name, result in (usual | instead).items()]


def test_a_night_is_done_once(place):
    done = []
    first = run(night(place), stages(done))
    assert (first["outcome"], first["done"]) == ("promoted", False)
    again = run(night(place), stages(done))
    assert (again["outcome"], again["done"], again["stages"]) == ("promoted", True, first["stages"])
    assert done == ["fresh", "data", "train", "score", "publish", "promote"]
    assert [entry["night"] for entry in registry.history(config(place).registry, "race")] == ["t1"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_any_write_it_goes_on_and_ends_alike(tmp_path, monkeypatch, when):
    """Each compare-and-swap and each create-only write in turn is the last thing that the process does."""
    real = {name: getattr(storage, name) for name in ("replace", "write_new", "write")}
    for at in range(200):
        root, count = str(tmp_path / f"{when}{at}"), [0]

        def dying(name, count=count, at=at):
            def write(*args):
                count[0] += 1
                if count[0] == at + 1 and when == "before":
                    raise Killed
                result = real[name](*args)
                if count[0] == at + 1:
                    raise Killed
                return result

            return write

        for name in real:
            monkeypatch.setattr(storage, name, dying(name))
        killed = False
        try:
            run(night(root), stages([]))
        except Killed:
            killed = True
        for name, function in real.items():
            monkeypatch.setattr(storage, name, function)
        ended = run(night(root), stages([]))
        assert (ended["outcome"], ended["reason"]) == ("promoted", "so it is")
        past = registry.history(config(root).registry, "race")
        assert [(entry["epoch"], entry["night"]) for entry in past] == [(1, "t1")]
        assert record.read(root, "t1")["trained"] == [0]
        if not killed:
            break
    assert at > 10  # it was killed at so many places


def test_what_fails_is_the_outcome_and_the_same_command_goes_on_from_there(place):
    done = []

    def broken(night):
        raise ValueError("no such\npreset")

    ended = run(night(place), stages(done, train=broken))
    assert (ended["outcome"], ended["reason"], ended["mistake"]) == ("failed", "no such preset", True)
    assert record.read(place, "t1")["outcome"] == "failed"
    assert run(night(place), stages(done))["outcome"] == "promoted"
    assert done.count("data") == 1
    assert record.read(place, "t1")["attempts"] == 2


def test_a_second_process_finds_the_lease_and_leaves(place):
    with lease.claim(storage.join(place, ".night"), "another", ttl=2), pytest.raises(lease.Held, match="another"):
        run(night(place), stages([]), ttl=2)


def test_asked_to_stop_it_keeps_what_is_done(place):
    done, mine = [], night(place, stop=threading.Event())
    with pytest.raises(Stopped):
        run(mine, stages(done, data=lambda night: night.stop.set() or {"generations": [0]}))
    assert record.read(place, "t1")["stages"].keys() == {"fresh", "data"}
    assert run(night(place), stages(done))["outcome"] == "promoted"
    assert done.count("fresh") == done.count("data") == 1


def test_a_night_that_was_taken_over_writes_nothing_more(place):
    mine = record.take(place, "t1", lambda: None)
    theirs = record.take(place, "t1", lambda: None)
    with pytest.raises(Superseded):
        mine.mark("train", {})
    theirs.mark("train", {})
    assert record.read(place, "t1")["attempts"] == 2
    with pytest.raises(Superseded):
        mine.end("failed", "for no reason")


def test_a_zombie_that_is_about_to_promote_is_refused(place):
    """It has passed every check; then its successor takes over, and rejects. Nothing of the zombie may come after."""
    chosen = config(place)

    def late(zombie):
        record.take(place, "t1", lambda: None)
        registry.fence(chosen.registry, "race")
        return promote(zombie)

    with pytest.raises(Superseded):
        run(night(place), stages([], promote=late))
    assert registry.champion(chosen.registry, "race").version is None


def test_when_people_change_the_champion_meanwhile_the_challenger_is_judged_anew(place):
    chosen, done = config(place), []
    other = registry.publish(chosen.registry, "race", {"weights": b"by hand"}, {}, {})

    def by_hand(mine):
        if done.count("publish") == 1:
            registry.promote(chosen.registry, "race", other, registry.champion(chosen.registry, "race"), rule="hand",
                             why="")  # fmt: skip
        return {"version": scheduler.published(mine.config, mine.tick)}

    assert run(night(place), stages(done, publish=by_hand))["outcome"] == "promoted"
    assert done.count("train") == 1
    assert done.count("score") == 2
    past = registry.history(chosen.registry, "race")
    assert [entry["night"] for entry in past] == ["t1", ""]
    assert past[0]["previous"] == other
    assert record.read(place, "t1")["stages"]["score"]["champion"] == other


def test_a_night_left_behind_is_closed_by_the_next(place):
    with pytest.raises(Killed):
        run(night(place, "t1"), stages([], train=lambda night: (_ for _ in ()).throw(Killed())))
    assert run(night(place, "t2"), stages([]))["outcome"] == "promoted"
    old = record.read(place, "t1")
    assert (old["outcome"], old["reason"]) == ("failed", "it was not brought to an end before the night t2")


def test_a_version_that_was_rolled_back_is_not_promoted_again(place):
    chosen = config(place)
    first = registry.publish(chosen.registry, "race", {"weights": b"first"}, {}, {})
    again = scheduler.published(chosen, "t1")
    for version in (first, again):
        registry.promote(
            chosen.registry, "race", version, registry.champion(chosen.registry, "race"), rule="hand", why=""
        )
    registry.rollback(chosen.registry, "race", "bad")
    ended = run(night(place), stages([]))
    assert (ended["outcome"], ended["reason"]) == ("rejected", f"{again} was rolled back, and is blocked")


def test_what_follows_is_done_until_it_succeeds(place):
    said = []

    def after(night):
        said.append(night.record.doc["outcome"])
        return len(said) > 1

    for _ in range(3):
        run(night(place), stages([]), after=after)
    assert said == ["promoted", "promoted"]


def test_verdicts_are_given_once_and_changed_by_hand_alone(place):
    verdicts.give(place, [0, 1], "accepted", "", "a night")
    verdicts.give(place, [1, 2], "held", "dark", "another")
    assert verdicts.accepted(place) == [0, 1]
    verdicts.give(place, [2], "accepted", "seen", "me", anew=True)
    assert verdicts.accepted(place) == [0, 1, 2]
    assert verdicts.read(place)[2] == {"verdict": "accepted", "why": "seen", "by": "me"}


def test_a_change_by_many_at_once_loses_none(place):
    path = storage.join(place, "list.json")

    def add(number):
        storage.change(path, lambda old: json.dumps([*json.loads(old or b"[]"), number]).encode())

    threads = [threading.Thread(target=add, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(json.loads(storage.read(path))) == list(range(6))


def test_a_file_that_never_holds_still_is_an_error_and_no_endless_loop(tmp_path, monkeypatch):
    def refused(*_):
        raise Conflict("always")

    monkeypatch.setattr(storage, "write_new", refused)
    with pytest.raises(Conflict, match="changed all the time"):
        storage.change(str(tmp_path / "x"), lambda old: b"new")
