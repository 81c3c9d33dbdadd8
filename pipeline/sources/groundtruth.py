"""What ImageNet says of its images beside them: the devkit (https://image-net.org) and Kaggle's CSV and mapping."""

import csv
import io
import tarfile
import zlib

from pipeline import storage
from pipeline.sources import listing

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
UNPACKED = ("ILSVRC2012_devkit_t12/data", "ILSVRC2012_devkit_t12", "data")  # folders that hold the devkit's files
SOLUTION, MAPPING = "LOC_val_solution.csv", "LOC_synset_mapping.txt"
_TRUTH, _META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"


def validation(places: list[str]) -> dict[str, str]:
    """{ILSVRC2012_val_00000001: WordNet id}, from the first of the folders `places` that holds a ground truth.

    ValueError: none does, or one is not what it should be."""
    if path := _find(places, SOLUTION):
        rows = csv.DictReader(io.StringIO("\n".join(listing.text_lines(path))))
        if not {"ImageId", "PredictionString"} <= set(rows.fieldnames or ()):
            raise ValueError(f"{path} has the columns {rows.fieldnames}: ImageId and PredictionString are needed")
        return {row["ImageId"]: (row["PredictionString"] or "?").split()[0] for row in rows}
    if not (truth := _devkit(places, _TRUTH)) or not (meta := _devkit(places, _META)):
        raise ValueError(f"no ground truth of the validation images in {places[0]}: put {DEVKIT} there (or its "
                         f"data/{_TRUTH} and data/{_META}), or Kaggle's {SOLUTION}")  # fmt: skip
    known = {number: wordnet for number, wordnet, _ in _synsets(*meta)}
    data, path = truth
    try:
        return {f"ILSVRC2012_val_{i:08d}": known[int(line)] for i, line in enumerate(data.split(), 1)}
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path}: a line is no ILSVRC2012_ID of {meta[1]}: {error}") from None


def names(places: list[str]) -> dict[str, str]:
    """{WordNet id: "tench, Tinca tinca"}; empty where neither the mapping nor the devkit is there."""
    if path := _find(places, MAPPING):
        return dict(line.strip().split(" ", 1) for line in listing.text_lines(path) if " " in line.strip())
    meta = _devkit(places, _META)
    return {wordnet: words for _, wordnet, words in _synsets(*meta)} if meta else {}


def _find(places: list[str], name: str) -> str | None:
    return next((path for place in places if storage.exists(path := storage.join(place, name))), None)


def _devkit(places: list[str], name: str) -> tuple[bytes, str] | None:
    """(content, where it lies) of one of the devkit's files, unpacked or not."""
    if path := _find(places, name):
        return storage.read(path), path
    if not (path := _find(places, DEVKIT)):
        return None
    packed = io.BytesIO(storage.read(path))
    try:
        with tarfile.open(fileobj=packed, mode="r:gz") as kit:
            member = next((m for m in kit if m.isreg() and m.name.rpartition("/")[2] == name), None)
            if member is None:
                raise ValueError(f"{path} holds no {name}")
            return kit.extractfile(member).read(), f"{name} in {path}"
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _synsets(data: bytes, path: str) -> list[tuple[int, str, str]]:
    """(ILSVRC2012_ID, WordNet id, names) of meta.mat's struct array, of which the first 1000 are the classes."""
    from scipy.io.matlab import MatReadError, loadmat  # half a second to import, and few need it

    try:
        synsets = loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
        return [(int(s["ILSVRC2012_ID"]), str(s["WNID"]), str(s["words"])) for s in synsets.ravel()]
    except (MatReadError, ValueError, KeyError, IndexError, TypeError, NotImplementedError, zlib.error) as error:
        raise ValueError(f"{path} is no devkit's meta.mat: {error!r}") from None
