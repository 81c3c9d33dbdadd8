import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline import storage
from pipeline.storage import prefixes

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ODD = ["Z", "a b", "a#b", "a%2Fb", "a+b", "a-b/x", "a.b", "a/1", "a/b/c", "a=?&;", "b" * 200, "é", "日本/語", "🙂"]


def child(code: str, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-c", "import sys; from pipeline import storage\n" + code, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def visible(place: str) -> list[str]:
    return [file.path for file in storage.list_files(place)]


def everything(folder) -> list[str]:
    return [name for _, _, names in os.walk(folder) for name in names]


def test_what_was_written_is_read(place):
    path = storage.join(place, "folder", "file")
    assert not storage.exists(path)
    storage.write(path, b"0123456789")
    storage.write(path, b"abcdefghij")
    assert storage.exists(path)
    assert not storage.exists(storage.join(place, "folder"))
    assert storage.read(path) == b"abcdefghij"
    assert storage.read_range(path, 2, 5) == b"cde"
    assert storage.read_range(path, 10, 10) == b""
    assert storage.read_tagged(path)[0] == b"abcdefghij"
    (file,) = storage.list_files(place)
    assert (file.path, file.size) == ("folder/file", 10)
    storage.delete(path)
    storage.delete(path)
    assert not storage.exists(path)
    assert storage.name(path) == "file"


def test_listing_is_recursive_and_bytewise_sorted_whatever_the_names(place):
    for path in ODD:
        storage.write(f"{place}/{path}", path.encode())
    found = visible(place)
    assert found == sorted(ODD, key=str.encode)
    assert all(storage.read(f"{place}/{path}") == path.encode() for path in found)


@pytest.mark.parametrize("page", [1, 2, 3, 5, 1000])
def test_a_store_lists_the_same_by_pages_of_any_size(s3, monkeypatch, page):
    monkeypatch.setattr(prefixes, "PAGE", page)
    place, paths = s3.fresh(), [*ODD, *(f"{a}/{b}/{c}" for a in "xyz" for b in "pq" for c in "123"), "x/2", "x.3"]
    for path in paths:
        storage.write(f"{place}/{path}", b"1")
    storage.write(f"{place}-beside/x", b"1")  # begins alike, lies elsewhere
    assert visible(place) == sorted(paths, key=str.encode)
    assert visible(f"{place}/x") == sorted(path[2:] for path in paths if path.startswith("x/"))
    storage.delete_tree(place)
    assert visible(place) == []


def test_a_long_path_is_no_trouble(place):
    path = "/".join(["k" * 200] * 4)
    storage.write(f"{place}/{path}", b"1")
    assert visible(place) == [path]


def test_a_name_of_the_longest_length_can_be_written_locally(tmp_path):
    storage.write(f"{tmp_path}/{'n' * 255}", b"1")
    assert visible(str(tmp_path)) == ["n" * 255]


def test_names_that_are_not_utf8_are_listed_and_read(tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9.jpg", "wb") as file:
        file.write(b"1")
    (name,) = visible(str(tmp_path))
    assert os.fsencode(name) == b"caf\xe9.jpg"
    assert storage.read(f"{tmp_path}/{name}") == b"1"


def test_links_are_followed_without_looping_and_special_files_left_out(tmp_path):
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "real" / "deep" / "x").write_bytes(b"1")
    (tmp_path / "real" / "deep" / "up").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "real")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "fifo")
    assert visible(str(tmp_path)) == ["again/deep/x", "nowhere", "real/deep/x"]


def test_links_to_themselves_are_listed_as_leading_nowhere(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "c").write_bytes(b"1")
    assert [(file.path, file.size) for file in storage.list_files(str(tmp_path))] == [("a", 0), ("b", 0), ("c", 1)]


def test_a_new_tag_marks_a_changed_file(place):
    path = f"{place}/x"
    storage.write(path, b"1")
    (before,) = storage.list_files(place)
    storage.write(path, b"22")
    (after,) = storage.list_files(place)
    assert before.tag != after.tag


def test_what_is_missing_is_named(place):
    for call in (storage.read, storage.read_tagged, lambda path: storage.read_range(path, 0, 1)):
        with pytest.raises(FileNotFoundError) as e:
            call(f"{place}/missing")
        assert e.value.filename == f"{place}/missing"


def test_a_missing_folder_or_bucket_is_an_error_and_an_empty_prefix_is_not(s3, tmp_path):
    with pytest.raises(FileNotFoundError, match="gone"):
        storage.list_files(f"{tmp_path}/gone")
    with pytest.raises(FileNotFoundError, match="no bucket nobody-made-this"):
        storage.list_files("s3://nobody-made-this/x")
    with pytest.raises(FileNotFoundError, match="no bucket nobody-made-this"):
        storage.write("s3://nobody-made-this/x", b"")
    with (
        pytest.raises(FileNotFoundError, match="no bucket nobody-made-this"),
        storage.writer("s3://nobody-made-this/x") as file,
    ):
        file.write(bytes(20 * 2**20))
    assert storage.list_files(s3.fresh()) == []


def test_a_file_cut_short_is_not_read_as_whole(place):
    storage.write(f"{place}/x", b"0123456789")
    for start, end in [(5, 11), (10, 11), (20, 30)]:
        with pytest.raises(storage.StorageError, match="truncated"):
            storage.read_range(f"{place}/x", start, end)
    with pytest.raises(ValueError, match="no such range"):
        storage.read_range(f"{place}/x", 3, 2)


def test_ranged_reads_from_many_threads_do_not_mix(place):
    storage.write(f"{place}/x", bytes(range(256)))
    with ThreadPoolExecutor(16) as pool:
        found = pool.map(lambda at: storage.read_range(f"{place}/x", at, at + 1), range(256))
        assert b"".join(found) == bytes(range(256))


def test_names_that_climb_are_refused():
    assert storage.join("/a/", "b", "c/") == "/a/b/c"
    assert storage.join("/", "b") == "/b"
    assert storage.join("s3://bucket", "b") == "s3://bucket/b"
    for part in ("../x", "/etc/passwd", "a/../../x"):
        with pytest.raises(ValueError, match="leads out"):
            storage.join("base", part)
    with pytest.raises(ValueError, match="unknown scheme"):
        storage.read("http://x/y")


@pytest.mark.parametrize("size", [0, 5, 40 * 2**20])
def test_a_writer_shows_nothing_before_its_end_and_leaves_nothing_when_it_fails(place, size):
    path, data = f"{place}/deep/x", os.urandom(size)

    def fail():
        with storage.writer(path) as file:
            file.write(data)
            assert not storage.exists(path)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert visible(place) == []
    with storage.writer(path) as file:
        file.write(data)
        assert visible(place) == []
    assert storage.read(path) == data
    if not storage.is_remote(place):
        assert everything(place) == ["x"]


def test_a_killed_writer_leaves_the_old_content_and_a_sweep_removes_its_trace(place):
    storage.write(f"{place}/x", b"old")
    code = "with storage.writer(sys.argv[1]) as f: f.write(bytes(40 << 20)); print('in', flush=True); sys.stdin.read()"
    with child(code, f"{place}/x") as killed:
        assert killed.stdout.readline() == "in\n"
        assert visible(place) == ["x"]
        assert storage.sweep_partial(place) == []  # its writer lives
        killed.kill()
    assert visible(place) == ["x"]
    assert storage.read(f"{place}/x") == b"old"
    if not storage.is_remote(place):
        assert len(storage.sweep_partial(place)) == 1
        assert everything(place) == ["x"]


def test_a_sweep_never_takes_the_file_of_a_live_writer(tmp_path):
    done = threading.Event()

    def sweep():
        while not done.is_set():
            storage.sweep_partial(str(tmp_path))

    with ThreadPoolExecutor(1) as pool:
        sweeping = pool.submit(sweep)
        try:
            for n in range(300):
                storage.write(f"{tmp_path}/{n % 7}", b"%d" % n)
        finally:
            done.set()
        sweeping.result(10)
    assert sorted(everything(tmp_path)) == list("0123456")


def test_a_disk_that_fills_up_is_named_and_nothing_is_left(tmp_path):
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
for put in (storage.write, storage.write_new):
    try:
        put(sys.argv[1], bytes(2 << 20))
    except OSError as e:
        print(e.filename == sys.argv[1], e.strerror)
"""
    with child(code, f"{tmp_path}/x") as full:
        assert full.communicate(timeout=30)[0] == "True File too large\n" * 2
    assert everything(tmp_path) == []


def test_only_one_of_several_creators_wins_even_with_the_same_bytes(place):
    def create(path: str) -> bool:
        try:
            storage.write_new(path, b"same")
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        for n in range(4):
            assert sum(pool.map(create, [f"{place}/{n}"] * 6)) == 1


def test_compare_and_swap_refuses_what_changed_or_is_gone(place):
    path = f"{place}/x"
    first = storage.write_new(path, b"1")
    assert storage.read_tagged(path) == (b"1", first)
    second = storage.replace(path, b"2", first)
    with pytest.raises(storage.Conflict):
        storage.replace(path, b"3", first)
    with pytest.raises(storage.Conflict):
        storage.delete(path, first)
    assert storage.read_tagged(path) == (b"2", second)
    storage.delete(path, second)
    with pytest.raises(storage.Conflict):
        storage.replace(path, b"3", second)
    assert visible(place) == []


def test_processes_that_count_by_compare_and_swap_lose_no_step(place):
    path = f"{place}/counter"
    storage.write_new(path, b"0")
    code = """
done = 0
while done < 10:
    data, tag = storage.read_tagged(sys.argv[1])
    try:
        storage.replace(sys.argv[1], b"%d" % (int(data) + 1), tag)
        done += 1
    except storage.Conflict:
        pass
"""
    counters = [child(code, path) for _ in range(3)]
    for counter in counters:
        counter.communicate(timeout=60)
        assert counter.returncode == 0
    assert storage.read(path) == b"30"
    if not storage.is_remote(place):
        assert everything(place) == ["counter"]


def test_delete_tree_takes_what_is_below_and_no_more(place):
    for path in ("a/1", "a/b/2", "ab"):
        storage.write(f"{place}/{path}", b"")
    storage.delete_tree(f"{place}/a")
    storage.delete_tree(f"{place}/a")
    assert visible(place) == ["ab"]


def test_a_whole_bucket_or_disk_is_never_deleted():
    for path in ("s3://bucket", "s3://bucket/", "/"):
        with pytest.raises(ValueError, match="will not delete"):
            storage.delete_tree(path)


def test_the_filesystem_serves_others_and_travels_without_credentials(place):
    storage.write(f"{place}/x", b"1")
    fs, inside = storage.filesystem(place)
    packed = pickle.dumps(fs)
    assert os.environ.get("AWS_SECRET_ACCESS_KEY", "testsecret").encode() not in packed
    assert pickle.loads(packed).cat_file(f"{inside}/x") == b"1"


def test_local_work_does_not_import_the_s3_client(tmp_path):
    code = "storage.write(sys.argv[1], b''); storage.list_files('.'); print('s3fs' in sys.modules)"
    with child(code, f"{tmp_path}/x") as local:
        assert local.communicate(timeout=30)[0] == "False\n"
