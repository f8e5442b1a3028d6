"""Transports to a RabbitMQ node, and ways to trouble them."""

from __future__ import annotations

import re
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


def drop_connection(node: RabbitNode, role: str, *, of: str = "test", url: str = "") -> int:
    """Have the broker close one connection of a program: its ``publisher`` or its ``consumer``.

    Args:
        node: The broker.
        role: Which of the two.
        of: How the program's transports are named, as a regular expression.
        url: Only in this virtual host.

    Returns:
        How many were closed.
    """
    named, dropped = re.compile(f'"{of} {role}"'), 0
    vhost = url.rpartition("/")[2]
    for row in node.ctl("list_connections", "pid", "vhost", "client_properties").splitlines():
        pid, _, rest = row.partition("\t")
        at, _, properties = rest.partition("\t")
        if named.search(properties) and vhost in ("", at):
            node.ctl("close_connection", pid, "dropped by a test")
            dropped += 1
    return dropped


def count_reconnects(transport: RabbitTransport) -> list[float]:
    """Return a list that grows by a monotonic time at each reconnect."""
    times: list[float] = []
    transport.on_reconnect = lambda: times.append(time.monotonic())
    return times
