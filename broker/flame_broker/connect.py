"""From a broker URL to the transport that speaks its protocol."""

from __future__ import annotations

from flame_broker.errors import ConfigError
from flame_broker.transport import Transport

__all__ = ["open_transport"]


def open_transport(url: str, *, name: str) -> Transport:
    """Make the transport for a broker URL; ``await transport.open()`` connects it.

    The scheme decides: ``amqp``/``amqps`` RabbitMQ, ``memory`` this process, ``redis``/``rediss``
    and ``sqs`` through kombu, ``worker`` whatever the worker that runs this process is connected
    to. Only the client library of that one is imported.

    Args:
        url: Broker URL, several RabbitMQ hosts separated by ``;``.
        name: Who connects, for the broker's management pages.

    Raises:
        ConfigError: The URL is malformed, or its scheme unknown.
    """
    scheme, divider, place = url.partition("://")
    scheme = scheme if divider else ""
    match scheme:
        case "amqp" | "amqps":
            from flame_broker.rabbit import RabbitAddress, RabbitTransport

            return RabbitTransport(RabbitAddress.parse(url), name=name)
        case "memory":
            from flame_broker.memory import MemoryTransport

            return MemoryTransport(place.partition("/")[0].partition("?")[0])
        case "redis" | "rediss" | "sqs":
            from flame_broker.portable import PortableTransport

            return PortableTransport(url, name=name)
        case "worker":
            from flame_broker.bridged import BridgedTransport

            return BridgedTransport(place)
    raise ConfigError(
        "broker URL: expected amqp, amqps, memory, redis, sqs or worker before '://', found "
        f"{scheme!r}"
    )
