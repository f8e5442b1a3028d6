"""The byte stream under pika, on asyncio's own socket transports.

Pika's asyncio adapter sends every AMQP frame with a system call of its own, three to a published
message, and waits for the socket to become writable first. Here all that one turn of the loop
writes leaves in one piece at the end of the turn. Pika foresees such a replacement: the classes
of ``pika.adapters.utils.nbio_interface`` are its contract.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Final

from pika.adapters.utils import nbio_interface

__all__ = ["StreamServices"]

# Pika cuts each frame off the front of its buffer by copying the rest, so a large buffer of small
# frames is quadratic work: it gets its food in bites.
_BITE_BYTES: Final = 16 * 1024

_OnDone = Callable[[Any], None]


class _Reference(nbio_interface.AbstractIOReference):  # type: ignore[misc]  # pika is untyped
    """A running operation, reported to ``on_done`` unless it is cancelled first."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, object], on_done: _OnDone
    ) -> None:
        self._task = loop.create_task(work)
        self._task.add_done_callback(partial(self._report, on_done))

    @staticmethod
    def _report(on_done: _OnDone, task: asyncio.Task[object]) -> None:
        if not task.cancelled():
            on_done(task.exception() or task.result())

    def cancel(self) -> bool:
        return self._task.cancel()


class _Stream(nbio_interface.AbstractStreamTransport, asyncio.Protocol):  # type: ignore[misc]
    """One connection: pika's transport on its upper side, asyncio's protocol on its lower one."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        protocol_factory: Callable[[], nbio_interface.AbstractStreamProtocol],
    ) -> None:
        self._loop = loop
        self._factory = protocol_factory
        self._pending: list[bytes] = []
        self.heard = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._protocol = self._factory()
        self._protocol.connection_made(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._protocol.connection_lost(exc)

    def eof_received(self) -> bool | None:
        return bool(self._protocol.eof_received())

    def data_received(self, data: bytes) -> None:
        self.heard = True
        if len(data) <= _BITE_BYTES:
            self._protocol.data_received(data)
            return
        for start in range(0, len(data), _BITE_BYTES):
            self._protocol.data_received(data[start : start + _BITE_BYTES])

    def get_protocol(self) -> nbio_interface.AbstractStreamProtocol:
        return self._protocol

    def write(self, data: bytes) -> None:
        if not self._pending:
            self._loop.call_soon(self._flush)
        self._pending.append(data)

    def _flush(self) -> None:
        if self._pending:
            data = b"".join(self._pending)
            self._pending.clear()
            self._transport.write(data)

    def get_write_buffer_size(self) -> int:
        return sum(map(len, self._pending)) + self._transport.get_write_buffer_size()

    def abort(self) -> None:
        self._flush()  # a last Close-Ok, if the socket takes it at once
        self._transport.abort()


class StreamServices(nbio_interface.AbstractIOServices):  # type: ignore[misc]  # pika is untyped
    """What pika asks of an event loop, answered by the running asyncio loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._stream: _Stream | None = None

    @property
    def heard(self) -> bool:
        """Whether the other end has said anything at all."""
        return self._stream is not None and self._stream.heard

    def hang_up(self) -> None:
        """Drop the connection without a goodbye."""
        if self._stream is not None:
            self._stream.abort()

    def get_native_ioloop(self) -> asyncio.AbstractEventLoop:
        """Return asyncio's loop."""
        return self._loop

    def close(self) -> None:
        """Refuse: pika only asks for this when it owns the loop."""
        raise NotImplementedError("the loop belongs to the process")

    run = stop = close

    def add_callback_threadsafe(self, callback: Callable[[], None]) -> None:
        """Call back in the loop, soon."""
        self._loop.call_soon_threadsafe(callback)

    def call_later(self, delay: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        """Call back in the loop after ``delay`` seconds."""
        return self._loop.call_later(delay, callback)

    def getaddrinfo(  # noqa: PLR0917 - the signature is pika's
        self,
        host: str,
        port: int,
        on_done: _OnDone,
        family: int = 0,
        socktype: int = 0,
        proto: int = 0,
        flags: int = 0,
    ) -> _Reference:
        """Resolve a host name."""
        lookup = self._loop.getaddrinfo(
            host, port, family=family, type=socktype, proto=proto, flags=flags
        )
        return _Reference(self._loop, lookup, on_done)

    def connect_socket(
        self, sock: socket.socket, resolved_addr: tuple[str, int], on_done: _OnDone
    ) -> _Reference:
        """Connect a socket to an address."""
        return _Reference(self._loop, self._loop.sock_connect(sock, resolved_addr), on_done)

    def create_streaming_connection(
        self,
        protocol_factory: Callable[[], nbio_interface.AbstractStreamProtocol],
        sock: socket.socket,
        on_done: _OnDone,
        ssl_context: ssl.SSLContext | None = None,
        server_hostname: str | None = None,
    ) -> _Reference:
        """Speak TLS if asked to, and pair the socket with pika's protocol object."""
        work = self._pair(protocol_factory, sock, ssl_context, server_hostname)
        return _Reference(self._loop, work, on_done)

    async def _pair(
        self,
        protocol_factory: Callable[[], nbio_interface.AbstractStreamProtocol],
        sock: socket.socket,
        ssl_context: ssl.SSLContext | None,
        server_hostname: str | None,
    ) -> tuple[_Stream, nbio_interface.AbstractStreamProtocol]:
        _, stream = await self._loop.create_connection(
            partial(_Stream, self._loop, protocol_factory),
            sock=sock,
            ssl=ssl_context,
            server_hostname=(server_hostname or "") if ssl_context else None,
        )
        self._stream = stream
        return stream, stream.get_protocol()
