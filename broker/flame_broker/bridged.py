"""The transport ``worker://PATH``: through the worker that runs this process, to its broker.

A call may use Flame itself. The process that runs it has neither the address of the broker nor the
cluster key; it has a socket of its worker, and a *stand-in key* that only this worker accepts. The
worker (``flame_worker.bridge``) opens a transport of its own for each connection here and passes
everything on, with the signatures of one side replaced by those of the other.

Both directions are msgpack arrays, one after another, without a length before them::

    [number, operation, …]              a request; number 0 wants no reply
    [number, error class or "", value]  its reply
    [-1, consumer, tag, queue, redelivered, headers, body]   a delivery
    [-2]                                the worker's connection was lost and is back
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple
from itertools import count
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgpack

from flame_broker import errors, transport
from flame_broker.errors import BrokerUnavailable, ConfigError, FlameError, PayloadTooLarge
from flame_broker.transport import (
    DEFAULT_DEADLINE_S,
    Capabilities,
    Consumer,
    OnDelivery,
    QueueSpec,
)

__all__ = [
    "DELIVERY",
    "RECONNECTED",
    "BridgedTransport",
    "error_named",
    "unseal_here",
    "worker_folder",
]

DELIVERY: Final = -1
RECONNECTED: Final = -2

_READ_BYTES: Final = 256 * 1024
_WAITING_AFTER_S: Final = 0.05
_SCHEME: Final = "worker://"
_NOTHING_YET: Final = Capabilities(
    durable=False,
    confirms=False,
    dead_letters=False,
    redelivery=False,
    fanout=False,
    max_message_bytes=0,
    streams=False,
)


class BridgedDelivery(NamedTuple):
    """One message that the worker passed on."""

    transport: BridgedTransport
    tag: int
    queue: str
    redelivered: bool
    headers: Mapping[str, object]
    body: bytes

    def ack(self) -> bool:
        """Take it off the queue; False the second time, and after the transport was closed."""
        return self.transport.settle(self.tag)


class _Consumer:
    def __init__(self, owner: BridgedTransport, number: int) -> None:
        self._owner, self._number = owner, number

    async def cancel(self) -> None:
        """Stop deliveries; those that come before the reply still reach the callback."""
        await self._owner.request("cancel", self._number)


class BridgedTransport:
    """A transport to the broker of the worker that runs this process.

    It does not reconnect: a process that lost its worker is about to end.

    Args:
        path: The worker's socket.
    """

    def __init__(self, path: str) -> None:
        self.on_reconnect: Callable[[], None] | None = None
        self._path = path
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._numbers = count(1)
        self._replies: dict[int, asyncio.Future[Any]] = {}
        self._callbacks: dict[int, OnDelivery] = {}
        self._in_hand: set[int] = set()
        self._capabilities = _NOTHING_YET
        self._server = ""
        self._waits: Callable[[], bool] = lambda: False
        self._looking: asyncio.TimerHandle | None = None
        self._told = False

    @property
    def capabilities(self) -> Capabilities:
        """What the worker's transport guarantees; nothing before ``open``."""
        return self._capabilities

    @property
    def connected(self) -> bool:
        """Whether the worker listens."""
        return self._writer is not None

    @property
    def server(self) -> str:
        """What the broker behind the worker is."""
        return self._server

    def waits_while(self, condition: Callable[[], bool]) -> None:
        """Tell the worker when this process waits for calls of its own.

        The worker then lets another call use the processor (PROTOCOL.md, rule 13), so that a call
        which waits for its own calls does not stop a worker that has no slot left.

        Args:
            condition: Whether calls are on their way; looked at while there are any.
        """
        self._waits = condition

    async def open(self, *, deadline_s: float = 10.0) -> None:
        """Connect to the worker, and have it connect to the broker."""
        try:
            async with asyncio.timeout(deadline_s):
                reader, self._writer = await asyncio.open_unix_connection(self._path)
                self._reading = asyncio.create_task(self._read(reader))
                server, capabilities = await self.request("open", deadline_s)
        except (OSError, TimeoutError) as exc:
            await self.close()
            raise BrokerUnavailable(f"the worker behind {self._path} does not answer") from exc
        self._server, self._capabilities = server, Capabilities(**capabilities)

    async def close(self) -> None:
        """Leave; the worker disconnects for us. Safe to call twice."""
        if self._looking is not None:
            self._looking.cancel()
        writer, self._writer = self._writer, None
        if writer is None:
            return
        writer.close()
        if self._reading is not None:
            self._reading.cancel()
        self._fail_all()

    async def declare(self, *queues: QueueSpec) -> None:
        """Declare queues and bindings."""
        await self.request("declare", [astuple(queue) for queue in map(_plain, queues)])

    async def declare_exchange(self, name: str, kind: str) -> None:
        """Declare an exchange."""
        await self.request("declare_exchange", name, kind)

    async def delete(self, queue: str) -> None:
        """Delete a queue; one that is not there is fine."""
        await self.request("delete", queue)

    async def depth(self, queue: str) -> int | None:
        """Messages ready in the queue, or None if it does not exist."""
        found: int | None = await self.request("depth", queue)
        return found

    def publish(
        self,
        routing_key: str,
        body: bytes,
        *,
        exchange: str = "",
        headers: Mapping[str, str | int] | None = None,
        mandatory: bool = True,
        persistent: bool = True,
        deadline_s: float = DEFAULT_DEADLINE_S,
    ) -> asyncio.Future[None]:
        """Send at once; the future is done when the broker has confirmed it to the worker."""
        limit = self._capabilities.max_message_bytes
        if self.connected and len(body) > limit:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            future.set_exception(
                PayloadTooLarge(f"a message of {len(body)} bytes is over the limit of {limit}")
            )
            return future
        if self._looking is None:
            self._look_later()
        options = {
            "exchange": exchange,
            "headers": dict(headers or {}),
            "mandatory": mandatory,
            "persistent": persistent,
            "deadline_s": deadline_s,
        }
        return self.request("publish", routing_key, bytes(body), options)

    async def consume(self, queue: str, on_delivery: OnDelivery, *, prefetch: int) -> Consumer:
        """Start a consumer."""
        number = next(self._numbers)
        self._callbacks[number] = on_delivery
        await self.request("consume", number, queue, prefetch)
        return _Consumer(self, number)

    def settle(self, tag: int) -> bool:
        """Ack a delivery, once."""
        if self._writer is None or tag not in self._in_hand:
            return False
        self._in_hand.discard(tag)
        self._writer.write(msgpack.packb((0, "ack", tag)))
        return True

    def request(self, operation: str, *arguments: object) -> asyncio.Future[Any]:
        """Ask the worker; the future has its reply."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self._writer is None:
            future.set_exception(self._closed())
            return future
        number = next(self._numbers)
        self._replies[number] = future
        self._writer.write(msgpack.packb((number, operation, *arguments)))
        return future

    async def _read(self, reader: asyncio.StreamReader) -> None:
        unpacker = msgpack.Unpacker(max_buffer_size=0)
        while data := await reader.read(_READ_BYTES):
            unpacker.feed(data)
            for message in unpacker:
                self._take(message)
        self._writer = None
        self._fail_all()

    def _take(self, message: list[Any]) -> None:
        match message:
            case [-1, number, tag, *rest]:
                self._in_hand.add(tag)
                self._callbacks[number](BridgedDelivery(self, tag, *rest))
            case [-2]:
                if self.on_reconnect is not None:
                    self.on_reconnect()
            case [number, problem, value]:
                future = self._replies.pop(number)
                if not future.cancelled():
                    _settle(future, problem, value)

    def _look_later(self) -> None:
        self._looking = asyncio.get_running_loop().call_later(_WAITING_AFTER_S, self._look)

    def _look(self) -> None:
        """Tell the worker when we begin and cease to wait; ends when nothing is on its way."""
        waits, self._looking = self._waits(), None
        if waits != self._told and self._writer is not None:
            self._told = waits
            self._writer.write(msgpack.packb((0, "waiting", waits)))
        if waits:
            self._look_later()

    def _fail_all(self) -> None:
        replies, self._replies = self._replies, {}
        for future in replies.values():
            if not future.done():
                future.set_exception(self._closed())
                future.exception()  # whoever asked may be gone too

    def _closed(self) -> BrokerUnavailable:
        return BrokerUnavailable(f"the transport to the worker behind {self._path} is not open")


def _plain(queue: QueueSpec) -> QueueSpec:
    return QueueSpec(**{**asdict(queue), "kind": queue.kind.value})


def _settle(future: asyncio.Future[Any], problem: str, value: Any) -> None:
    if problem:
        future.set_exception(error_named(problem, str(value)))
    else:
        future.set_result(value)


def error_named(name: str, message: str) -> FlameError:
    """The error of this name, if it is one of ours."""
    kind = getattr(errors, name, None) or getattr(transport, name, None)
    if isinstance(kind, type) and issubclass(kind, FlameError):
        return kind(message)
    return FlameError(f"{name}: {message}")


def worker_folder() -> Path | None:
    """A folder that the worker of this process removes when it leaves; None without a worker."""
    url = os.environ.get("FLAME_BROKER_URL", "")
    return Path(url.removeprefix(_SCHEME)).parent if url.startswith(_SCHEME) else None


def unseal_here(sealed: bytes, context: bytes) -> bytes:
    """Have the worker that runs this process open a sealed field; it holds the key, we do not.

    Raises:
        ConfigError: No worker runs this process.
        SignatureError: The field was changed, or sealed for another context.
        BrokerUnavailable: The worker does not answer.
    """
    url = os.environ.get("FLAME_BROKER_URL", "")
    if not url.startswith(_SCHEME):
        raise ConfigError("sealed secrets open only in a process that a worker runs")
    unpacker = msgpack.Unpacker()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as worker:
        worker.settimeout(10.0)
        try:
            worker.connect(url.removeprefix(_SCHEME))
            worker.sendall(msgpack.packb((1, "unseal", sealed, context)))
            while data := worker.recv(_READ_BYTES):
                unpacker.feed(data)
                for _, problem, value in unpacker:
                    if problem:
                        raise error_named(problem, str(value))
                    return bytes(value)
        except OSError as exc:
            raise BrokerUnavailable(f"the worker does not answer: {exc}") from exc
    raise BrokerUnavailable("the worker closed the connection")
