"""The transport for brokers that kombu speaks to.

kombu blocks, so it lives in threads: one for all that is sent and one for each consumer, every one
with a connection of its own. What is in hand is held by renewing its visibility time, so a call
that runs for hours stays ours, and what a dead process held comes again about a minute later.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from flame_broker.errors import BrokerUnavailable, ConfigError, PayloadTooLarge
from flame_broker.portable.courier import Courier
from flame_broker.portable.link import Dialect, Letter, Link, Parcel
from flame_broker.portable.listener import Listener
from flame_broker.transport import (
    DEFAULT_DEADLINE_S,
    Capabilities,
    Consumer,
    OnDelivery,
    QueueSpec,
)

__all__ = ["PortableTransport"]

_Result = TypeVar("_Result")
_LOOK_EVERY_S = 0.01
_CLOSE_S = 3.0  # for giving back what is in hand, when the broker may be away


class PortableDelivery:
    """One message in hand."""

    __slots__ = ("_consumer", "parcel")

    def __init__(self, consumer: PortableConsumer, parcel: Parcel) -> None:
        self._consumer, self.parcel = consumer, parcel

    @property
    def body(self) -> bytes:
        """The message."""
        return self.parcel.body

    @property
    def queue(self) -> str:
        """Where it came from."""
        return self.parcel.queue

    @property
    def redelivered(self) -> bool:
        """Whether somebody had it in hand before and did not ack it."""
        return self.parcel.redelivered

    @property
    def headers(self) -> Mapping[str, object]:
        """Its headers."""
        return self.parcel.headers

    def ack(self) -> bool:
        """Take it off the queue; False if that was done before, or the transport is closed."""
        return self._consumer.settle(self)


class PortableConsumer:
    """A consumer and its listener."""

    def __init__(
        self, transport: PortableTransport, queue: str, call: OnDelivery, prefetch: int
    ) -> None:
        self._transport, self._call = transport, call
        self._active = True
        self.listener = Listener(
            transport.dialect,
            queue,
            credit=prefetch or sys.maxsize,
            hand_over=self._hand_over,
            put_back=_put_back,
        )

    async def cancel(self) -> None:
        """Stop deliveries; what the broker still sends goes back to the queue unseen."""
        self._active = False
        self.listener.stop()

    def settle(self, delivery: PortableDelivery) -> bool:
        """Ack a delivery and win its credit back."""
        if not self._transport.release(delivery):
            return False
        self.listener.grant()
        return True

    def _hand_over(self, parcel: Parcel) -> None:
        if self._active:
            delivery = PortableDelivery(self, parcel)
            self._transport.in_hand[delivery] = None
            self._call(delivery)
        else:
            self._transport.send_back(parcel)


class PortableTransport:
    """A transport to a Redis or SQS broker.

    Args:
        url: ``redis://…``, ``rediss://…`` or ``sqs://…``.
        name: Shown in thread names.

    Raises:
        ConfigError: The URL makes no sense, or kombu is not installed for its scheme.
    """

    def __init__(self, url: str, *, name: str = "flame") -> None:
        self.on_reconnect: Callable[[], None] | None = None
        self.dialect = _dialect(url)
        self.in_hand: dict[PortableDelivery, None] = {}
        self._name = name
        self._courier: Courier | None = None
        self._consumers: list[PortableConsumer] = []
        self._exclusive: set[str] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._closing = False

    @property
    def capabilities(self) -> Capabilities:
        """What the broker guarantees."""
        return self.dialect.capabilities

    @property
    def connected(self) -> bool:
        """Whether the sending connection is up."""
        return self._courier is not None and self._courier.connected

    @property
    def server(self) -> str:
        """What the broker is, without a version: kombu does not ask for it."""
        return self.dialect.product

    async def open(self, *, deadline_s: float = 10.0) -> None:
        """Connect; ``BrokerUnavailable`` if that takes longer than the deadline."""
        if self._courier is not None:
            return
        self._courier = Courier(self.dialect, self._name, self._reconnected)
        try:
            await self._courier.order(lambda _: None, deadline_s=deadline_s)
        except BrokerUnavailable:
            await self.close()
            raise
        self._upkeep()

    async def close(self) -> None:
        """Give back what is in hand, delete exclusive queues, disconnect. Safe to call twice."""
        if self._courier is None or self._closing:
            return
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
        await self._end_consumers()
        courier, self._courier = self._courier, None
        if self.in_hand or self._exclusive:
            await self._hand_back(courier)
        courier.stop()
        await _ended([courier])
        self._closing = False

    async def _end_consumers(self) -> None:
        consumers, self._consumers = self._consumers, []
        for consumer in consumers:
            await consumer.cancel()
        await _ended([consumer.listener for consumer in consumers])

    async def _hand_back(self, courier: Courier) -> None:
        receipts = [delivery.parcel.receipt for delivery in self.in_hand]
        self.in_hand.clear()
        # First give back, then delete: what goes back into a deleted queue would stay for ever.
        orders = [courier.order(lambda link: link.give_back(receipts), deadline_s=_CLOSE_S)]
        orders += [
            courier.order(partial(courier.delete, queue), deadline_s=_CLOSE_S)
            for queue in self._exclusive
        ]
        # With the broker away nothing can be handed back: it does so itself after a while.
        await asyncio.gather(*orders, return_exceptions=True)

    async def declare(self, *queues: QueueSpec) -> None:
        """Declare queues and bindings."""
        for spec in queues:
            await self._order(partial(self._opened().declare, spec))
            if spec.exclusive:
                self._exclusive.add(spec.name)

    async def declare_exchange(self, name: str, kind: str) -> None:
        """Declare an exchange (``fanout``, ``topic``, ``direct``)."""
        await self._order(partial(self._opened().declare_exchange, name, kind))

    async def delete(self, queue: str) -> None:
        """Delete a queue; one that is not there is fine."""
        self._exclusive.discard(queue)
        await self._order(partial(self._opened().delete, queue))

    async def depth(self, queue: str) -> int | None:
        """Messages ready in the queue, or None if it does not exist."""
        return await self._order(lambda link: link.depth(queue))

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
        """Send; the future is done when the broker has stored the message."""
        limit = self.capabilities.max_message_bytes
        if self._courier is None:
            return _failed(self._closed())
        if len(body) > limit:
            message = f"a message of {len(body)} bytes is over this broker's limit of {limit}"
            return _failed(PayloadTooLarge(message))
        letter = Letter(exchange, routing_key, body, headers or {}, mandatory)
        return self._courier.order(lambda link: link.publish(letter), deadline_s=deadline_s)

    async def consume(self, queue: str, on_delivery: OnDelivery, *, prefetch: int) -> Consumer:
        """Start a consumer with a thread of its own."""
        self._opened()
        self._consumers = [one for one in self._consumers if one.listener.alive]
        consumer = PortableConsumer(self, queue, on_delivery, prefetch)
        self._consumers.append(consumer)
        return consumer

    def release(self, delivery: PortableDelivery) -> bool:
        """Ack a delivery that is in hand; False if it is not."""
        if self._courier is None or delivery not in self.in_hand:
            return False
        del self.in_hand[delivery]
        receipt = delivery.parcel.receipt
        _forget(self._courier.order(lambda link: link.ack(receipt), deadline_s=DEFAULT_DEADLINE_S))
        return True

    def send_back(self, parcel: Parcel) -> None:
        """Return a message that nobody has seen."""
        if self._courier is not None:
            order = self._courier.order(
                lambda link: _put_back(link, parcel), deadline_s=DEFAULT_DEADLINE_S
            )
            _forget(order)

    def _upkeep(self) -> None:
        """Renew what is in hand, three times in each visibility time."""
        if self._courier is None:
            return
        interval_s = self.dialect.visibility_s / 3
        receipts = [delivery.parcel.receipt for delivery in self.in_hand]
        _forget(self._courier.order(lambda link: link.hold(receipts), deadline_s=interval_s))
        _forget(self._courier.order(self._courier.refresh, deadline_s=interval_s))
        self._timer = asyncio.get_running_loop().call_later(interval_s, self._upkeep)

    def _reconnected(self) -> None:
        if self._courier is not None and self.on_reconnect is not None:
            self.on_reconnect()

    async def _order(self, work: Callable[[Link], _Result]) -> _Result:
        return await self._opened().order(work, deadline_s=DEFAULT_DEADLINE_S)

    def _opened(self) -> Courier:
        if self._courier is None:
            raise self._closed()
        return self._courier

    def _closed(self) -> BrokerUnavailable:
        return BrokerUnavailable(f"the transport to {self.dialect} is not open")


def _dialect(url: str) -> Dialect:
    try:
        if url.startswith("sqs:"):
            from flame_broker.portable.sqs import SqsDialect

            return SqsDialect(url)
        from flame_broker.portable.redis import RedisDialect

        return RedisDialect(url)
    except ImportError as exc:
        raise ConfigError(
            f"this broker needs more packages: install flame[portable] ({exc})"
        ) from exc


def _put_back(link: Link, parcel: Parcel) -> None:
    """Return a message unseen: as a new one, which is not suspected of having killed anyone."""
    if not parcel.receipt.tag:
        return
    if parcel.redelivered:
        link.give_back([parcel.receipt])
        return
    headers = {
        name: value for name, value in parcel.headers.items() if isinstance(value, str | int)
    }
    link.publish(Letter("", parcel.queue, parcel.body, headers, mandatory=False))
    link.ack(parcel.receipt)


async def _ended(threads: Sequence[Courier | Listener]) -> None:
    """Wait for the end of threads that were stopped.

    Not in a thread pool: a client that is closed at the end of its program finds none any more.
    """
    while any(thread.alive for thread in threads):  # noqa: ASYNC110  # threads set no event
        await asyncio.sleep(_LOOK_EVERY_S)


def _failed(error: Exception) -> asyncio.Future[None]:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    future.set_exception(error)
    return future


def _forget(future: asyncio.Future[None]) -> None:
    """Ask for the outcome, so that asyncio does not complain that nobody did."""
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
