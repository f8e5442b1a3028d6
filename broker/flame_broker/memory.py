"""The in-process transport, ``memory://NAME``: a member's view of a broker inside this process.

A namespace is one broker; it lives as long as a transport refers to it. A forked child starts with
none. Messages are as safe as the process: nothing outlives it.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable, Mapping
from types import MappingProxyType
from weakref import WeakValueDictionary

from flame_broker.errors import BrokerUnavailable, PayloadTooLarge
from flame_broker.memory_broker import Member, MemoryBroker, MemoryConsumer
from flame_broker.transport import (
    DEFAULT_DEADLINE_S,
    Capabilities,
    Consumer,
    OnDelivery,
    QueueKind,
    QueueSpec,
    Unroutable,
)

__all__ = ["MemoryTransport"]

_MAX_MESSAGE_BYTES = 16 * 1024 * 1024  # RabbitMQ 4's default: what fits here, fits there
_NO_HEADERS: Mapping[str, object] = MappingProxyType({})


class _Registry:
    """The named brokers of this process."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._lock = threading.Lock()
        self._brokers: WeakValueDictionary[str, MemoryBroker] = WeakValueDictionary()

    def find(self, namespace: str) -> MemoryBroker:
        if not namespace:
            return MemoryBroker()
        with self._lock:
            return self._brokers.setdefault(namespace, MemoryBroker())


_registry = _Registry()
# A lock that another thread held at the fork would never be released in the child.
os.register_at_fork(after_in_child=_registry.reset)


class MemoryTransport:
    """A transport to a broker inside this process.

    Deadlines do not matter here: the broker is there, or (before ``open`` and after ``close``)
    it will not come, and then every method raises ``BrokerUnavailable`` at once.

    Args:
        namespace: Transports with the same name meet; one without a name is alone.
        max_message_bytes: The largest body it takes.
    """

    def __init__(self, namespace: str = "", *, max_message_bytes: int = _MAX_MESSAGE_BYTES) -> None:
        self.on_reconnect: Callable[[], None] | None = None
        self._namespace = namespace
        self._broker = _registry.find(namespace)
        self._member: Member | None = None
        self._capabilities = Capabilities(
            durable=False,
            confirms=True,
            dead_letters=False,
            redelivery=True,
            fanout=True,
            max_message_bytes=max_message_bytes,
            streams=True,
            returns_in_order=True,
        )

    @property
    def capabilities(self) -> Capabilities:
        """What this transport guarantees."""
        return self._capabilities

    @property
    def connected(self) -> bool:
        """Whether it is open."""
        return self._member is not None

    @property
    def server(self) -> str:
        """What the broker is."""
        return "broker in this process"

    async def open(self, *, deadline_s: float = 10.0) -> None:
        """Join the broker; callbacks run in the loop that runs now."""
        if self._member is None:
            member = Member(self._broker, asyncio.get_running_loop())
            with self._broker.lock:
                self._broker.join(member)
            self._member = member

    async def close(self) -> None:
        """Leave: exclusive queues go, unacked messages go back. Safe to call twice."""
        member, self._member = self._member, None
        if member is not None:
            with self._broker.lock:
                member.release()

    async def declare(self, *queues: QueueSpec) -> None:
        """Declare queues and bindings; ``ConfigError`` if one exists with other arguments."""
        member = self._joined()
        with self._broker.lock:
            for spec in queues:
                self._broker.declare(spec, member)

    async def declare_exchange(self, name: str, kind: str) -> None:
        """Declare an exchange (``fanout``, ``topic``, ``direct``)."""
        self._joined()
        with self._broker.lock:
            self._broker.exchanges[name] = kind

    async def delete(self, queue: str) -> None:
        """Delete a queue; one that is not there is fine."""
        self._joined()
        with self._broker.lock:
            self._broker.delete(queue)

    async def depth(self, queue: str) -> int | None:
        """Messages ready in the queue, or None if it does not exist."""
        self._joined()
        with self._broker.lock:
            known = self._broker.queues.get(queue)
            return None if known is None else len(known.messages)

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
        """Put a message into its queues; the future is done on return."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._member is None:
            future.set_exception(self._closed())
        elif len(body) > self._capabilities.max_message_bytes:
            future.set_exception(_too_large(len(body), self._capabilities.max_message_bytes))
        elif not self._put(exchange, routing_key, body, headers) and mandatory:
            future.set_exception(
                Unroutable(f"no queue takes {routing_key!r} of exchange {exchange!r}")
            )
        else:
            future.set_result(None)
        return future

    def _put(
        self, exchange: str, key: str, body: bytes, headers: Mapping[str, str | int] | None
    ) -> bool:
        kept = dict(headers) if headers else _NO_HEADERS
        with self._broker.lock:
            queues = self._broker.route(exchange, key)
            for queue in queues:
                queue.put(body, kept)
        return bool(queues)

    async def consume(self, queue: str, on_delivery: OnDelivery, *, prefetch: int) -> Consumer:
        """Start a consumer; a prefetch of 0 is no limit, as in AMQP."""
        member = self._joined()
        with self._broker.lock:
            source = self._broker.queues.get(queue)
            if source is None:
                raise Unroutable(f"queue {queue!r} does not exist: declare it before consuming")
            if source.spec.kind is QueueKind.STREAM:
                source = source.tap()
            consumer = MemoryConsumer(member, source, on_delivery, prefetch or sys.maxsize)
            member.consumers.add(consumer)
        return consumer

    def _joined(self) -> Member:
        if self._member is None:
            raise self._closed()
        return self._member

    def _closed(self) -> BrokerUnavailable:
        return BrokerUnavailable(f"the transport to memory://{self._namespace} is not open")


def _too_large(size: int, limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"a message of {size} bytes is over the transport's limit of {limit}")
