"""A road to a store as clouds have it: each connection carries so many bytes a second, and answers take a while."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator

_CHUNK = 1 << 16
_PAUSE_S = 0.005  # after so long without a byte, what comes is a new message


@contextlib.contextmanager
def slow_road(host: str, port: int, bytes_per_s: float, delay_s: float) -> Iterator[int]:
    """A port of this machine that leads to host:port. Each connection carries at most `bytes_per_s` in each direction,
    and the first byte of each message arrives `delay_s` late."""
    loop, ready = asyncio.new_event_loop(), threading.Event()
    found: list[int] = []

    async def carry(reader, writer) -> None:
        clock, free, last = loop.time, 0.0, 0.0
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

    async def serve() -> None:
        server = await asyncio.start_server(connect, "127.0.0.1", 0)
        found.append(server.sockets[0].getsockname()[1])
        ready.set()
        async with server:
            await server.serve_forever()

    def run() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)

    task = loop.create_task(serve())
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    ready.wait(10)
    try:
        yield found[0]
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(10)
