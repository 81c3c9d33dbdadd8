"""Large objects in parts that go up, and come down, side by side: one connection rarely fills the road to a store."""

import asyncio
from collections.abc import Awaitable, Callable

PART_BYTES = 8 * 2**20
_AT_ONCE = 8
_MOST = 10_000  # parts of an upload, S3's limit


def spans(size: int) -> list[tuple[int, int]]:
    """[start, end) of each part."""
    part = max(PART_BYTES, -(-size // _MOST))
    return [(start, min(start + part, size)) for start in range(0, size, part)]


async def each(work: Callable[[int, int, int], Awaitable], size: int) -> list:
    """[await work(number, start, end)] of all parts, a few at a time; the first failure ends the others."""
    free = asyncio.Semaphore(_AT_ONCE)

    async def one(number: int, start: int, end: int):
        async with free:
            return await work(number, start, end)

    tasks = [asyncio.ensure_future(one(number, *span)) for number, span in enumerate(spans(size))]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def put(client, address: dict[str, str], data: memoryview) -> None:
    """Uploads `data`; the object appears when its last part is there. What fails or is cancelled is aborted, and leaves
    nothing; should that fail as well, a note to the first error names the upload that is left."""
    upload = {**address, "UploadId": await _begin(client, address)}

    async def send(number: int, start: int, end: int) -> dict:
        answer = await client.upload_part(**upload, PartNumber=number + 1, Body=bytes(data[start:end]))
        return {"PartNumber": number + 1, "ETag": answer["ETag"]}

    try:
        parts = await each(send, len(data))
        await client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
    except BaseException as first:
        await asyncio.shield(_abort(client, upload, first))
        raise


async def _begin(client, address: dict[str, str]) -> str:
    """The new upload's id. Cancelled, it waits for the answer all the same: without the id nobody can abort it."""
    answer = asyncio.ensure_future(client.create_multipart_upload(**address))
    try:
        return (await asyncio.shield(answer))["UploadId"]
    except asyncio.CancelledError as first:
        await _abort(client, {**address, "UploadId": (await answer)["UploadId"]}, first)
        raise


async def _abort(client, upload: dict[str, str], first: BaseException) -> None:
    try:
        await client.abort_multipart_upload(**upload)
    except Exception as e:
        first.add_note(f"upload {upload['UploadId']} could not be aborted: {e}")
