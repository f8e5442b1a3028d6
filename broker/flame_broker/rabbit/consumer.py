"""Messages on their way in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from itertools import count
from types import MappingProxyType
from typing import Any, Final

from flame_broker.backoff import Backoff
from flame_broker.errors import BrokerUnavailable, FlameError
from flame_broker.logs import get_logger
from flame_broker.rabbit.channel import ChannelGone, ChannelRefused, RabbitChannel
from flame_broker.rabbit.connection import Connection
from flame_broker.rabbit.topology import Topology, refusal
from flame_broker.transport import OnDelivery, QueueKind

__all__ = ["Consumers", "RabbitConsumer", "RabbitDelivery"]

_NO_HEADERS: Final[Mapping[str, object]] = MappingProxyType({})
_STREAM_OFFSET: Final = "x-stream-offset"
_PROBE_S: Final = 30.0
_PRECONDITION_FAILED: Final = 406
_TOO_EARLY: Final = "does not have a running replica"
_tags = count(1)

_log = get_logger("flame.broker")


class RabbitDelivery:
    """One message in hand; see ``Delivery``."""

    __slots__ = ("_lane", "_properties", "_tag", "body", "queue", "redelivered")

    def __init__(
        self, lane: _Lane, tag: int, queue: str, redelivered: bool, properties: Any, body: bytes
    ) -> None:
        self._lane: _Lane | None = lane
        self._tag = tag
        self._properties = properties
        self.queue = queue
        self.redelivered = redelivered
        self.body = body

    @property
    def headers(self) -> Mapping[str, object]:
        """What the publisher attached."""
        return self._properties.headers or _NO_HEADERS

    def ack(self) -> bool:
        """Take the message off the queue; False if its channel is gone or it was acked before."""
        lane, self._lane = self._lane, None
        return lane is not None and lane.settle(self._tag)


class _Lane:
    """A channel that serves one consumer at a time, and outlives it until its last ack.

    One channel each: the broker closes a channel for one late ack or one missing queue, and takes
    back all that the channel brought. The lane is the delivery epoch too: an ack for a lane whose
    channel is closed goes nowhere.
    """

    def __init__(self, consumers: Consumers, channel: RabbitChannel) -> None:
        self.channel = channel
        self.consumer: RabbitConsumer | None = None
        self.prefetch = 0
        self.tag = ""
        self._consumers = consumers
        self.unacked = 0
        channel.raw.add_on_cancel_callback(self._on_broker_cancel)
        channel.on_refused = self._on_refused

    @property
    def is_idle(self) -> bool:
        return self.consumer is None and not self.unacked

    async def start(self, consumer: RabbitConsumer) -> None:
        self.consumer = consumer
        self.tag = f"{next(_tags)}"
        raw = self.channel.raw
        if self.prefetch != consumer.prefetch:
            # Per-consumer credit; the global flag would be refused by quorum queues.
            await self.channel.call(raw.basic_qos, prefetch_count=consumer.prefetch)
            self.prefetch = consumer.prefetch
        await self.channel.call(
            raw.basic_consume,
            consumer.queue,
            self._on_message,
            consumer_tag=self.tag,
            arguments=consumer.arguments(),
        )

    async def stop(self) -> None:
        """Cancel the consumer; what the broker sent before it knew is delivered first.

        A quorum queue returns what the cancel overtakes between it and the channel, and counts that
        as a redelivery (github.com/rabbitmq/rabbitmq-server/pull/3746). A consumer whose credit is
        used up has nothing there.
        """
        if self.channel.is_open:
            await self.channel.call(self.channel.raw.basic_cancel, self.tag)
        self.consumer = None

    def abandon(self) -> None:
        """Close the channel without waiting; what it brought goes back to the queue."""
        self.consumer = None
        if self.channel.is_open:
            self.channel.raw.close()

    def settle(self, tag: int) -> bool:
        raw = self.channel.raw
        if not raw.is_open:
            return False
        raw.basic_ack(tag)
        self.unacked -= 1
        if self.is_idle:
            self._consumers.release(self)
        return True

    def _on_message(self, _channel: object, method: Any, properties: Any, body: bytes) -> None:
        consumer = self.consumer
        if consumer is None:
            return  # abandoned: it goes back with the channel
        self.unacked += 1
        tag, again = method.delivery_tag, method.redelivered
        consumer.receive(RabbitDelivery(self, tag, consumer.queue, again, properties, body))

    def _on_broker_cancel(self, frame: Any) -> None:
        consumer = self.consumer
        if consumer is not None and frame.method.consumer_tag == self.tag:
            self.consumer = None
            if self.is_idle:
                self._consumers.release(self)
            self._consumers.revive(consumer, "cancelled by the broker")
            self._consumers.on_cancelled()

    def _on_refused(self, error: ChannelRefused) -> None:
        consumer, self.consumer = self.consumer, None
        if consumer is not None:
            self._consumers.revive(consumer, str(error))


class RabbitConsumer:
    """A running consumer; see ``Consumer``."""

    def __init__(
        self, consumers: Consumers, queue: str, on_delivery: OnDelivery, prefetch: int
    ) -> None:
        self.queue = queue
        self.prefetch = prefetch
        self.lane: _Lane | None = None
        self.turn = asyncio.Lock()
        self.cancelled = False
        self.received = 0
        self.received_at_probe = -1
        self._consumers = consumers
        self._on_delivery = on_delivery
        self._is_stream = False
        self._next_offset: int | None = None

    @property
    def is_attached(self) -> bool:
        """Whether a channel serves it."""
        lane = self.lane
        return lane is not None and lane.consumer is self and lane.channel.is_open

    def read_as_stream(self) -> None:
        """Read from the first message on; after a reconnect, from where it was."""
        self._is_stream = True

    def stands_still(self) -> bool:
        """Whether nothing came since the last question, though there was credit."""
        still = self.received == self.received_at_probe and not self._is_stream
        self.received_at_probe = self.received
        return still and self.is_attached and self.lane is not None and not self.lane.unacked

    def arguments(self) -> Mapping[str, str | int]:
        """Return the arguments of Basic.Consume."""
        if not self._is_stream:
            return {}
        return {_STREAM_OFFSET: "first" if self._next_offset is None else self._next_offset}

    def receive(self, delivery: RabbitDelivery) -> None:
        """Hand a message to the callback."""
        self.received += 1
        if self._is_stream:
            self._next_offset = int(str(delivery.headers[_STREAM_OFFSET])) + 1
        try:
            self._on_delivery(delivery)
        except Exception as exc:  # noqa: BLE001 - the caller's bug; it must not tear the connection
            asyncio.get_running_loop().call_exception_handler(
                {"message": f"consumer of {self.queue!r} failed", "exception": exc}
            )

    async def cancel(self) -> None:
        """Stop deliveries; unacked ones stay ours."""
        await self._consumers.cancel(self)


class Consumers:
    """The consuming half of a transport: every consumer, on whichever connection there is.

    Args:
        up: Set while there is a connection.
        topology: Declares the queue of a consumer again.
        on_cancelled: Called when the broker has ended a consumer: its queue is gone, or down with
            its node, while our connection to another node stands.
    """

    def __init__(
        self, up: asyncio.Event, topology: Topology, on_cancelled: Callable[[], None]
    ) -> None:
        self.on_cancelled = on_cancelled
        self._up = up
        self._topology = topology
        self._connection: Connection | None = None
        self._running: set[RabbitConsumer] = set()
        self._idle: list[_Lane] = []
        self._revivals: dict[RabbitConsumer, asyncio.Task[None]] = {}

    async def consume(
        self, queue: str, on_delivery: OnDelivery, prefetch: int, deadline_s: float
    ) -> RabbitConsumer:
        """Start a consumer; see ``Transport.consume``."""
        consumer = RabbitConsumer(self, queue, on_delivery, prefetch)
        if self._topology.kind_of(queue) is QueueKind.STREAM:
            consumer.read_as_stream()
        self._running.add(consumer)
        try:
            async with asyncio.timeout(deadline_s):
                await self._start_first(consumer)
        except BaseException as exc:
            consumer.cancelled = True
            self._running.discard(consumer)
            if isinstance(exc, TimeoutError):
                raise BrokerUnavailable(f"cannot consume within {deadline_s:g} s") from exc
            if isinstance(exc, ChannelRefused):
                raise refusal(exc) from exc
            raise
        return consumer

    async def cancel(self, consumer: RabbitConsumer) -> None:
        """Stop a consumer; see ``Consumer.cancel``."""
        async with consumer.turn:
            consumer.cancelled = True
            self._running.discard(consumer)
            lane, consumer.lane = consumer.lane, None
            if lane is None or lane.consumer is not consumer:
                return
            try:
                await lane.stop()
            except (ChannelGone, ChannelRefused):
                return  # then nothing is delivered either
            if lane.is_idle:
                self.release(lane)

    async def restore(self, connection: Connection) -> None:
        """Start every consumer on a new connection.

        Raises:
            ChannelGone: The connection was lost meanwhile.
        """
        self._connection = connection
        self._idle.clear()
        for consumer in tuple(self._running):
            try:
                await self._start(consumer)
            except ChannelRefused as exc:
                self.revive(consumer, str(exc))

    def release(self, lane: _Lane) -> None:
        """Take a lane back that has no consumer and nothing unacked."""
        if lane.channel.is_open:
            self._idle.append(lane)

    def revive(self, consumer: RabbitConsumer, reason: str) -> None:
        """Start a consumer again whose connection still stands.

        Each attempt that is refused comes here again: one revival goes on, or they would double.
        """
        under_way = self._revivals.get(consumer)
        if consumer in self._running and (under_way is None or under_way.done()):
            _log.warning("consumer_lost", queue=consumer.queue, reason=reason)
            task = asyncio.get_running_loop().create_task(self._revive(consumer))
            self._revivals[consumer] = task
            task.add_done_callback(lambda ended: self._revived(consumer, ended))

    async def close(self) -> None:
        """Forget all consumers; their channels go with the connection."""
        self._running.clear()
        revivals = [*self._revivals.values()]
        for task in revivals:
            task.cancel()
        if revivals:
            await asyncio.wait(revivals)

    async def watch(self) -> None:
        """Restart, for ever, consumers that get nothing although their queue has messages.

        Connected but not served: seen when a queue's leader moved and the cancel got lost.
        """
        while True:
            await asyncio.sleep(_PROBE_S)
            for consumer in tuple(self._running):
                if consumer.stands_still() and await self._has_messages(consumer.queue):
                    lane = consumer.lane
                    if lane is not None and not lane.unacked:
                        lane.abandon()
                        self.revive(consumer, "messages wait, none are delivered")

    async def _has_messages(self, queue: str) -> bool:
        try:
            return bool(await self._topology.depth(queue, _PROBE_S))
        except FlameError:
            return False  # a broker in trouble is somebody else's concern

    async def _start_first(self, consumer: RabbitConsumer) -> None:
        backoff = Backoff()
        while True:
            await self._up.wait()
            try:
                return await self._start(consumer)
            except ChannelGone:
                await asyncio.sleep(0)
            except ChannelRefused as exc:
                if not _is_too_early(exc):
                    raise
                await asyncio.sleep(backoff.next_s())

    async def _start(self, consumer: RabbitConsumer) -> None:
        async with consumer.turn:
            if consumer.cancelled or consumer.is_attached:
                return
            if self._connection is None:
                raise ChannelGone("no connection")
            lane = self._idle.pop() if self._idle else None
            if lane is None or not lane.channel.is_open:
                lane = _Lane(self, await RabbitChannel.open(self._connection))
            try:
                await lane.start(consumer)
            except asyncio.CancelledError:
                lane.abandon()
                raise
            consumer.lane = lane

    def _revived(self, consumer: RabbitConsumer, ended: asyncio.Task[None]) -> None:
        if self._revivals.get(consumer) is ended:
            del self._revivals[consumer]

    async def _revive(self, consumer: RabbitConsumer) -> None:
        backoff = Backoff(cap_s=30.0)
        while consumer in self._running and not consumer.is_attached:
            await asyncio.sleep(backoff.next_s())
            await self._up.wait()
            try:
                await self._topology.redeclare(consumer.queue)
                await self._start(consumer)
            except (ChannelGone, ChannelRefused) as exc:
                _log.warning("consumer_lost", queue=consumer.queue, reason=str(exc))


def _is_too_early(refused: ChannelRefused) -> bool:
    """Whether a stream is there and nobody serves it yet.

    Seen on 4.0: of two who declare the same stream, the second hears that it is there while the
    broker still starts it for the first.
    """
    return refused.code == _PRECONDITION_FAILED and _TOO_EARLY in str(refused)
