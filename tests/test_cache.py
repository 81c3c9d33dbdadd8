"""The cache gives the origin's bytes whatever happens to its folder, asks the origin once, and keeps to its limit."""

import contextlib
import functools
import hashlib
import itertools
import os
import random
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import warnings

import pytest
from s3_server import wait_for

from pipeline.loading import cache as caches
from pipeline.loading.cache import default_folder

Cache = functools.partial(caches.Cache, readahead=1)
BLOCK = 1 << 16
STORED = BLOCK + 8  # with its checksum
LARGE = 1 << 40


class Origin:
    """A shard far away: `fetch` as the cache takes it; `asked` lists the ranges it was asked for."""

    def __init__(self, size, seed=0):
        self.data = random.Random(seed).randbytes(size)
        self.digest, self.asked = hashlib.sha256(self.data).hexdigest(), []

    def fetch(self, path, start, end):
        assert path == "s3://far/shard.tar"
        assert 0 <= start < end <= len(self.data)
        self.asked.append((start, end))
        return self.data[start:end]

    def by(self, cache, start, end):
        """[start, end) through the cache, which must be the origin's bytes; whether the origin was asked."""
        before = len(self.asked)
        data = cache.read_range("s3://far/shard.tar", start, end, self.digest, len(self.data), self.fetch)
        assert type(data) is bytes
        assert data == self.data[start:end]
        return len(self.asked) > before


def stored(folder):
    """Paths of the blocks below a cache's folder."""
    found = [os.path.join(at, name) for at, _, names in os.walk(folder) for name in names]
    return sorted(path for path in found if path.endswith(tuple("0123456789")) and "-" in os.path.basename(path))


def used(folder):
    total = 0
    for path in stored(folder):
        with contextlib.suppress(FileNotFoundError):  # dropped by another process meanwhile
            total += os.path.getsize(path)
    return total


@pytest.fixture
def folder(tmp_path):
    return str(tmp_path / "cache")


@pytest.mark.parametrize("block", [BLOCK, 4 * BLOCK])
def test_any_ranges_in_any_order_are_the_origins_bytes_and_come_from_it_once(folder, block):
    origin, draw = Origin(20 * BLOCK + 4321), random.Random(5)
    for _ in range(3):  # the second and third find what the first left
        cache = Cache(folder, LARGE, block)
        for _ in range(150):
            start, end = sorted(draw.randrange(len(origin.data) + 1) for _ in range(2))
            origin.by(cache, start, end)
    taken = sorted(origin.asked)
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(taken))
    assert sum(end - start for start, end in taken) <= len(origin.data)
    assert cache.misses == cache.errors == 0
    assert not os.listdir(f"{folder}/blocks/partial")


def test_missing_blocks_side_by_side_are_one_request_that_ends_with_the_shard(folder):
    origin, cache = Origin(10 * BLOCK + 10), Cache(folder, LARGE, BLOCK)
    origin.by(cache, 4 * BLOCK + 5, 4 * BLOCK + 6)
    origin.by(cache, 10, 10 * BLOCK + 1)
    assert origin.asked == [(4 * BLOCK, 5 * BLOCK), (0, 4 * BLOCK), (5 * BLOCK, 10 * BLOCK + 10)]
    assert (cache.hits, cache.misses) == (BLOCK, 1 + 9 * BLOCK + 1 - 10)


def test_a_shard_made_anew_under_its_name_is_another_one(folder):
    cache, before, after = Cache(folder, LARGE, BLOCK), Origin(100_000, 1), Origin(100_000, 2)
    before.by(cache, 0, 100_000)
    assert after.by(cache, 0, 100_000)
    assert not before.by(cache, 0, 100_000)


def flip(path, at):
    with open(path, "r+b") as file:
        file.seek(at, os.SEEK_SET if at >= 0 else os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


DAMAGE = {
    "checksum flipped": lambda path: flip(path, 3),
    "first byte flipped": lambda path: flip(path, 32),
    "last byte flipped": lambda path: flip(path, -1),
    "cut by a byte": lambda path: os.truncate(path, os.path.getsize(path) - 1),
    "cut by a page": lambda path: os.truncate(path, os.path.getsize(path) - BLOCK),
    "cut inside the checksums": lambda path: os.truncate(path, 9),
    "empty": lambda path: os.truncate(path, 0),
    "zeros": lambda path: (os.truncate(path, 0), os.truncate(path, 32 + 4 * BLOCK)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_block_is_fetched_again_once(folder, damage):
    origin, cache = Origin(4 * BLOCK), Cache(folder, LARGE, 4 * BLOCK)
    origin.by(cache, 0, 4 * BLOCK)
    damage(*stored(folder))
    assert origin.by(cache, 0, 4 * BLOCK)
    assert cache.errors == 1
    assert not origin.by(cache, 0, 4 * BLOCK)


def test_a_read_beside_the_damage_does_not_care(folder):
    origin, cache = Origin(4 * BLOCK), Cache(folder, LARGE, 4 * BLOCK)
    origin.by(cache, 0, 4 * BLOCK)
    flip(*stored(folder), -1)
    assert not origin.by(cache, 0, 3 * BLOCK)
    assert origin.by(cache, 3 * BLOCK, 4 * BLOCK)


def test_what_was_forgotten_comes_from_the_origin_and_nothing_else_does(folder):
    origin, cache = Origin(4 * BLOCK), Cache(folder, LARGE, BLOCK)
    origin.by(cache, 0, 4 * BLOCK)
    cache.forget(BLOCK + 7, BLOCK + 8, origin.digest)
    origin.by(cache, 0, 4 * BLOCK)
    assert origin.asked[1:] == [(BLOCK, 2 * BLOCK)]
    assert Cache(folder, LARGE, BLOCK).errors == 0


def test_threads_that_want_the_same_blocks_fetch_them_once(folder):
    origin, cache, go, entered = Origin(8 * BLOCK), Cache(folder, LARGE, BLOCK), threading.Event(), []

    def slow(path, start, end):
        entered.append(start)
        assert go.wait(20)
        return origin.fetch(path, start, end)

    def read(start):
        got = cache.read_range("s3://far/shard.tar", start, start + 3 * BLOCK, origin.digest, 8 * BLOCK, slow)
        assert got == origin.data[start : start + 3 * BLOCK]
        done.append(start)

    done, starts = [], [0, 0, 0, BLOCK, 2 * BLOCK, 2 * BLOCK]
    threads = [threading.Thread(target=read, args=(start,)) for start in starts]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(entered) >= 2, 20, "two requests")
    go.set()
    for thread in threads:
        thread.join(20)
    assert sorted(done) == starts
    assert sum(end - start for start, end in origin.asked) == 5 * BLOCK


def test_a_request_that_fails_fails_every_reader_of_its_blocks_and_none_after(folder):
    origin, cache, go, failures = Origin(BLOCK), Cache(folder, LARGE, BLOCK), threading.Event(), []

    def broken(path, start, end):
        assert go.wait(20)
        raise FileNotFoundError(path)

    def read():
        try:
            cache.read_range("s3://far/shard.tar", 0, 9, origin.digest, BLOCK, broken)
        except FileNotFoundError as e:
            failures.append(str(e))

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    go.set()
    for thread in threads:
        thread.join(20)
    assert failures == ["s3://far/shard.tar"] * 3
    assert origin.by(cache, 0, BLOCK)


def aged(folder, seconds):
    """The same folder, as if all in it had last been used so much earlier."""
    for path in stored(folder):
        when = os.stat(path).st_mtime - seconds
        os.utime(path, (when, when))


def test_what_was_unused_for_longest_makes_room(folder):
    old, new = Origin(10 * BLOCK, 1), Origin(3 * BLOCK, 2)
    old.by(Cache(folder, LARGE, BLOCK), 0, 10 * BLOCK)
    aged(folder, 5000)
    old.by(Cache(folder, LARGE, BLOCK), 0, 5 * BLOCK)  # used again: the other half is older now
    aged(folder, 1000)
    cache = Cache(folder, 10 * STORED, BLOCK)
    new.by(cache, 0, 3 * BLOCK)
    assert used(folder) <= 10 * STORED
    assert not new.by(cache, 0, 3 * BLOCK)
    assert not old.by(cache, 0, 5 * BLOCK)
    assert old.by(cache, 5 * BLOCK, 10 * BLOCK)


def test_an_epoch_larger_than_the_limit_hits_what_fits_and_streams_the_rest_as_it_is_asked(folder):
    origin, cache = Origin(20 * BLOCK), Cache(folder, 10 * STORED, BLOCK)
    for _ in range(3):
        for at in range(0, 20 * BLOCK, BLOCK):
            origin.by(cache, at + 100, at + 200)
    assert cache.hits == 2 * 10 * 100
    kept, refused, streamed = origin.asked[:10], origin.asked[10], origin.asked[11:]
    assert [*kept, refused] == [(at, at + BLOCK) for at in range(0, 11 * BLOCK, BLOCK)]
    rest = [(at + 100, at + 200) for at in range(10 * BLOCK, 20 * BLOCK, BLOCK)]
    assert streamed == (rest * 3)[1:]
    assert used(folder) == 10 * STORED


READER = """
import sys, random
sys.path.insert(0, sys.argv[1])
from test_cache import BLOCK, STORED, Cache, Origin, used
origin, draw, most = Origin(40 * BLOCK, int(sys.argv[3])), random.Random(), 0
for _ in range(4):
    cache = Cache(sys.argv[2], 20 * STORED, BLOCK)
    for _ in range(60):
        start = draw.randrange(39 * BLOCK)
        origin.by(cache, start, start + BLOCK)
        most = max(most, used(sys.argv[2]))
print(most // STORED, cache.errors)
"""


def test_two_runs_at_once_share_the_folder_and_the_limit(folder):
    command = [sys.executable, "-c", READER, os.path.dirname(__file__), folder]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdout": subprocess.PIPE, "text": True, "env": environment}
    runs = [subprocess.Popen([*command, str(seed)], **pipes) for seed in (1, 2)]
    try:
        told = [run.communicate(timeout=60)[0].split() for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0]
    for most, errors in told:
        assert 10 < int(most) <= 22
        assert errors == "0"


def test_a_count_that_was_lost_is_taken_again(folder):
    origin, cache = Origin(12 * BLOCK), Cache(folder, 10 * STORED, BLOCK)
    origin.by(cache, 0, 8 * BLOCK)
    os.unlink(f"{folder}/blocks/usage")
    origin.by(cache, 8 * BLOCK, 12 * BLOCK)
    assert used(folder) == 10 * STORED
    with open(f"{folder}/blocks/usage", "wb") as file:
        file.write((LARGE).to_bytes(8, "little"))  # as if killed writers had taken room for all that
    shutil.rmtree(os.path.dirname(stored(folder)[0]))
    origin.by(Cache(folder, 10 * STORED, BLOCK), 0, 5 * BLOCK)
    assert used(folder) == 5 * STORED


def test_nothing_but_blocks_is_ever_deleted(folder):
    origin = Origin(20 * BLOCK)
    origin.by(Cache(folder, LARGE, BLOCK), 0, BLOCK)
    home = os.path.dirname(stored(folder)[0])
    names = [f"{folder}/mine-1", f"{folder}/blocks/mine", f"{home}/{origin.digest}", f"{home}/notes.txt"]
    names += [f"{folder}/blocks/partial/mine.part", f"{folder}/blocks/zz/{origin.digest}-{BLOCK}-0"]
    for path in names:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(bytes(30 * BLOCK))
        os.utime(path, (0, 0))
    aged(home, 9999)
    cache = Cache(folder, 4 * STORED, BLOCK)
    for at in range(0, 20 * BLOCK, BLOCK):
        origin.by(cache, at, at + BLOCK)
    assert all(os.path.getsize(path) == 30 * BLOCK for path in names)


def once(caught):
    """The one warning among `caught`."""
    assert len(caught) == 1
    return str(caught[0].message)


def test_a_full_disk_ends_the_writing_with_one_warning(folder):
    origin, cache = Origin(20 * BLOCK), Cache(folder, LARGE, BLOCK)
    origin.by(cache, 0, 5 * BLOCK)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BLOCK // 2, hard))
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for at in range(3 * BLOCK, 20 * BLOCK, BLOCK):
                origin.by(cache, at + 10, at + 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in once(caught)
    assert origin.asked[2:] == [(at + 10, at + 20) for at in range(6 * BLOCK, 20 * BLOCK, BLOCK)]
    assert not origin.by(cache, 0, 5 * BLOCK)  # what is there is still read
    assert not os.listdir(f"{folder}/blocks/partial")
    assert len(stored(folder)) == 5


def test_a_folder_that_vanishes_ends_the_writing_with_one_warning_and_is_not_made_again(folder):
    origin, cache = Origin(8 * BLOCK), Cache(folder, LARGE, BLOCK)
    origin.by(cache, 0, 2 * BLOCK)
    shutil.rmtree(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for at in range(0, 8 * BLOCK, BLOCK):
            origin.by(cache, at, at + BLOCK)
    assert folder in once(caught)
    assert not os.path.exists(folder)


@pytest.fixture
def nobodys():
    """A folder's path, of one who is not root: nothing is read-only for root."""
    with tempfile.TemporaryDirectory() as base:
        if os.geteuid():
            yield f"{base}/cache"
            return
        os.chown(base, 65534, 65534)
        os.seteuid(65534)
        try:
            yield f"{base}/cache"
        finally:
            os.seteuid(0)


def test_a_read_only_folder_is_read_and_warned_of_once(nobodys):
    folder = nobodys
    origin = Origin(4 * BLOCK)
    origin.by(Cache(folder, LARGE, BLOCK), 0, 2 * BLOCK)
    closed = [at for at, _, _ in os.walk(folder)]
    for path in [*closed, f"{folder}/blocks/usage"]:
        os.chmod(path, 0o555)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cache = Cache(folder, LARGE, BLOCK)
            assert not origin.by(cache, 0, 2 * BLOCK)
            assert origin.by(cache, 0, 4 * BLOCK)
            assert origin.by(cache, 0, 4 * BLOCK)
        assert "Permission denied" in once(caught)
    finally:
        for path in closed:
            os.chmod(path, 0o755)


def test_a_folder_that_cannot_be_made_is_warned_of_once(tmp_path):
    origin = Origin(4 * BLOCK)
    (tmp_path / "file").write_bytes(b"")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache = Cache(str(tmp_path / "file" / "cache"), LARGE, BLOCK)
        origin.by(cache, 5, 50)
        origin.by(cache, 5, 50)
    assert str(tmp_path / "file") in once(caught)
    assert origin.asked == [(5, 50)] * 2


def test_what_makes_no_sense_is_refused_by_name(folder):
    with pytest.raises(ValueError, match="1000 bytes does not hold one block of 2097152"):
        Cache(folder, 1000)
    with pytest.raises(ValueError, match="block size 1000 is not a multiple of 65536"):
        Cache(folder, LARGE, 1000)
    cache = Cache(folder, LARGE)
    for digest in ("../../etc", "A" * 64, "0" * 63, "0" * 64 + "\n"):
        with pytest.raises(ValueError, match="not a SHA-256 in hex"):
            cache.read_range("s3://far/shard.tar", 0, 1, digest, 1)
    with pytest.raises(ValueError, match=r"shard\.tar: no range \[5, 11\) in a shard of 10 bytes"):
        cache.read_range("s3://far/shard.tar", 5, 11, "0" * 64, 10)
    assert cache.read_range("s3://far/shard.tar", 5, 5, "0" * 64, 10) == b""


def test_the_default_folder_is_the_users_own(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MILLSTREAM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_folder() == f"{tmp_path}/.cache/millstream"
    Cache(default_folder(), LARGE)
    assert stat.S_IMODE(os.stat(default_folder()).st_mode) == 0o700
    monkeypatch.setenv("XDG_CACHE_HOME", f"{tmp_path}/xdg")
    assert default_folder() == f"{tmp_path}/xdg/millstream"
    monkeypatch.setenv("MILLSTREAM_CACHE", f"{tmp_path}/own")
    assert default_folder() == f"{tmp_path}/own"


def test_the_second_miss_among_neighbours_fetches_the_rest_of_them(folder):
    origin, cache = Origin(11 * BLOCK - 5), caches.Cache(folder, LARGE, BLOCK, readahead=4)
    assert origin.by(cache, BLOCK + 3, BLOCK + 9)
    assert origin.asked == [(BLOCK, 2 * BLOCK)]
    assert origin.by(cache, 3 * BLOCK, 3 * BLOCK + 1)
    assert origin.asked[1:] == [(0, BLOCK), (2 * BLOCK, 4 * BLOCK)]
    assert not origin.by(cache, 0, 4 * BLOCK)
    assert origin.by(cache, 10 * BLOCK, 11 * BLOCK - 5)  # the last group is a short one
    assert origin.by(cache, 8 * BLOCK, 8 * BLOCK + 1)
    assert origin.asked[3:] == [(10 * BLOCK, 11 * BLOCK - 5), (8 * BLOCK, 10 * BLOCK)]
    assert cache.misses == 6 + 1 + BLOCK - 5 + 1
