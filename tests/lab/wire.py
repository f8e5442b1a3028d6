"""The in-process transport with a wire in it: nothing arrives before the test lets it go on.

So a test chooses how far a publish, its confirm and an ack have come when a connection is cut or
a worker dies. As with RabbitMQ, publisher and consumer have connections of their own: what was
published and not confirmed is sent again, what was delivered and not acked is delivered again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flame_broker.memory import MemoryTransport
from flame_broker.memory_broker import Member, MemoryConsumer, MemoryDelivery
from flame_broker.transport import (
    DEFAULT_DEADLINE_S,
    Consumer,
    Delivery,
    OnDelivery,
    Unroutable,
)

__all__ = ["Sent", "Wire"]


@dataclass(slots=True, eq=False)
class Sent:
    """A message between its publish and its confirm."""

    routing_key: str
    body: bytes
    exchange: str
    headers: Mapping[str, str | int] | None
    mandatory: bool
    confirmed: asyncio.Future[None]
    routed: bool = False


class Wire(MemoryTransport):
    """One worker's connections.

    Args:
        namespace: The broker.
        loop: The worker's.
        lost: Told of deliveries in hand, whenever their connection ends.
        resent: Told of messages that are published again.

    Attributes:
        outgoing: Published, not at the broker yet.
        confirms: At the broker; the publisher does not know yet.
        acks: Acked, the broker does not know yet.
    """

    def __init__(
        self,
        namespace: str,
        loop: asyncio.AbstractEventLoop,
        *,
        lost: Callable[[list[MemoryDelivery]], None],
        resent: Callable[[list[bytes]], None],
    ) -> None:
        super().__init__(namespace)
        self.outgoing: deque[Sent] = deque()
        self.confirms: deque[Sent] = deque()
        self.acks: deque[MemoryDelivery] = deque()
        self._loop = loop
        self._lost = lost
        self._resent = resent
        self._consumers: list[_Kept] = []

    # ── what the worker does ─────────────────────────────────────────────────

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
        """Put a message onto the wire."""
        confirmed: asyncio.Future[None] = self._loop.create_future()
        self.outgoing.append(Sent(routing_key, body, exchange, headers, mandatory, confirmed))
        return confirmed

    async def consume(self, queue: str, on_delivery: OnDelivery, *, prefetch: int) -> Consumer:
        """Start a consumer that is started again after a cut."""
        kept = _Kept(self, queue, on_delivery, prefetch)
        self._consumers.append(kept)
        kept.start(self._joined())
        return kept

    async def close(self) -> None:
        """Leave in order: all that is on the wire arrives first."""
        while self.flow():
            pass
        if self._member is not None:
            self._lost(list(self._member.unacked))
        await super().close()

    # ── what the test does ───────────────────────────────────────────────────

    def send(self) -> bool:
        """Bring the next message to the broker; False if there is none."""
        if not self.outgoing:
            return False
        sent = self.outgoing.popleft()
        sent.routed = self._put(sent.exchange, sent.routing_key, sent.body, sent.headers)
        self.confirms.append(sent)
        return True

    def confirm(self) -> bool:
        """Bring the next confirm to the worker; False if there is none."""
        if not self.confirms:
            return False
        sent = self.confirms.popleft()
        if sent.confirmed.done():
            return True
        if sent.routed or not sent.mandatory:
            sent.confirmed.set_result(None)
        else:
            sent.confirmed.set_exception(Unroutable(f"no queue takes {sent.routing_key!r}"))
        return True

    def ack(self) -> bool:
        """Bring the next ack to the broker; False if there is none."""
        if not self.acks:
            return False
        self.acks.popleft().ack()
        return True

    def flow(self) -> bool:
        """Let everything move that is on the wire now; False if nothing was."""
        lines = ((self.send, self.outgoing), (self.confirm, self.confirms), (self.ack, self.acks))
        counts = [(line, len(waiting)) for line, waiting in lines]
        for line, count in counts:
            for _ in range(count):
                line()
        return any(count for _, count in counts)

    def cut_publisher(self) -> None:
        """The publisher's connection breaks and comes back: what is not confirmed goes again."""
        self._resent([sent.body for sent in self.confirms])
        self.outgoing.extendleft(reversed(self.confirms))
        self.confirms.clear()

    def cut_consumer(self) -> None:
        """The consumer's connection breaks and comes back: what is not acked comes again."""
        self._release()
        self._member = Member(self._broker, self._loop)
        with self._broker.lock:
            self._broker.join(self._member)
        for kept in self._consumers:
            kept.start(self._member)

    def break_off(self) -> None:
        """The worker is gone, and all that was on the wire."""
        self.outgoing.clear()
        self.confirms.clear()
        self._release()
        self._member = None

    def in_hand(self) -> list[MemoryDelivery]:
        """What the broker has delivered to this worker and has no ack for."""
        return [] if self._member is None else list(self._member.unacked)

    def _release(self) -> None:
        self.acks.clear()
        if self._member is not None:
            self._lost(list(self._member.unacked))
            with self._broker.lock:
                self._member.release()

    def start_consumer(self, member: Member, kept: _Kept) -> MemoryConsumer:
        """Give a consumer its side at the broker."""
        with self._broker.lock:
            queue = self._broker.queues[kept.queue]
            consumer = MemoryConsumer(member, queue, kept.deliver, kept.prefetch)
            member.consumers.add(consumer)
        return consumer

    def forget_consumer(self, kept: _Kept) -> None:
        """A consumer was cancelled."""
        if kept in self._consumers:
            self._consumers.remove(kept)

    def is_current(self, delivery: MemoryDelivery) -> bool:
        """Whether the connection that brought a delivery still stands."""
        return delivery.consumer is not None and delivery.consumer.member is self._member


class _Kept:
    """A consumer that outlives its connection."""

    def __init__(self, wire: Wire, queue: str, on_delivery: OnDelivery, prefetch: int) -> None:
        self.queue, self.prefetch = queue, prefetch
        self._wire, self._on_delivery = wire, on_delivery
        self._consumer: MemoryConsumer | None = None

    def start(self, member: Member) -> None:
        self._consumer = self._wire.start_consumer(member, self)

    def deliver(self, delivery: Delivery) -> None:
        assert isinstance(delivery, MemoryDelivery)
        self._on_delivery(_InHand(self._wire, delivery))

    async def cancel(self) -> None:
        """Stop deliveries."""
        self._wire.forget_consumer(self)
        if self._consumer is not None:
            await self._consumer.cancel()


class _InHand:
    """A delivery whose ack goes over the wire, and only over the connection that it came by."""

    def __init__(self, wire: Wire, delivery: MemoryDelivery) -> None:
        self.body, self.queue = delivery.body, delivery.queue
        self.redelivered, self.headers = delivery.redelivered, delivery.headers
        self._wire, self._delivery = wire, delivery

    def ack(self) -> bool:
        """Put the ack onto the wire."""
        if not self._wire.is_current(self._delivery):
            return False
        self._wire.acks.append(self._delivery)
        return True
