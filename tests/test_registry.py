"""Versions stay what was published; one swap makes a champion, one takes it back; whoever lost hears of it."""

import json
import threading

import pytest

from pipeline import registry, storage
from pipeline.storage import Conflict


def publish(place: str, content: str, name: str = "cats") -> str:
    return registry.publish(place, name, {"weights": content.encode()}, {"kind": "none"}, {"metrics": {"of": content}})


def promote(place: str, version: str, **more) -> registry.Champion:
    return registry.promote(
        place, "cats", version, registry.champion(place, "cats"), rule="superior", why="better", **more
    )


def test_a_version_is_named_by_its_content_and_stored_once(place):
    one, other = publish(place, "a"), publish(place, "b")
    first = registry.describe(registry.version_path(place, "cats", one))
    assert publish(place, "a") == one != other
    assert registry.describe(registry.version_path(place, "cats", one)) == first
    assert {info["version"] for info in registry.versions(place, "cats")} == {one, other}
    assert registry.read_file(registry.version_path(place, "cats", one), first, "weights") == b"a"
    assert registry.names(place) == ["cats"]


def test_what_was_changed_after_it_was_published_is_refused(tmp_path):
    path = registry.version_path(str(tmp_path), "cats", publish(str(tmp_path), "a"))
    info = registry.describe(path)
    storage.write(f"{path}/weights", b"b")
    with pytest.raises(ValueError, match="weights is damaged"):
        registry.read_file(path, info, "weights")
    storage.delete(f"{path}/weights")
    with pytest.raises(ValueError, match="weights is missing"):
        registry.read_file(path, info, "weights")
    storage.write(f"{path}/model.json", json.dumps(info | {"model": {"kind": "another"}}).encode())
    with pytest.raises(ValueError, match="was changed after it was published"):
        registry.describe(path)
    storage.write(f"{path}/model.json", b"{")
    with pytest.raises(ValueError, match="not JSON"):
        registry.describe(path)


def test_promotion_and_rollback_are_a_line_of_succession_that_the_history_keeps(place):
    a, b, c = (publish(place, name) for name in "abc")
    assert registry.champion(place, "cats").version is None
    for version in (a, b, c):
        assert promote(place, version, night=f"night of {version}").version == version
    back = registry.rollback(place, "cats", "worse in use")
    assert (back.version, back.previous, back.blocked) == (b, a, (c,))
    with pytest.raises(ValueError, match=f"{c} was rolled back, and is blocked"):
        promote(place, c)
    assert promote(place, c, unblock=True).blocked == ()
    further = registry.rollback(place, "cats", "all of it", to=a)
    assert (further.version, set(further.blocked)) == (a, {b, c})
    with pytest.raises(ValueError, match="no champion before"):
        registry.rollback(place, "cats", "once more")
    with pytest.raises(ValueError, match="was not champion"):
        registry.rollback(place, "cats", "forward", to=c)
    past = registry.history(place, "cats")
    assert [(e["epoch"], e["action"], e["version"], e["previous"]) for e in past] == [
        (6, "rollback", a, None), (5, "promote", c, b), (4, "rollback", b, a),
        (3, "promote", c, b), (2, "promote", b, a), (1, "promote", a, None),
    ]  # fmt: skip
    assert past[-1]["night"] == f"night of {a}"
    assert all(entry["by"] and entry["time"] for entry in past)


def test_a_crash_after_the_swap_leaves_no_gap_in_the_history(place):
    a, b = publish(place, "a"), publish(place, "b")
    promote(place, a)
    storage.delete(storage.join(place, "cats/history/000001.json"))  # as if killed before it was written
    assert [entry["version"] for entry in registry.history(place, "cats")] == [a]
    promote(place, b)
    assert [entry["version"] for entry in registry.history(place, "cats")] == [b, a]


def test_of_two_promotions_at_once_one_wins_and_the_other_hears_of_it(place):
    seen, versions = registry.champion(place, "cats"), [publish(place, str(n)) for n in range(6)]
    promote(place, versions[0])
    for tag in (seen, registry.champion(place, "cats")):
        won, lost, gate = [], [], threading.Barrier(5)

        def swap(version, tag=tag, won=won, lost=lost, gate=gate):
            gate.wait(20)
            try:
                won.append(registry.promote(place, "cats", version, tag, rule="superior", why="").version)
            except Conflict:
                lost.append(version)

        threads = [threading.Thread(target=swap, args=(version,)) for version in versions[1:]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert (len(won), len(lost)) == ((0, 5) if tag is seen else (1, 4))
    assert registry.champion(place, "cats").version == won[0]


def test_a_fence_makes_older_tags_useless_and_changes_no_champion(place):
    a, b = publish(place, "a"), publish(place, "b")
    promote(place, a)
    zombie = registry.champion(place, "cats")
    mine = registry.fence(place, "cats")
    assert (mine.version, mine.epoch) == (zombie.version, zombie.epoch)
    with pytest.raises(Conflict):
        registry.promote(place, "cats", b, zombie, rule="superior", why="")
    assert registry.promote(place, "cats", b, mine, rule="superior", why="").version == b
    assert registry.champion(place, "cats").mark == mine.mark  # so the night knows that nobody fenced it


def test_who_may_no_longer_write_does_not_fence(place):
    a, b = publish(place, "a"), publish(place, "b")
    promote(place, a)
    mine = registry.fence(place, "cats")

    def lost():
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        registry.fence(place, "cats", lost)
    assert registry.promote(place, "cats", b, mine, rule="superior", why="").version == b


def test_the_anchor_stays_while_fresh_models_come_and_go(place):
    a, b, c = (publish(place, name) for name in "abc")
    promote(place, a)
    seen = registry.champion(place, "cats")
    fresh = registry.promote(place, "cats", b, seen, rule="fresh", why="newer")
    assert (fresh.version, fresh.anchor) == (b, a)
    assert promote(place, c).anchor == c


def test_what_nobody_needs_is_collected_and_cannot_be_promoted_meanwhile(place):
    a, b, c, e, d = (publish(place, name) for name in "abced")  # e was published by hand, and waits
    for version in (a, b, c, d):
        promote(place, version)
    registry.pin(place, "cats", a, "of record")
    before = registry.champion(place, "cats")
    newer = publish(place, "f")  # published after the champion: a night may be about to promote it
    assert registry.collect(place, "cats", keep=1) == [b]
    assert {info["version"] for info in registry.versions(place, "cats")} == {a, c, d, e, newer}
    with pytest.raises(Conflict):
        registry.promote(place, "cats", newer, before, rule="superior", why="")
    with pytest.raises(ValueError, match="no version"):
        promote(place, b)
    with pytest.raises(ValueError, match="was not champion"):
        registry.rollback(place, "cats", "", to=b)
    assert registry.rollback(place, "cats", "").version == c


def test_a_name_says_where_and_which(tmp_path, monkeypatch):
    root = str(tmp_path / "models")
    a, b = publish(root, "a"), publish(root, "b")
    promote(root, a)
    monkeypatch.delenv("MILLSTREAM_MODELS", raising=False)
    assert registry.resolve(f"models:{root}/cats@champion") == registry.version_path(root, "cats", a)
    assert registry.resolve(f"models:{root}/cats") == registry.version_path(root, "cats", a)
    with pytest.raises(ValueError, match="MILLSTREAM_MODELS"):
        registry.resolve("models:cats@champion")
    monkeypatch.setenv("MILLSTREAM_MODELS", root)
    assert registry.resolve("models:cats@champion") == registry.version_path(root, "cats", a)
    assert registry.resolve(f"models:cats@{b}") == registry.version_path(root, "cats", b)
    assert registry.parse("models:s3://lake/models/cats@champion") == ("s3://lake/models", "cats", "champion")
    for wrong, why in (("models:dogs", "dogs has no.*there are cats"), ("models:cats@nosuch", "no version nosuch"),
                       ("models:", "write models:"), ("models:..@x", "write models:")):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            registry.resolve(wrong)


def test_a_bucket_that_is_not_there_is_no_empty_registry(s3, tmp_path):
    with pytest.raises(FileNotFoundError, match="no bucket"):
        registry.names("s3://millstream-nowhere/models")
    assert registry.names(str(tmp_path / "nowhere")) == []
    with pytest.raises(ValueError, match="cats has no champion in"):
        registry.rollback(str(tmp_path), "cats", "")


def test_a_champion_file_that_cannot_be_read_is_named(tmp_path):
    storage.write(str(tmp_path / "cats" / "champion.json"), b'{"who": 1}')
    with pytest.raises(ValueError, match=r"champion\.json cannot be read"):
        registry.champion(str(tmp_path), "cats")
