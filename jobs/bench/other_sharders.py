"""What `bench shard` is compared with: other sharders, each used as its documentation shows it, with Pillow.

    webdataset   its ShardWriter in each of several processes, a share of the files each
    ray          ray.data: read, map, write_webdataset
    litdata      its optimize

Run as a process of its own, `python -m jobs.bench.other_sharders NAME WORKERS SIZE QUALITY FOLDER OUT`; prints images
per second. All do the same work: open the file, RGB, short side at most SIZE px, JPEG of QUALITY, write with the class.
What starting takes (processes, Ray) is not counted, and Ray has run a first job before.
"""

import io
import multiprocessing
import os
import sys
import time
from pathlib import Path

from PIL import Image

from cluster.session import ray_session
from pipeline.sources.folder import EXTENSIONS

SAMPLES_PER_SHARD = 1000


def small_jpeg(file, size: int | None, quality: int) -> bytes:
    """The image in `file` (a path or an open file) as JPEG, short side at most `size` px."""
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    if size and min(image.size) > size:
        short = min(image.size)
        image = image.resize([round(side * size / short) for side in image.size])  # bicubic, Pillow's default
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality)
    return data.getvalue()


def listed(folder: str) -> list[tuple[str, int]]:
    """[(path, label)], in an order mixed over the classes."""
    files = [file for file in Path(folder).rglob("*") if file.suffix[1:].lower() in EXTENSIONS]
    files.sort(key=lambda file: file.name)
    classes = {name: label for label, name in enumerate(sorted({file.parent.name for file in files}))}
    return [(str(file), classes[file.parent.name]) for file in files]


def webdataset(files: list[tuple[str, int]], out: str, workers: int, size: int | None, quality: int) -> float:
    """Seconds, from when every process is ready."""
    import webdataset

    context = multiprocessing.get_context("fork")
    ready = context.Barrier(workers + 1)

    def work(number: int) -> None:
        ready.wait()
        with webdataset.ShardWriter(f"{out}/train-{number}-%06d.tar", maxcount=SAMPLES_PER_SHARD, verbose=0) as sink:
            for path, label in files[number::workers]:
                sink.write({"__key__": Path(path).stem, "jpg": small_jpeg(path, size, quality), "cls": label})

    processes = [context.Process(target=work, args=(i,)) for i in range(workers)]
    for process in processes:
        process.start()
    ready.wait()
    begin = time.perf_counter()
    for process in processes:
        process.join()
    assert not any(process.exitcode for process in processes)
    return time.perf_counter() - begin


def ray(files: list[tuple[str, int]], out: str, workers: int, size: int | None, quality: int) -> float:
    """Seconds of the second of two jobs: the first, on a few files, starts the worker processes."""
    import ray

    labels = dict(files)

    def encode(row: dict) -> dict:
        data = small_jpeg(io.BytesIO(row["bytes"]), size, quality)
        return {"__key__": Path(row["path"]).stem, "jpg": data, "cls": str(labels[row["path"]])}

    def job(paths: list[str], to: str) -> None:
        # read_images, which decodes by itself and hands on pixels, is slower by a quarter
        rows = ray.data.read_binary_files(paths, include_paths=True)
        encoded = rows.map(encode)  # its own encoder knows no JPEG quality, so it gets bytes
        encoded.write_webdataset(to, min_rows_per_file=SAMPLES_PER_SHARD, encoder=None)

    with ray_session(workers):
        ray.data.DataContext.get_current().enable_progress_bars = False
        job([path for path, _ in files[: 32 * workers]], f"{out}/first")
        begin = time.perf_counter()
        job([path for path, _ in files], f"{out}/shards")
        return time.perf_counter() - begin


def litdata(files: list[tuple[str, int]], out: str, workers: int, size: int | None, quality: int) -> float:
    """Seconds from the first image that any worker takes up."""
    from litdata import optimize

    started = multiprocessing.get_context("fork").Value("d", 0.0)

    def encode(item: tuple[str, int]) -> dict:
        with started.get_lock():
            started.value = started.value or time.time()
        return {"image": small_jpeg(item[0], size, quality), "class": item[1]}

    optimize(encode, files, out, chunk_bytes="64MB", num_workers=workers, start_method="fork", verbose=False)
    return time.time() - started.value


def main(name: str, workers: str, size: str, quality: str, folder: str, out: str) -> None:
    files = listed(folder)
    os.makedirs(out, exist_ok=True)
    side = None if size == "None" else int(size)
    sharder = {"webdataset": webdataset, "ray": ray, "litdata": litdata}[name]
    print(len(files) / sharder(files, out, int(workers), side, int(quality)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
