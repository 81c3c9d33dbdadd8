"""What `bench load` is compared with: the bare codec, and other loaders, each used as its documentation shows it.

    webdataset        WebDataset, shuffled, decoded by Pillow, in torch's DataLoader
    webdataset+codec  the same, with our decode and crop (simplejpeg, OpenCV) in place of Pillow
    huggingface       load_dataset("webdataset", streaming=True), shuffled and mapped, in torch's DataLoader
    litdata           its StreamingDataset and StreamingDataLoader, over its own chunks of the same JPEG bytes
    ray               ray.data: read_webdataset, map, iter_torch_batches

Run as a process of its own, `python -m jobs.bench.other_loaders NAME WORKERS SIDE BATCH SECONDS FOLDER SCRATCH`; prints
images per second. All give batches of uint8 (n, SIDE, SIDE, 3) and labels: random resized crop by torchvision's
algorithm and a flip. Nothing is counted before some batches have come, so the start of workers is not.
"""

import contextlib
import io
import itertools
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from cluster.session import ray_session
from pipeline import storage
from pipeline.loading.augment import JPEG, Augment, crop_boxes, crop_into, decode, fit, shrinkable
from pipeline.shards import index, tar

Epoch = Callable[[], Iterable]  # begins an epoch of batches
_STORE = 2 << 30  # bytes
_MOST = 8192  # images the bare side holds
_BUFFER = 1000  # samples in a shuffle buffer; what webdataset's and Hugging Face's pages show


@dataclass(frozen=True)
class Memory:
    """What the bare side holds: the bytes of some images, and their rows, heights and widths, int64 (n,)."""

    images: list[bytes]
    rows: np.ndarray
    heights: np.ndarray
    widths: np.ndarray

    @staticmethod
    def of(split: index.Split) -> "Memory":
        rows = np.linspace(0, len(split) - 1, min(len(split), _MOST)).astype(np.int64)
        where = zip(*(column[rows].tolist() for column in (split.shard, split.offset, split.size)), strict=True)
        images = [tar.read_sample(storage.join(split.root, split.shards[n]), *place) for n, *place in where]
        return Memory(images, rows, split.height[rows].astype(np.int64), split.width[rows].astype(np.int64))

    def boxes(self, augment: Augment) -> list[list[int] | None]:
        """Which area of each image is taken; None: the centre."""
        if augment.crop != "resized":
            return [None] * len(self.images)
        return crop_boxes(self.heights, self.widths, 0, np.zeros_like(self.rows), self.rows).tolist()

    def shrinks(self, augment: Augment) -> list[int]:
        """To which part of its sides each is decoded: 1 in full, 2 to a half, ..."""
        if augment.exact_decode:
            return [1] * len(self.images)
        whole = zip(self.heights.tolist(), self.widths.tolist(), strict=True)
        areas = [box[2:] if box else size for box, size in zip(self.boxes(augment), whole, strict=True)]
        jpegs = (data[:2] == JPEG for data in self.images)
        return [shrinkable(*area, augment.image_size) if jpeg else 1 for jpeg, area in zip(jpegs, areas, strict=True)]


def bare(memory: Memory, augment: Augment, threads: int, seconds: float) -> float:
    """Images per second of threads that decode, crop and resize from memory, and do nothing else."""
    side, channels, boxes, shrinks = (
        augment.image_size,
        augment.channels,
        memory.boxes(augment),
        memory.shrinks(augment),
    )
    room = 3 * int((memory.heights * memory.widths).max())
    end = time.perf_counter() + seconds

    def work(first: int) -> int:
        buffer, out = np.empty(room, np.uint8), np.empty((side, side, channels), np.uint8)
        mine = range(first % len(memory.images), len(memory.images), threads)
        for count, i in enumerate(itertools.cycle(mine)):
            if count % 16 == 0 and time.perf_counter() >= end:
                break
            box, shrink = boxes[i], shrinks[i]
            image = decode(memory.images[i], channels, shrink, buffer)
            if box:
                crop_into(image, [number // shrink for number in box], False, out)
            else:
                out[:] = fit(image, side)
        return count

    begin = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        done = sum(pool.map(work, range(threads)))
    return done / (time.perf_counter() - begin)


def crop(image: Image.Image, side: int) -> torch.Tensor:
    """RandomResizedCrop, RandomHorizontalFlip and PILToTensor of torchvision, on Pillow: uint8 (side, side, 3).

    torchvision gives (3, side, side); its way there would cost these loaders a transposition that ours does not do.
    """
    left, top, width, height = _area(*image.size)
    image = image.crop((left, top, left + width, top + height)).resize((side, side), Image.Resampling.BILINEAR)
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(image))


def _area(width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, width, height."""
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, width - w), random.randint(0, height - h), w, h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h


def our_crop(data: bytes, side: int) -> torch.Tensor:
    """The same by the functions our loader calls."""
    image = decode(data, 3)
    out = np.empty((side, side, 3), np.uint8)
    left, top, width, height = _area(image.shape[1], image.shape[0])
    crop_into(image, [top, left, height, width], random.random() < 0.5, out)
    return torch.from_numpy(out)


def shards(folder: str) -> list[str]:
    found = sorted(map(str, Path(folder).glob("train-*.tar")))
    if not found:
        raise ValueError(f"no train-*.tar in {folder}: name a local DATASET with a split train")
    return found


def webdataset(folder: str, scratch: str, workers: int, side: int, batch: int, codec: bool = False) -> Epoch:
    import webdataset

    samples = webdataset.WebDataset(shards(folder), shardshuffle=100, empty_check=False).shuffle(_BUFFER)
    if codec:
        samples = samples.to_tuple("jpg;png", "cls").map_tuple(partial(our_crop, side=side), int)
    else:
        samples = samples.decode("pil").to_tuple("jpg;png", "cls").map_tuple(partial(crop, side=side))
    return DataLoader(samples.batched(batch), batch_size=None, num_workers=workers, persistent_workers=True).__iter__


def huggingface(folder: str, scratch: str, workers: int, side: int, batch: int) -> Epoch:
    from datasets import load_dataset

    samples = load_dataset(
        "webdataset", data_files={"train": shards(folder)}, split="train", streaming=True, cache_dir=scratch
    )
    image = "jpg" if "jpg" in samples.column_names else "png"
    samples = samples.select_columns([image, "cls"]).shuffle(seed=0, buffer_size=_BUFFER)

    def collate(rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.stack([crop(row[image].convert("RGB"), side) for row in rows])
        return images, torch.tensor([row["cls"] for row in rows])

    return DataLoader(samples, batch, num_workers=workers, collate_fn=collate, persistent_workers=True).__iter__


def litdata(folder: str, scratch: str, workers: int, side: int, batch: int) -> Epoch:
    from litdata import StreamingDataLoader, StreamingDataset, optimize

    for name in ("DATA_OPTIMIZER_CACHE_FOLDER", "DATA_OPTIMIZER_DATA_CACHE_FOLDER"):
        os.environ[name] = f"{scratch}/{name}"  # else it leaves folders in /tmp
    chunks = f"{scratch}/litdata"
    if not os.path.exists(f"{chunks}/index.json"):  # else an earlier round made them
        optimize(jpegs, shards(folder), chunks, chunk_bytes="64MB", num_workers=1, start_method="fork", verbose=False)

    class Cropped(StreamingDataset):
        def __getitem__(self, index) -> tuple[torch.Tensor, int]:
            sample = super().__getitem__(index)
            return crop(Image.open(io.BytesIO(sample["image"])).convert("RGB"), side), sample["class"]

    samples = Cropped(chunks, cache_dir=f"{scratch}/cache", shuffle=True)
    return StreamingDataLoader(samples, batch_size=batch, num_workers=workers, persistent_workers=True).__iter__


def jpegs(shard: str) -> Iterator[dict]:
    """The images of a shard, their bytes as they are: what litdata's chunks are made of."""
    import webdataset

    for sample in webdataset.WebDataset([shard], shardshuffle=False):
        yield {"image": sample.get("jpg") or sample["png"], "class": int(sample["cls"])}


def ray(folder: str, scratch: str, workers: int, side: int, batch: int) -> Epoch:
    def cropped(row: dict) -> dict:
        image = Image.fromarray(row["jpg"] if "jpg" in row else row["png"]).convert("RGB")
        return {"image": crop(image, side).numpy(), "class": row["cls"]}

    from ray import data

    data.DataContext.get_current().enable_progress_bars = False
    samples = data.read_webdataset(shards(folder), shuffle="files").map(cropped)
    return partial(samples.iter_torch_batches, batch_size=batch, local_shuffle_buffer_size=_BUFFER)


LOADERS = {
    "webdataset": webdataset,
    "webdataset+codec": partial(webdataset, codec=True),
    "huggingface": huggingface,
    "litdata": litdata,
    "ray": ray,
}


def rate(epoch: Epoch, side: int, seconds: float, skip: int) -> float:
    """Images per second over `seconds`, epoch after epoch, from the arrival of batch `skip` to that of a later one."""
    batches = (batch for _ in itertools.count() for batch in epoch())
    for _ in range(skip):
        next(batches)
    count, begin, now = 0, time.perf_counter(), 0.0
    while now < begin + seconds:
        batch = next(batches)
        images = batch["image"] if isinstance(batch, dict) else batch[0]
        assert (images.dtype, *images.shape[1:]) == (torch.uint8, side, side, 3)
        count, now = count + len(images), time.perf_counter()
    return count / (now - begin)


@contextlib.contextmanager
def _ray(workers: int) -> Iterator[None]:
    """Ray with room for images: what our own tasks are given, paths and rows, ends this job for want of memory."""
    import ray

    init = ray.init
    ray.init = lambda **words: init(**words | {"object_store_memory": _STORE})
    with ray_session(workers):
        yield


def main(name: str, workers: int, side: int, batch: int, seconds: float, folder: str, scratch: str) -> None:
    with _ray(workers) if name == "ray" else contextlib.nullcontext():
        epoch = LOADERS[name](folder, scratch, workers, side, batch)
        seconds *= 4 if name == "ray" else 1  # it hands on a thousand images at a time, and then none for seconds
        # of each worker two batches lie ready, made while nobody counted
        print(rate(epoch, side, seconds, skip=2 * workers + 2), flush=True)


if __name__ == "__main__":
    words = sys.argv[1:]
    main(words[0], *map(int, words[1:4]), float(words[4]), *words[5:])
