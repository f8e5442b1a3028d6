"""The worker's end of ``worker://``: calls make calls, without the broker's address or the key.

See ``flame_broker.bridged`` for the other end and for what travels between. The socket lies in a
folder that only this user may enter.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import socket
import struct
import sys
import tempfile
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import asdict
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Final

import msgpack

from flame_broker.bridged import DELIVERY, RECONNECTED
from flame_broker.errors import FlameError
from flame_broker.frames import resign
from flame_broker.keys import Key, Keyring
from flame_broker.logs import get_logger
from flame_broker.sealing import unseal
from flame_broker.transport import Consumer, Delivery, QueueKind, QueueSpec, Transport

__all__ = ["Bridge"]

_log = get_logger("flame.worker")

_FOLDER: Final = "flame-worker-"
_READ_BYTES: Final = 256 * 1024
_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid: see SO_PEERCRED in unix(7)
_SOL_LOCAL: Final = 0  # macOS, sys/un.h; Python has no names for these
_LOCAL_PEERPID: Final = 2

OnWaiting = Callable[[int, bool], None]


class Bridge:
    """Listens to the children of one worker.

    Args:
        connect: Makes a transport to the broker, not opened yet.
        keyring: The worker's keys.
        on_waiting: Told the process group of a child that waits for calls of its own, or no longer.
    """

    def __init__(
        self, connect: Callable[[], Transport], keyring: Keyring, on_waiting: OnWaiting
    ) -> None:
        self._connect = connect
        self._keyring = keyring
        self._on_waiting = on_waiting
        self._secret = secrets.token_urlsafe(32)
        self._stand_in = Key.stand_in(keyring.signer.hex_id, self._secret.encode())
        # Short, since a socket's path has a limit of some hundred bytes (unix(7)).
        self._folder = Path(tempfile.gettempdir()) / f"{_FOLDER}{secrets.token_hex(8)}"
        self._server: asyncio.Server | None = None
        self._visitors: set[_Visitor] = set()

    @property
    def environ(self) -> Mapping[str, str]:
        """What children find in their environment."""
        return {
            "FLAME_BROKER_URL": f"worker://{self._path}",
            "FLAME_KEY": f"stand-in:{self._keyring.signer.hex_id}:{self._secret}",
        }

    @property
    def _path(self) -> Path:
        return self._folder / "socket"

    async def start(self) -> None:
        """Begin to listen; clean up after workers that were killed."""
        for left in self._folder.parent.glob(f"{_FOLDER}*"):
            if _is_abandoned(left):
                shutil.rmtree(left, ignore_errors=True)
        self._folder.mkdir(mode=0o700)
        self._server = await asyncio.start_unix_server(self._visit, self._path)
        self._path.chmod(0o600)

    async def close(self) -> None:
        """Disconnect everybody."""
        if self._server is not None:
            self._server.close()
        for visitor in [*self._visitors]:
            visitor.writer.close()
        await asyncio.gather(*(visitor.leave() for visitor in [*self._visitors]))
        shutil.rmtree(self._folder, ignore_errors=True)

    def outgoing(self, body: bytes) -> bytes:
        """A child's frame as the cluster must see it."""
        return resign(body, self._stand_in, self._keyring.signer)

    def incoming(self, body: bytes) -> bytes:
        """The cluster's frame as a child must see it. What does not hold the child refuses."""
        try:
            return resign(body, self._keyring.signer, self._stand_in)
        except FlameError:
            return body

    def unseal(self, sealed: bytes, context: bytes) -> bytes:
        """Open a sealed field."""
        return unseal(self._keyring, sealed, context)

    async def _visit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tell = partial(self._on_waiting, _process_group(writer))
        visitor = _Visitor(self, self._connect(), writer, tell)
        self._visitors.add(visitor)
        try:
            await visitor.serve(reader)
        except ConnectionError as exc:
            _log.debug("bridge.lost", reason=str(exc))
        finally:
            self._visitors.discard(visitor)
            await visitor.leave()


class _Visitor:
    """One connection of a child, and the transport that was opened for it."""

    def __init__(
        self,
        bridge: Bridge,
        upstream: Transport,
        writer: asyncio.StreamWriter,
        tell_waiting: Callable[[bool], None],
    ) -> None:
        self.writer = writer
        self._bridge = bridge
        self._upstream = upstream
        self._tell_waiting = tell_waiting
        self._waiting = False
        self._tags = count(1)
        self._in_hand: dict[int, Delivery] = {}
        self._consumers: dict[int, Consumer] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader) -> None:
        """Answer requests until the child hangs up."""
        unpacker = msgpack.Unpacker(max_buffer_size=0)
        while data := await reader.read(_READ_BYTES):
            unpacker.feed(data)
            for number, operation, *arguments in unpacker:
                self._do(number, operation, arguments)
            await self.writer.drain()

    async def leave(self) -> None:
        """Give back what the child had in hand."""
        for task in self._tasks:
            task.cancel()
        self._set_waiting(False)
        await self._upstream.close()
        self.writer.close()

    def _do(self, number: int, operation: str, arguments: list[Any]) -> None:
        match operation:
            case "ack":
                delivery = self._in_hand.pop(arguments[0], None)
                if delivery is not None:
                    delivery.ack()
            case "waiting":
                self._set_waiting(*arguments)
            case "publish":
                self._publish(number, *arguments)
            case _:
                self._later(self._answer(number, self._operations()[operation](*arguments)))

    def _operations(self) -> dict[str, Callable[..., Coroutine[None, None, Any]]]:
        return {
            "open": self._open,
            "declare": self._declare,
            "declare_exchange": self._upstream.declare_exchange,
            "delete": self._upstream.delete,
            "depth": self._upstream.depth,
            "consume": self._consume,
            "cancel": self._cancel,
            "unseal": self._unseal,
        }

    async def _open(self, deadline_s: float) -> Any:
        await self._upstream.open(deadline_s=deadline_s)
        self._upstream.on_reconnect = partial(self._send, RECONNECTED)
        return self._upstream.server, asdict(self._upstream.capabilities)

    async def _declare(self, queues: list[list[Any]]) -> None:
        await self._upstream.declare(*map(_queue_spec, queues))

    async def _consume(self, number: int, queue: str, prefetch: int) -> None:
        self._consumers[number] = await self._upstream.consume(
            queue, partial(self._deliver, number), prefetch=prefetch
        )

    async def _cancel(self, number: int) -> None:
        await self._consumers.pop(number).cancel()

    async def _unseal(self, sealed: bytes, context: bytes) -> bytes:
        return self._bridge.unseal(sealed, context)

    def _deliver(self, number: int, delivery: Delivery) -> None:
        tag = next(self._tags)
        self._in_hand[tag] = delivery
        headers = {k: v for k, v in delivery.headers.items() if isinstance(v, (str, int, bool))}
        body = self._bridge.incoming(bytes(delivery.body))
        self._send(DELIVERY, number, tag, delivery.queue, delivery.redelivered, headers, body)

    def _publish(
        self, number: int, routing_key: str, body: bytes, options: Mapping[str, Any]
    ) -> None:
        try:
            signed = self._bridge.outgoing(body)
        except FlameError as exc:
            self._send(number, type(exc).__name__, str(exc))
            return
        confirmed = self._upstream.publish(routing_key, signed, **options)
        confirmed.add_done_callback(partial(self._confirm, number))

    def _confirm(self, number: int, confirmed: asyncio.Future[None]) -> None:
        problem = None if confirmed.cancelled() else confirmed.exception()
        if problem is None:
            self._send(number, "", None)
        else:
            self._send(number, type(problem).__name__, str(problem))

    async def _answer(self, number: int, work: Coroutine[None, None, Any]) -> None:
        try:
            value = await work
        except FlameError as exc:
            self._send(number, type(exc).__name__, str(exc))
        else:
            self._send(number, "", value)

    def _send(self, *message: object) -> None:
        if not self.writer.is_closing():
            self.writer.write(msgpack.packb(message))

    def _set_waiting(self, waiting: bool) -> None:
        if waiting != self._waiting:
            self._waiting = waiting
            self._tell_waiting(waiting)

    def _later(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _queue_spec(fields: list[Any]) -> QueueSpec:
    name, kind, exclusive, arguments, bindings = fields
    pairs = tuple((exchange, key) for exchange, key in bindings)
    return QueueSpec(name, QueueKind(kind), exclusive, arguments, pairs)


def _is_abandoned(folder: Path) -> bool:
    """Whether a folder of this user has a socket that nobody listens to."""
    try:
        if folder.stat().st_uid != os.getuid():
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)  # a worker that is stopped may have a full backlog
            probe.connect(str(folder / "socket"))
    except ConnectionRefusedError:
        return True
    except OSError:  # no socket yet: a worker that starts
        return False
    return False


def _process_group(writer: asyncio.StreamWriter) -> int:
    """Whose child is calling: the process group of the caller, which a slot's child leads."""
    try:
        return os.getpgid(_peer_pid(writer.get_extra_info("socket")))
    except OSError:  # it is gone already
        return 0


def _peer_pid(connection: socket.socket) -> int:
    pid: int
    if sys.platform == "darwin":
        pid = connection.getsockopt(_SOL_LOCAL, _LOCAL_PEERPID)
    else:
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, _, _ = _CREDENTIALS.unpack(raw)
    return pid
