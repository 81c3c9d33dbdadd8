import hashlib
import io
import tarfile

import pytest

from pipeline import storage
from pipeline.shards import tar

SAMPLES = [
    (f"{i:020x}", {"png": bytes([i]) * (i * 300), "cls": b"%d" % i, "json": b'{"source": "x"}'}) for i in range(9)
]


@pytest.mark.parametrize(("name", "size"), [("a.jpg", 0), ("0" * 95 + ".jpg", 8**11 - 1), ("k.cls", 1), ("é.jpg", 1)])
def test_headers_are_those_of_tarfile(name, size):
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o644, 0
    if not name.isascii():
        with pytest.raises(ValueError, match="ASCII"):
            tar.header(name, size)
    else:
        assert tar.header(name, size) == info.tobuf(tarfile.USTAR_FORMAT)


def test_names_and_sizes_not_every_reader_takes_are_refused():
    with pytest.raises(ValueError, match="99"):
        tar.header("x" * 100, 1)
    with pytest.raises(ValueError, match="8 GiB"):
        tar.header("x.jpg", 8**11)


def test_a_shard_is_byte_for_byte_what_tarfile_writes(tmp_path):
    written = tar.write_shard(str(tmp_path / "s.tar"), SAMPLES)
    expected = io.BytesIO()
    with tarfile.open(fileobj=expected, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for key, members in SAMPLES:
            for extension in sorted(members):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(members[extension])
                archive.addfile(info, io.BytesIO(members[extension]))
    data = (tmp_path / "s.tar").read_bytes()
    assert data == expected.getvalue()
    assert written.bytes == len(data)
    assert written.sha256 == hashlib.sha256(data).hexdigest()


def test_offsets_lead_to_the_payloads_and_scan_finds_them_again(tmp_path):
    path = str(tmp_path / "s.tar")
    written = tar.write_shard(path, SAMPLES)
    for (_, members), where in zip(SAMPLES, written.offsets, strict=True):
        for extension, (offset, size) in where.items():
            assert tar.read_sample(path, offset, size) == members[extension]
    for i, sample in enumerate(tar.scan(path)):
        assert (sample.key, sample.label, sample.extension) == (SAMPLES[i][0], i, "png")
        assert (sample.offset, sample.size) == written.offsets[i]["png"]
        assert sample.facts == {"source": "x"}


def test_a_damaged_shard_is_named(tmp_path):
    path = tmp_path / "s.tar"
    tar.write_shard(str(path), SAMPLES)
    path.write_bytes(b"x" + path.read_bytes()[1:])
    with pytest.raises(ValueError, match=r"s\.tar is damaged"):
        list(tar.scan(str(path)))
    tar.write_shard(str(path), [("k", {"cls": b"1"})])
    with pytest.raises(ValueError, match="an image and a"):
        list(tar.scan(str(path)))


def test_a_shard_whose_samples_fail_midway_never_appears(tmp_path):
    def samples():
        yield SAMPLES[0]
        raise OSError("the source went away")

    with pytest.raises(OSError, match="went away"):
        tar.write_shard(str(tmp_path / "s.tar"), samples())
    assert storage.list_files(str(tmp_path)) == []
