"""What the client libraries raise, turned into errors of ours that name the path.

The errno of a StorageError is EAGAIN where the store did not answer or said it was busy, so that another attempt may
succeed; EIO where its answer will not change.
"""

import asyncio
import contextlib
import errno
import os
from collections.abc import Iterator

from aiohttp import ClientError as HttpError
from botocore import exceptions as boto
from fsspec.asyn import FSTimeoutError

from pipeline.storage.paths import StorageError

UNMET = {"PreconditionFailed", "412"}
_ELSEWHERE = {"301", "PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
_BUSY = {429, 500, 502, 503, 504}
_REFUSED = {"403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
_UNANSWERED = (boto.ConnectionError, boto.HTTPClientError, HttpError, FSTimeoutError, asyncio.TimeoutError)


def code(error: BaseException) -> str:
    """The store's error code, if `error` is or stands for an answer of it."""
    answer = error if isinstance(error, boto.ClientError) else error.__cause__
    return answer.response["Error"].get("Code", "") if isinstance(answer, boto.ClientError) else ""


@contextlib.contextmanager
def named(path: str) -> Iterator[None]:
    """Turn the client libraries' exceptions into ours, which name `path`."""
    try:
        yield
    except Exception as e:
        if (ours := _translated(path, e)) is None:
            raise
        raise ours from e


def _translated(path: str, error: Exception) -> Exception | None:
    where = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
    if isinstance(error, OSError) and isinstance(error.__cause__, boto.ClientError):
        error = error.__cause__  # s3fs has translated it, without the path
    if isinstance(error, boto.ClientError):
        found = code(error)
        if found in _REFUSED:
            wrong = "AWS_SESSION_TOKEN" if "Token" in found else "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            return PermissionError(errno.EACCES, f"refused by {where} ({found}): check {wrong}", path)
        if found in ("NoSuchBucket", "NoSuchKey", "404"):
            what = f"no bucket {path.split('/')[2]} at {where}" if found == "NoSuchBucket" else "no such object"
            return FileNotFoundError(errno.ENOENT, what, path)
        hint = " (is AWS_REGION the bucket's?)" if found in _ELSEWHERE else ""
        busy = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") in _BUSY
        return StorageError(errno.EAGAIN if busy else errno.EIO, f"{where} answered {found}{hint}: {error}", path)
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError):
        missing = f"no credentials for {where}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        return PermissionError(errno.EACCES, missing, path)
    if isinstance(error, boto.ParamValidationError):
        return ValueError(f"{path}: {error}")
    if isinstance(error, (boto.BotoCoreError, *_UNANSWERED)):
        again = isinstance(error, _UNANSWERED)
        return StorageError(errno.EAGAIN if again else errno.EIO, f"{where} does not answer: {error}", path)
    if path.startswith("gs://") and not isinstance(error, OSError | ValueError):
        return StorageError(errno.EIO, f"{type(error).__name__}: {error}", path)
    return None
