"""Object stores: S3 by the client that s3fs keeps, and plain reads and writes of gs:// by gcsfs."""

import asyncio
import contextlib
import errno
import functools
import os
import random
import secrets
import threading
from collections.abc import Iterator
from typing import BinaryIO

import fsspec
import s3fs
from botocore import exceptions as boto

from pipeline.storage import failures, multipart, prefixes
from pipeline.storage.paths import IN_FLIGHT, Conflict, File, StorageError, name

_PART_BYTES = 16 * 2**20  # of what is written piece by piece, each buffered in memory
_ATTEMPTS = 4  # backoff of at most 1 + 2 + 4 s: a refused connection is reported within 10 s
_TIDY_S = 10  # for what was interrupted to undo what it began
_ENVIRONMENT = (
    *("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION"),
    *("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
)
_making = threading.RLock()  # taken across a fork, so that no child starts with it held by a thread it lacks
os.register_at_fork(before=_making.acquire, after_in_parent=_making.release, after_in_child=_making.release)


@functools.lru_cache(maxsize=8)
def _s3_client(pid: int, *environment: str | None) -> s3fs.S3FileSystem:
    """One for all threads, another after a fork or when the variables change (s3fs would make one a thread)."""
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")  # botocore knows only the second
    return s3fs.S3FileSystem(
        client_kwargs={"region_name": region} if region else {},
        config_kwargs={
            "connect_timeout": 4,
            "read_timeout": 20,  # the losers of a contended conditional write can wait for seconds
            "retries": {"mode": "standard", "total_max_attempts": _ATTEMPTS},  # 5xx, SlowDown, resets; with jitter
            "max_pool_connections": 64,
        },
        use_listings_cache=False,
        skip_instance_cache=True,
    )


def filesystem(path: str):
    scheme, _, inside = path.partition("://")
    if scheme == "gs":
        try:
            return fsspec.filesystem("gcs", use_listings_cache=False), inside
        except ImportError as e:
            raise ValueError(f"{path}: gs:// needs gcsfs (pip install gcsfs)") from e
    with _making:
        return _s3_client(os.getpid(), *map(os.environ.get, _ENVIRONMENT)), inside


def _google(path: str) -> bool:
    return path.startswith("gs://")


def _address(path: str) -> dict[str, str]:
    bucket, _, key = path.removeprefix("s3://").partition("/")
    return {"Bucket": bucket, "Key": key}


def _on_client(path: str, request):
    """Run the coroutine function `request(client)` on s3fs's event loop, from any thread.

    Whatever interrupts the caller's wait (Ctrl-C) cancels the request, and is raised once that has ended or had its
    seconds to: s3fs's own `sync` would let it run on, and an upload would appear after the error.
    """
    fs, ended = filesystem(path)[0], threading.Event()

    async def run():
        try:
            return await request(await fs.set_session())
        finally:
            ended.set()

    with failures.named(path):
        answer = asyncio.run_coroutine_threadsafe(run(), fs.loop)
        try:
            return answer.result()
        except BaseException:
            if answer.cancel():  # else it has ended, and this is what it raised
                ended.wait(_TIDY_S)
            raise


def _s3(path: str, operation: str, **arguments) -> dict:
    """One S3 request; the client repeats it where it fails."""
    return _on_client(path, lambda client: getattr(client, operation)(**_address(path), **arguments))


def _get(path: str, start: int = 0, end: int | None = None) -> tuple[bytes, str]:
    if _google(path):
        with failures.named(path):
            return filesystem(path)[0].cat_file(path, start=start, end=end), ""
    span = {} if end is None else {"Range": f"bytes={start}-{end - 1}"}
    return _on_client(path, lambda client: _download(client, path, **span))


async def _download(client, path: str, **wanted: str) -> tuple[bytes, str]:
    """(content, tag). A whole object that is large comes in parts of one version."""
    failed = 0
    while True:
        response = await client.get_object(**_address(path), **wanted)
        size, tag = response["ContentLength"], response["ETag"]
        try:
            if wanted or size < 2 * multipart.PART_BYTES:
                return await response["Body"].read(), tag
            response["Body"].close()

            async def part(number: int, start: int, end: int, tag=tag) -> bytes:
                return (await _download(client, path, Range=f"bytes={start}-{end - 1}", IfMatch=tag))[0]

            return b"".join(await multipart.each(part, size)), tag
        except asyncio.CancelledError:
            response["Body"].close()
            raise
        except Exception as error:  # the client does not repeat a GET whose body was cut midway
            response["Body"].close()
            failed += 1
            replaced = failures.code(error) in failures.UNMET  # meanwhile: what is there now is read from its beginning
            if failed == _ATTEMPTS or (isinstance(error, boto.ClientError) and not replaced):
                raise
        await asyncio.sleep(random.random() * 2**failed / 2)


def read(path: str) -> bytes:
    return _get(path)[0]


def read_range(path: str, start: int, end: int) -> bytes:
    try:
        return _get(path, start, end)[0]
    except StorageError as e:
        if failures.code(e) in ("InvalidRange", "416"):  # `start` is past the end
            return b""
        raise


def read_tagged(path: str) -> tuple[bytes, str]:
    return _get(path)


def exists(path: str) -> bool:
    try:
        if _google(path):
            with failures.named(path):
                return filesystem(path)[0].isfile(path)
        return bool(_s3(path, "head_object"))
    except FileNotFoundError:
        return False


def list_files(path: str) -> Iterator[File]:
    rows = _list(path.rstrip("/") + "/")
    # Other tools mark folders by objects that end in a slash; the folder's own has no name left here.
    return (f for f in rows if f.path and not (f.path.endswith("/") or IN_FLIGHT.fullmatch(name(f.path))))


def _list(prefix: str) -> list[File]:
    if _google(prefix):
        fs, inside = filesystem(prefix)
        with failures.named(prefix):
            found = fs.find(inside, detail=True).items()
        return [File(key.removeprefix(inside), info["size"], info.get("etag", "")) for key, info in found]
    bucket, inside = _address(prefix).values()

    found = _on_client(prefix, lambda client: prefixes.objects(client, bucket, inside))
    return [File(item["Key"].removeprefix(inside), item["Size"], item["ETag"]) for item in found]


def write(path: str, data: bytes) -> None:
    if _google(path):
        with writer(path) as file:
            file.write(data)
    elif len(data) < 2 * multipart.PART_BYTES:
        _s3(path, "put_object", Body=bytes(data))
    else:
        _on_client(path, lambda client: multipart.put(client, _address(path), memoryview(data)))


@contextlib.contextmanager
def writer(path: str) -> Iterator[BinaryIO]:
    fs, inside = filesystem(path)
    with failures.named(path):
        file = fs.open(inside, "wb", block_size=_PART_BYTES)
        try:
            yield file
            file.close()
        except BaseException:
            file.closed = True  # or its finaliser would complete the upload
            with contextlib.suppress(Exception):  # the first failure is the one to report
                file.discard()
            raise


def write_new(path: str, data: bytes) -> str:
    return _put_if(path, data, FileExistsError(errno.EEXIST, "exists", path), IfNoneMatch="*")


def replace(path: str, data: bytes, tag: str) -> str:
    return _put_if(path, data, Conflict(f"{path} was changed by another process"), IfMatch=tag)


def _put_if(path: str, data: bytes, refusal: Exception, **condition: str) -> str:
    if _google(path):
        raise ValueError(f"{path}: create-only and compare-and-swap writes need a local path or s3://")
    mark = secrets.token_hex(8)

    async def request(client):
        failed = 0
        while True:
            try:
                return await client.put_object(
                    **_address(path), Body=bytes(data), Metadata={"write": mark}, **condition
                )
            except boto.ClientError as e:
                failed += 1
                if failures.code(e) != "ConditionalRequestConflict" or failed == _ATTEMPTS:
                    raise
            await asyncio.sleep(random.random() * 2**failed / 2)  # another write to the key is under way

    try:
        return _on_client(path, request)["ETag"]
    except OSError as e:
        # If our write succeeded and its acknowledgement was lost, the client's retry (aiohttp has one of its own,
        # which nobody counts) is refused because of it: the mark tells, also among writers of the same bytes.
        if failures.code(e) in failures.UNMET:
            with contextlib.suppress(FileNotFoundError):
                found = _s3(path, "head_object")
                if found["Metadata"].get("write") == mark:
                    return found["ETag"]
        if failures.code(e) in failures.UNMET or ("IfMatch" in condition and failures.code(e) in ("NoSuchKey", "404")):
            raise refusal from None
        raise


def delete(path: str, tag: str | None = None) -> None:
    if _google(path):
        with failures.named(path):
            filesystem(path)[0].rm_file(path)
    else:
        try:
            _s3(path, "delete_object", **({"IfMatch": tag} if tag else {}))
        except StorageError as e:
            if failures.code(e) not in failures.UNMET:
                raise
            raise Conflict(f"{path} was changed by another process") from None


def delete_tree(path: str) -> None:
    prefix = path.rstrip("/") + "/"
    if not prefix.partition("://")[2].partition("/")[2]:
        raise ValueError(f"{path}: will not delete a whole bucket")
    keys = [file.path for file in _list(prefix)]
    if _google(path):
        for key in keys:
            delete(prefix + key)
        return
    bucket, inside = _address(prefix).values()
    for batch in (keys[at : at + 1000] for at in range(0, len(keys), 1000)):
        wanted = {"Objects": [{"Key": inside + key} for key in batch], "Quiet": True}
        failed = _on_client(path, lambda client, w=wanted: client.delete_objects(Bucket=bucket, Delete=w)).get("Errors")
        if failed:
            raise StorageError(errno.EIO, f"could not delete {failed[0]}", path)
