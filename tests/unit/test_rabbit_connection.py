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
def server() -> Iterator[FakeServer]:
    made = FakeServer()
    yield made
    made.close()


class FakeServer:
    """Says something to whoever connects and hangs up, or resets the connection."""

    def __init__(self) -> None:
        self.says = b""
        self._socket = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def parameters(self) -> Any:
        port = self._socket.getsockname()[1]
        address = RabbitAddress.parse(f"amqp://guest:guest@127.0.0.1:{port}/")
        (parameters,) = connection.parameters_for(address, "test")
        return parameters

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            client.recv(8)  # pika has introduced itself
            if self.says:
                client.sendall(self.says)
            else:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()


def _is_past(timer: asyncio.TimerHandle) -> bool:
    return timer.cancelled() or timer.when() + 0.1 < asyncio.get_running_loop().time()


async def test_a_connection_that_is_reset_before_pika_listens_leaves_no_traceback(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
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
    with pytest.raises(connection.ConnectFailed):
        await connection.Connection.open(server.parameters)
    await eventually(lambda: all(_is_past(timer) for timer in timers))
    assert complaints == []


async def test_who_hangs_up_without_a_word_may_be_a_proxy_whose_broker_starts(
    server: FakeServer,
) -> None:
    with pytest.raises(connection.ConnectFailed, match="hung up") as caught:
        await connection.Connection.open(server.parameters)
    assert not caught.value.final


async def test_who_answers_something_else_is_no_broker(server: FakeServer) -> None:
    server.says = b"HTTP/1.1 400 Bad Request\r\n\r\n"
    with pytest.raises(connection.ConnectFailed, match="not an AMQP 0-9-1 server") as caught:
        await connection.Connection.open(server.parameters)
    assert caught.value.final
