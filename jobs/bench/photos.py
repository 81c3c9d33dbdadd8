"""Photos to measure on, like ImageNet's: about 500 x 375 px, 75 to 110 KB, cut from Debian's wallpapers.

A crop of random place and scale is brought to its size by averaging, and its JPEG quality is chosen by the size of the
file. Pictures too flat (gradients) or too noisy to give such files are left out, so what remains is as hard to decode
and encode as photographs are.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import simplejpeg

ROOTS = {
    "gnome-backgrounds": "/usr/share/backgrounds/gnome",
    "mate-backgrounds": "/usr/share/backgrounds/mate",
    "plasma-workspace-wallpapers": "/usr/share/wallpapers",
}
CLASSES = 20
SMALLEST, LARGEST = 75_000, 110_000  # bytes of a photo
_FACTS = "photos.json"  # written last: a folder without it is no finished set
_QUALITIES = (95, 92, 88, 84, 80)
_LONG_SIDE = 2560  # px; larger pictures are shrunk once, which also makes their pixels sharp
_PROBES, _WANTED = 12, 3  # a picture is used if so many of so many crops will do


def photos(folder: str, count: int = 2000, seed: int = 0, roots: dict[str, str] = ROOTS) -> dict:
    """Fills `folder` with `count` JPEGs in 20 class folders (c00 to c19), or finds them there from the last time.

    The same count, seed and wallpapers give the same bytes. Returns {count, seed, mean_bytes, pictures (used)}.
    roots: {Debian package: its folder}. ValueError: a package is missing, or `folder` holds something else.
    """
    there = Path(folder)
    found = _found(there)
    if found is not None:
        if (found["count"], found["seed"]) != (count, seed):
            raise ValueError(f"{folder} holds {found['count']} photos of seed {found['seed']}, not {count} of {seed}: "
                             "choose another folder, or delete that one")  # fmt: skip
        return found
    paths = _pictures(roots)
    for number in range(CLASSES):
        (there / f"c{number:02d}").mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pictures = [picture for picture in pool.map(_usable, paths) if picture is not None]
        if not pictures:
            raise ValueError(f"no picture in {', '.join(roots.values())} gives photos of {SMALLEST} to {LARGEST} bytes")

        def make(number: int) -> int:
            picture = pictures[number % len(pictures)]
            data = _photo(picture, np.random.default_rng((seed, number)))
            (there / f"c{number % CLASSES:02d}" / f"{number:06d}.jpg").write_bytes(data)
            return len(data)

        mean = sum(pool.map(make, range(count))) / count
    facts = {"count": count, "seed": seed, "mean_bytes": round(mean), "pictures": len(pictures)}
    (there / _FACTS).write_text(json.dumps(facts))
    return facts


def _found(folder: Path) -> dict | None:
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    if not (folder / _FACTS).is_file():
        raise ValueError(f"{folder} holds no finished set of photos: choose an empty folder, or delete that one")
    return json.loads((folder / _FACTS).read_text())


def _pictures(roots: dict[str, str]) -> list[Path]:
    """Each picture once: packages link one file under the names of many sizes."""
    missing = [package for package, root in roots.items() if not Path(root).is_dir()]
    if missing:
        raise ValueError(f"the photos are cut from wallpapers that are not here: apt-get install {' '.join(missing)}; "
                         "or name a --source")  # fmt: skip
    files = {file.resolve() for root in roots.values() for file in Path(root).rglob("*")}
    kinds = (".jpg", ".png", ".webp")
    return sorted(file for file in files if file.suffix in kinds and file.stem != "screenshot" and file.is_file())


def _usable(path: Path) -> np.ndarray | None:
    """The picture, BGR uint8 (h, w, 3), long side at most 2560 px; None if it is small, flat or all noise."""
    picture = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if picture is None or min(picture.shape[:2]) < 700:
        return None
    scale = _LONG_SIDE / max(picture.shape[:2])
    if scale < 1:
        picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    random = np.random.default_rng(0)
    good = sum(_crop(picture, random) is not None for _ in range(_PROBES))
    return picture if good >= _WANTED else None


def _photo(picture: np.ndarray, random: np.random.Generator) -> bytes:
    while True:  # a usable picture gives one in four tries
        data = _crop(picture, random)
        if data is not None:
            return data


def _crop(picture: np.ndarray, random: np.random.Generator) -> bytes | None:
    """A crop as JPEG, landscape or (one in four) portrait; None if no quality brings it to the size wanted."""
    width, height = int(random.integers(460, 541)), int(random.integers(345, 406))
    if random.random() < 0.25:
        width, height = height, width
    most = min(picture.shape[1] / width, picture.shape[0] / height)
    scale = np.exp(random.uniform(0, np.log(most)))
    wide, high = int(width * scale), int(height * scale)
    x, y = (int(random.integers(0, room + 1)) for room in (picture.shape[1] - wide, picture.shape[0] - high))
    crop = cv2.resize(picture[y : y + high, x : x + wide], (width, height), interpolation=cv2.INTER_AREA)
    for quality in _QUALITIES:
        data = simplejpeg.encode_jpeg(crop, quality, "BGR", "420")
        if len(data) <= LARGEST:
            return data if len(data) >= SMALLEST else None
    return None
