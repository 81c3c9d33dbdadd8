import gzip
import os

import numpy as np
import pytest
from PIL import Image

from pipeline import sources
from pipeline.sources.digits import digit_images


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(path.encode("utf-8", "surrogateescape"))
    return f"folder:{root}"


def read(uri, *names):
    """What the source holds under these names, in their order; all of it if none is given."""
    items = sources.list_items(uri, "none").items
    if names:
        items = items.take([items["name"].to_pylist().index(name) for name in names])
    return [raw for raw, _ in sources.read_items(uri, items)]


def columns(listing, *names):
    return list(zip(*(listing.items[name].to_pylist() for name in names), strict=True))


def test_class_folders_give_labels_at_any_depth(tmp_path):
    uri = touch(tmp_path, "dog/a.JPG", "cat/deep/er/b.webp", "cat/notes.txt", "cat/.DS_Store", ".git/x.png")
    listing = sources.list_items(uri)
    assert listing.classes == ("cat", "dog")
    assert columns(listing, "name", "label", "split") == [("cat/deep/er/b.webp", 0, None), ("dog/a.JPG", 1, None)]
    assert listing.items["size"].to_pylist() == [18, 9]
    assert read(uri, "dog/a.JPG") == [b"dog/a.JPG"]
    assert sources.list_items(str(tmp_path)).items.equals(listing.items)  # a bare folder needs no scheme


def test_split_folders_are_splits_with_the_union_of_their_classes(tmp_path):
    uri = touch(tmp_path, "train/cat/a.jpg", "validation/dog/b.jpg", "test/cat/c.jpg")
    listing = sources.list_items(uri)
    assert listing.classes == ("cat", "dog")
    assert columns(listing, "split", "label") == [("test", 0), ("train", 0), ("val", 1)]


def test_a_class_called_train_is_no_split(tmp_path):
    listing = sources.list_items(touch(tmp_path, "train/a.jpg", "bus/b.jpg", "car/c.jpg"))
    assert listing.classes == ("bus", "car", "train")
    with pytest.raises(ValueError, match="beside others"):
        sources.list_items(touch(tmp_path, "val/x/b.jpg"))


def test_no_labels_takes_any_folder(tmp_path):
    uri = touch(tmp_path, "a.jpg", "x/b.jpg")
    with pytest.raises(ValueError, match=r"a\.jpg .*--labels none"):
        sources.list_items(uri)
    listing = sources.list_items(uri, "none")
    assert listing.classes == ()
    assert columns(listing, "name", "label") == [("a.jpg", None), ("x/b.jpg", None)]
    split = sources.list_items(touch(tmp_path / "s", "train/a.jpg", "val/b.jpg"), "none")
    assert split.items["split"].to_pylist() == ["train", "val"]


def test_odd_names_are_read_back(tmp_path):
    odd = ["cat/ü ñ 🐈.jpg", "cat/two\nlines.jpg", "cat/a.b.c.jpg", "cat/" + "x" * 200 + ".jpg", "cat/\udcff\udce9.jpg"]
    uri = touch(tmp_path, *odd)
    assert sorted(read(uri)) == sorted(name.encode("utf-8", "surrogateescape") for name in odd)


def test_a_file_that_cannot_be_read_is_answered_by_its_error_and_the_next_follows(tmp_path):
    uri = touch(tmp_path, "cat/a.jpg", "cat/b.jpg")
    (tmp_path / "cat/lost.jpg").symlink_to(tmp_path / "nowhere")
    assert "cat/lost.jpg" in sources.list_items(uri).items["name"].to_pylist()
    a, lost, b = read(uri, "cat/a.jpg", "cat/lost.jpg", "cat/b.jpg")
    assert (a, b) == (b"cat/a.jpg", b"cat/b.jpg")
    assert isinstance(lost, FileNotFoundError)


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no folder at .*missing"):
        sources.list_items(f"folder:{tmp_path}/missing")
    with pytest.raises(ValueError, match="no image files in"):
        sources.list_items(touch(tmp_path, "cat/readme.txt"))


def test_unknown_schemes_name_the_nearest():
    with pytest.raises(ValueError, match=r"did you mean folder:/x\?"):
        sources.parse("fodler:/x")
    with pytest.raises(ValueError, match="ftp"):
        sources.parse("ftp://host/x")
    assert sources.parse("s3://bucket/x")[1] == "s3://bucket/x"
    assert sources.parse("folder:s3://bucket/x")[1] == "s3://bucket/x"
    with pytest.raises(ValueError, match="labels 'yes'"):
        sources.list_items("digits:", "yes")


def write_idx(path, array, opened=open):
    with opened(path, "wb") as file:
        file.write(bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes())


@pytest.fixture
def mnist(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 28, 28), dtype=np.uint8)
    labels = np.arange(12, dtype=np.uint8) % 10
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", images[:10], gzip.open)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", labels[:10], gzip.open)
    write_idx(tmp_path / "t10k-images.idx3-ubyte", images[10:])
    write_idx(tmp_path / "t10k-labels.idx1-ubyte", labels[10:])
    return tmp_path, images, labels


def test_idx_files_in_both_spellings_gzipped_or_not(mnist):
    path, images, labels = mnist
    listing = sources.list_items(f"idx:{path}")
    assert listing.classes == tuple("0123456789")
    assert listing.format == "png"
    order = [10, 11, *range(10)]  # test before train
    assert listing.items["label"].to_pylist() == labels[order].tolist()
    assert listing.items["name"].to_pylist()[:3] == ["test/00000000", "test/00000001", "train/00000000"]
    found = read(f"idx:{path}")
    assert found[0].shape == (28, 28, 1)
    assert np.array_equal(np.stack(found)[..., 0], images[order])
    (path / "classes.txt").write_text("\n".join("abcdefghij"))
    assert sources.list_items(f"idx:{path}").classes == tuple("abcdefghij")
    (path / "classes.txt").write_text("a\nb")
    with pytest.raises(ValueError, match="2 lines"):
        sources.list_items(f"idx:{path}")


def test_damaged_idx_files_are_named(mnist):
    path, images, _ = mnist
    file = path / "t10k-images.idx3-ubyte"
    for bad, message in [
        (file.read_bytes()[:-1], "truncated"),
        (b"\x00\x00\x0d\x03" + file.read_bytes()[4:], "no IDX file"),
        (b"\x00", "no IDX file"),
    ]:
        file.write_bytes(bad)
        with pytest.raises(ValueError, match=message):
            sources.list_items(f"idx:{path}")
        write_idx(file, images[10:])
    write_idx(path / "t10k-labels.idx1-ubyte", np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match="2 images and 3 labels"):
        sources.list_items(f"idx:{path}")
    (path / "t10k-labels.idx1-ubyte").unlink()
    with pytest.raises(ValueError, match="no labels"):
        sources.list_items(f"idx:{path}")
    assert sources.list_items(f"idx:{path}", "none").items["label"].null_count == 12
    broken = path / "train-images-idx3-ubyte.gz"
    broken.write_bytes(broken.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged gzip"):
        sources.list_items(f"idx:{path}", "none")
    with pytest.raises(ValueError, match="no MNIST-format files"):
        sources.list_items(f"idx:{os.fspath(path)}/../")


def test_digits_are_all_there_at_32_pixels():
    images, labels = digit_images()
    assert (images.shape, images.dtype) == ((1797, 32, 32, 1), np.uint8)
    assert images.max() == 255
    listing = sources.list_items("digits:")
    assert listing.items["label"].to_pylist() == labels.tolist()
    assert np.array_equal(read("digits:", "0042")[0], images[42])
    small = np.asarray(Image.fromarray(images[42, :, :, 0]).resize((8, 8), Image.Resampling.BOX), dtype=float)
    from sklearn.datasets import load_digits

    assert np.corrcoef(small.ravel(), load_digits().images[42].ravel())[0, 1] > 0.9
    with pytest.raises(ValueError, match="no path"):
        sources.list_items("digits:/x")


def test_links_in_a_circle_are_answered_by_their_error(tmp_path):
    uri = touch(tmp_path, "cat/a.jpg")
    (tmp_path / "cat/b.jpg").symlink_to("c.jpg")
    (tmp_path / "cat/c.jpg").symlink_to("b.jpg")
    a, *lost = read(uri, "cat/a.jpg", "cat/b.jpg", "cat/c.jpg")
    assert a == b"cat/a.jpg"
    assert all(isinstance(raw, OSError) for raw in lost)
