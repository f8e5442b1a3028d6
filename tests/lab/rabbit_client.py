"""Transports to a RabbitMQ node, and ways to trouble them."""

from __future__ import annotations

import time

from flame_broker.connect import open_transport
from flame_broker.rabbit import RabbitTransport
from lab.proxy import TcpProxy
from lab.rabbit import RabbitNode

__all__ = ["count_reconnects", "drop_connection", "make", "through"]


def make(url: str) -> RabbitTransport:
    """Make a transport named ``test``, not open yet."""
    transport = open_transport(url, name="test")
    assert isinstance(transport, RabbitTransport)
    return transport


def through(proxy: TcpProxy, url: str, query: str = "") -> str:
    """Make the URL that leads to a virtual host by way of a proxy."""
    return f"amqp://guest:guest@127.0.0.1:{proxy.port}/{url.rpartition('/')[2]}{query}"


def drop_connection(node: RabbitNode, role: str) -> None:
    """Have the broker close one connection of ``test``: its ``publisher`` or its ``consumer``."""
    for row in node.ctl("list_connections", "pid", "client_properties").splitlines():
        pid, _, properties = row.partition("\t")
        if f'"test {role}"' in properties:
            node.ctl("close_connection", pid, "dropped by a test")


def count_reconnects(transport: RabbitTransport) -> list[float]:
    """Return a list that grows by a monotonic time at each reconnect."""
    times: list[float] = []
    transport.on_reconnect = lambda: times.append(time.monotonic())
    return times
