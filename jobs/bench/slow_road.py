"""A road to a store as clouds have it: each connection carries so many bytes a second, and answers take a while."""

import asyncio
import contextlib
import multiprocessing
from collections.abc import Iterator

_CHUNK = 1 << 17
_PAUSE_S = 0.005  # after so long without a byte, what comes is a new message


@contextlib.contextmanager
def slow_road(host: str, port: int, bytes_per_s: float, delay_s: float) -> Iterator[int]:
    """A port of this machine that leads to host:port. Each connection carries at most `bytes_per_s` in each direction,
    and the first byte of each message arrives `delay_s` late. It is a process of its own, so that it holds nobody up.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, host, port, bytes_per_s, delay_s), daemon=True)
    process.start()
    try:
        assert ours.poll(30), "the slow road does not open"
        yield ours.recv()
    finally:
        process.kill()
        process.join(10)


def _serve(pipe, host: str, port: int, bytes_per_s: float, delay_s: float) -> None:
    asyncio.run(_lead(pipe, host, port, bytes_per_s, delay_s))


async def _lead(pipe, host: str, port: int, bytes_per_s: float, delay_s: float) -> None:
    clock = asyncio.get_running_loop().time

    async def carry(reader, writer) -> None:
        free, last = 0.0, 0.0
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK):
                now = clock()
                if now - last > _PAUSE_S:
                    free = max(free, now + delay_s)
                free = max(free, now) + len(data) / bytes_per_s
                await asyncio.sleep(free - now)
                writer.write(data)
                await writer.drain()
                last = clock()
        with contextlib.suppress(OSError):
            writer.close()

    async def connect(reader, writer) -> None:
        there = await asyncio.open_connection(host, port)
        await asyncio.gather(carry(reader, there[1]), carry(there[0], writer))

    server = await asyncio.start_server(connect, "127.0.0.1", 0)
    pipe.send(server.sockets[0].getsockname()[1])
    async with server:
        await server.serve_forever()
