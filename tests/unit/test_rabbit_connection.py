"""A connection to a broker that is none yet, or no more: what is left of it is quiet."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from flame_broker.rabbit import connection
from flame_broker.rabbit.address import RabbitAddress
from flame_broker.rabbit.stream import StreamServices
from lab.wait import eventually


@pytest.fixture
def resetting_port() -> Iterator[int]:
    """Port of a server that resets whoever connects, as a proxy without its broker does."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            client.recv(8)  # pika has introduced itself
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()

    threading.Thread(target=serve, daemon=True).start()
    yield server.getsockname()[1]
    server.shutdown(socket.SHUT_RDWR)
    server.close()


def _is_past(timer: asyncio.TimerHandle) -> bool:
    return timer.cancelled() or timer.when() + 0.1 < asyncio.get_running_loop().time()


async def test_a_connection_that_is_reset_before_pika_listens_leaves_no_traceback(
    resetting_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    complaints: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    timers: list[asyncio.TimerHandle] = []
    pair, call_later = StreamServices._pair, StreamServices.call_later

    async def paired_late(self: StreamServices, *args: Any) -> Any:
        stream, raw = await pair(self, *args)
        await eventually(lambda: raw.is_closed)
        return stream, raw

    def noted(self: StreamServices, *args: Any) -> asyncio.TimerHandle:
        timers.append(call_later(self, *args))
        return timers[-1]

    monkeypatch.setattr(StreamServices, "_pair", paired_late)
    monkeypatch.setattr(StreamServices, "call_later", noted)
    monkeypatch.setattr(connection, "_HANDSHAKE_TIMEOUT_S", 0.5)
    address = RabbitAddress.parse(f"amqp://guest:guest@127.0.0.1:{resetting_port}/")
    (parameters,) = connection.parameters_for(address, "test")
    with pytest.raises(connection.ConnectFailed):
        await connection.Connection.open(parameters)
    await eventually(lambda: all(_is_past(timer) for timer in timers))
    assert complaints == []
