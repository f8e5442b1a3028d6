"""``RabbitTransport``: two connections to one RabbitMQ cluster, kept alive."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

from flame_broker.rabbit.address import RabbitAddress
from flame_broker.rabbit.connection import Connection
from flame_broker.rabbit.consumer import Consumers
from flame_broker.rabbit.link import Link
from flame_broker.rabbit.publisher import MAX_MESSAGE_BYTES, Publisher
from flame_broker.rabbit.topology import Topology
from flame_broker.transport import (
    DEFAULT_DEADLINE_S,
    Capabilities,
    Consumer,
    OnDelivery,
    QueueSpec,
)

__all__ = ["RabbitTransport"]

_DRAIN_S: Final = 2.0
_CAPABILITIES: Final = Capabilities(
    durable=True,
    confirms=True,
    dead_letters=True,
    redelivery=True,
    fanout=True,
    max_message_bytes=MAX_MESSAGE_BYTES,
    returns_in_order=True,
)


class RabbitTransport:
    """The ``Transport`` for RabbitMQ.

    Publishing and consuming use a connection each, since a broker short of memory or disk stops
    reading from connections that publish. Declares go over the consuming one: exclusive queues
    belong to it, and no alarm holds it up.

    Args:
        address: Hosts and login.
        name: Shown by the broker's management pages.
    """

    def __init__(self, address: RabbitAddress, *, name: str) -> None:
        self.on_reconnect: Callable[[], None] | None = None
        self._outbound = Link(
            address,
            f"{name} publisher",
            restore=self._restore_outbound,
            on_up=self._on_link_up,
            on_down=self._on_outbound_down,
        )
        self._inbound = Link(
            address,
            f"{name} consumer",
            restore=self._restore_inbound,
            on_up=self._on_link_up,
            on_down=self._on_link_down,
        )
        self._publisher = Publisher(trouble=self._trouble, on_refused=self._outbound.disturb)
        self._topology = Topology(self._inbound.up, self._trouble)
        self._consumers = Consumers(self._inbound.up, self._topology, self._tell_reconnected)
        self._watch: asyncio.Task[None] | None = None
        self._interrupted = False

    @property
    def capabilities(self) -> Capabilities:
        """What RabbitMQ guarantees."""
        return _CAPABILITIES

    @property
    def connected(self) -> bool:
        """Whether both connections stand."""
        return self._outbound.up.is_set() and self._inbound.up.is_set()

    @property
    def server(self) -> str:
        """Product and version of the broker."""
        return self._inbound.server

    async def open(self, *, deadline_s: float = 10.0) -> None:
        """Connect both ways, trying every host until the deadline."""
        loop = asyncio.get_running_loop()
        links = (self._inbound, self._outbound)
        attempts = [loop.create_task(link.open(deadline_s)) for link in links]
        try:
            await asyncio.gather(*attempts)
        except BaseException:  # a cancellation too; it goes on, and no half-open pair is left
            for attempt in attempts:
                attempt.cancel()
            await asyncio.wait(attempts)
            await asyncio.gather(*(link.close() for link in links))
            raise
        self._watch = loop.create_task(self._consumers.watch())

    async def close(self) -> None:
        """Wait up to 2 s for outstanding confirms, then disconnect. Safe to call twice."""
        if self._outbound.up.is_set():
            await self._publisher.drain(_DRAIN_S)
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait({self._watch})
        await self._consumers.close()
        await asyncio.gather(self._outbound.close(), self._inbound.close())
        self._publisher.close()

    async def declare(self, *queues: QueueSpec) -> None:
        """Declare queues and their bindings now and at each reconnect.

        Raises:
            QueueMismatch: A queue is there with other arguments, or an exchange is missing.
            BrokerUnavailable: No answer in time.
        """
        for spec in queues:
            await self._topology.declare(spec, DEFAULT_DEADLINE_S)

    async def declare_exchange(self, name: str, kind: str) -> None:
        """Declare a durable exchange now and at each reconnect."""
        await self._topology.declare_exchange(name, kind, DEFAULT_DEADLINE_S)

    async def delete(self, queue: str) -> None:
        """Delete a queue and forget its declaration."""
        await self._topology.delete(queue, DEFAULT_DEADLINE_S)

    async def depth(self, queue: str) -> int | None:
        """Count the messages that wait in a queue; None if there is no such queue."""
        return await self._topology.depth(queue, DEFAULT_DEADLINE_S)

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
        """Send at once; the future is done when the broker has confirmed."""
        return self._publisher.publish(
            routing_key,
            body,
            exchange=exchange,
            headers=headers,
            mandatory=mandatory,
            persistent=persistent,
            deadline_s=deadline_s,
        )

    async def consume(self, queue: str, on_delivery: OnDelivery, *, prefetch: int) -> Consumer:
        """Start a consumer with a channel and a credit of its own.

        Raises:
            QueueMismatch: There is no such queue.
            BrokerUnavailable: No answer in time.
        """
        return await self._consumers.consume(queue, on_delivery, prefetch, DEFAULT_DEADLINE_S)

    async def _restore_outbound(self, connection: Connection) -> None:
        await self._publisher.restore(connection)

    async def _restore_inbound(self, connection: Connection) -> None:
        await self._topology.restore(connection)
        await self._consumers.restore(connection)

    def _on_link_up(self) -> None:
        """Go on when both links are up: what waits may be meant for queues just declared again."""
        if self.connected:
            self._publisher.resume()
            interrupted, self._interrupted = self._interrupted, False
            if interrupted:
                self._tell_reconnected()

    def _tell_reconnected(self) -> None:
        if self.on_reconnect is not None:
            self.on_reconnect()

    def _on_link_down(self) -> None:
        self._interrupted = True

    def _on_outbound_down(self) -> None:
        self._interrupted = True
        self._publisher.suspend()

    def _trouble(self) -> str:
        for link in (self._outbound, self._inbound):
            if not link.up.is_set():
                return link.trouble
        return f"{self._outbound.address} is connected and silent"
