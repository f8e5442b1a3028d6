"""Transports to the run's RabbitMQ node."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest

from flame_broker.rabbit import RabbitTransport
from flame_broker.transport import QueueSpec
from lab import RabbitNode, TcpProxy
from lab.rabbit_client import make

Open = Callable[[str], Awaitable[RabbitTransport]]


@pytest.fixture
async def opened() -> AsyncIterator[Open]:
    """Open RabbitMQ transports by URL; closed afterwards."""
    transports: list[RabbitTransport] = []

    async def open_one(url: str) -> RabbitTransport:
        transport = make(url)
        transports.append(transport)
        await transport.open(deadline_s=20)
        return transport

    yield open_one
    for transport in transports:
        await transport.close()


@pytest.fixture
async def transport(opened: Open, rabbit_vhost: str) -> RabbitTransport:
    """A transport in a virtual host of its own, with a quorum queue ``work``."""
    transport = await opened(rabbit_vhost)
    await transport.declare(QueueSpec("work"))
    return transport


@pytest.fixture
def proxy(rabbit: RabbitNode) -> Iterator[TcpProxy]:
    """A proxy before the run's RabbitMQ node."""
    with TcpProxy(rabbit.port) as proxy:
        yield proxy
