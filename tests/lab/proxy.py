"""A TCP proxy between a client and a server, to cut, stall and slow their connections."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

__all__ = ["TcpProxy"]

_CHUNK_BYTES = 64 * 1024


class TcpProxy:
    """Forwards connections from a port of its own to a target; methods may be called anywhere.

    It runs an asyncio loop in a thread of its own, so that it works beside blocking tests and
    beside a loop that is busy.

    Args:
        target_port: Port of the server behind it.
        target_host: Host of the server behind it.

    Attributes:
        port: Where clients connect, on 127.0.0.1; the same for the proxy's whole life.
        delay_s: Added to every chunk on its way, in seconds; set it at any time.
        ended: When connections ended, in seconds since 1970, whoever ended them.

    Example:
        >>> with TcpProxy(node.port) as proxy:
        ...     connect(f"amqp://guest:guest@127.0.0.1:{proxy.port}/")
        ...     proxy.cut()
    """

    def __init__(self, target_port: int, target_host: str = "127.0.0.1") -> None:
        self._target = (target_host, target_port)
        self._writers: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self._accepting = True
        self._flowing = asyncio.Event()
        self._flowing.set()
        self.delay_s = 0.0
        self.accepted = 0
        self.ended: list[float] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="lab-proxy")
        self._thread.daemon = True
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        self.port: int = self._server.sockets[0].getsockname()[1]

    @property
    def connections(self) -> int:
        """How many clients are connected through it now."""
        return len(self._writers) // 2

    def cut(self) -> None:
        """Reset every connection; new ones are accepted as before."""
        self._call(self._abort_all)

    def refuse(self) -> None:
        """Reset new connections from now on; present ones stay."""
        self._call(lambda: setattr(self, "_accepting", False))

    def accept(self) -> None:
        """Take new connections again."""
        self._call(lambda: setattr(self, "_accepting", True))

    def stall(self) -> None:
        """Carry no byte in either direction, and keep every connection open."""
        self._call(self._flowing.clear)

    def resume(self) -> None:
        """Carry bytes again, those that were held back first."""
        self._call(self._flowing.set)

    def close(self) -> None:
        """Cut everything and stop listening."""
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result(10)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)
            self._loop.close()

    def _call(self, action: Callable[[], object]) -> None:
        async def act() -> None:
            action()

        asyncio.run_coroutine_threadsafe(act(), self._loop).result(10)

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._connected, "127.0.0.1", 0)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._accepting:
            _reset(writer)
            return
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
        except OSError:
            _reset(writer)
            return
        self.accepted += 1
        self._writers |= {writer, far_writer}
        self._pump(reader, far_writer, writer)
        self._pump(far_reader, writer, far_writer)

    def _pump(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        other: asyncio.StreamWriter,
    ) -> None:
        task = self._loop.create_task(self._carry(source, sink, other))
        self._pumps.add(task)
        task.add_done_callback(self._pumps.discard)

    async def _carry(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        other: asyncio.StreamWriter,
    ) -> None:
        with contextlib.suppress(OSError):
            while chunk := await source.read(_CHUNK_BYTES):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                await self._flowing.wait()
                sink.write(chunk)
                await sink.drain()
        if sink in self._writers:  # else it was cut, or its other half has ended
            self.ended.append(time.time())
        for writer in (sink, other):
            self._writers.discard(writer)
            writer.close()

    def _abort_all(self) -> None:
        self.ended += [time.time()] * self.connections
        for writer in self._writers:
            _reset(writer)
        self._writers.clear()

    async def _shut(self) -> None:
        self._server.close()
        self._abort_all()
        self._flowing.set()
        pumps = list(self._pumps)
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)

    def __enter__(self) -> Self:
        """Return the proxy itself; it listens already."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the proxy."""
        self.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    # Lingering for zero seconds turns the close into a TCP reset, as a crash or a firewall does.
    sock: socket.socket = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
