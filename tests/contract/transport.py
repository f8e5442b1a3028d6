"""What every transport promises, as tests: subclass, supply ``make_transport``, run.

A promise that a transport does not declare in its capabilities is skipped, by capability and
never by the transport's name.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from flame_broker.errors import BrokerUnavailable, PayloadTooLarge
from flame_broker.transport import (
    Capabilities,
    Consumer,
    Delivery,
    QueueKind,
    QueueSpec,
    Transport,
    Unroutable,
)
from lab import Process

MakeTransport = Callable[[], Transport]
Open = Callable[[], Awaitable[Transport]]

_PATIENCE_S = 20.0
_HOLDER = Path(__file__).parent / "hold.py"


class Received:
    """A consumer's callback that keeps what came, and acks it unless told otherwise."""

    def __init__(self, *, ack: bool = True) -> None:
        self.deliveries: list[Delivery] = []
        self._ack = ack
        self._more = asyncio.Event()

    def __call__(self, delivery: Delivery) -> None:
        self.deliveries.append(delivery)
        if self._ack:
            assert delivery.ack()
        self._more.set()

    @property
    def bodies(self) -> list[bytes]:
        return [bytes(delivery.body) for delivery in self.deliveries]

    async def until(self, count: int, *, timeout_s: float = _PATIENCE_S) -> list[bytes]:
        async with asyncio.timeout(timeout_s):
            while len(self.deliveries) < count:
                self._more.clear()
                await self._more.wait()
        return self.bodies


async def eventually(condition: Callable[[], Awaitable[bool]], *, what: str) -> None:
    """Wait until a condition of the broker holds."""
    deadline = time.monotonic() + _PATIENCE_S
    while not await condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        await asyncio.sleep(0.02)


async def publish_all(transport: Transport, queue: str, bodies: list[bytes]) -> None:
    await asyncio.gather(*[transport.publish(queue, body) for body in bodies])


def numbered(count: int) -> list[bytes]:
    return [b"%d" % number for number in range(count)]


def require(capabilities: Capabilities, name: str) -> None:
    if not getattr(capabilities, name):
        pytest.skip(f"the transport declares no {name}")


class TransportContract:
    """The promises. A subclass overrides ``make_transport`` and ``absent_transport``."""

    in_flight = 5000
    """How many messages are published at once; fewer where the broker is slow."""

    @pytest.fixture
    def make_transport(self) -> MakeTransport:
        """Make transports, not yet open, that meet at one broker."""
        raise NotImplementedError

    @pytest.fixture
    def absent_transport(self) -> Transport:
        """A transport, not open, to an address where no broker is."""
        raise NotImplementedError

    @pytest.fixture
    def shared_url(self) -> str:
        """URL with which another process meets the transports of ``make_transport``."""
        pytest.skip("no other process can meet this transport")

    @pytest.fixture
    async def open_transport(self, make_transport: MakeTransport) -> AsyncIterator[Open]:
        opened: list[Transport] = []

        async def open_one() -> Transport:
            transport = make_transport()
            await transport.open()
            opened.append(transport)
            return transport

        yield open_one
        for transport in opened:
            await transport.close()

    @pytest.fixture
    async def transport(self, open_transport: Open) -> Transport:
        return await open_transport()

    @pytest.fixture
    async def queue(self, transport: Transport) -> AsyncIterator[str]:
        name = f"contract.{uuid4().hex}"
        await transport.declare(QueueSpec(name))
        yield name
        if transport.connected:
            await transport.delete(name)

    def test_is_a_transport(self, make_transport: MakeTransport) -> None:
        assert isinstance(make_transport(), Transport)

    async def test_connected_between_open_and_close(self, make_transport: MakeTransport) -> None:
        transport = make_transport()
        assert not transport.connected
        await transport.open()
        assert transport.connected
        assert transport.server
        await transport.close()
        await transport.close()
        assert not transport.connected

    async def test_messages_arrive_in_order_and_leave_when_acked(
        self, transport: Transport, queue: str
    ) -> None:
        received = Received()
        await transport.consume(queue, received, prefetch=10)
        for body in numbered(30):
            await transport.publish(queue, body)
        assert await received.until(30) == numbered(30)
        assert {delivery.queue for delivery in received.deliveries} == {queue}
        assert not any(delivery.redelivered for delivery in received.deliveries)

    async def test_acked_messages_never_come_back(
        self, open_transport: Open, transport: Transport, queue: str
    ) -> None:
        other = await open_transport()
        received = Received()
        await other.consume(queue, received, prefetch=10)
        await publish_all(transport, queue, numbered(10))
        await received.until(10)
        await other.close()
        late = Received()
        await transport.consume(queue, late, prefetch=10)
        await transport.publish(queue, b"last")
        assert await late.until(1) == [b"last"]

    async def test_waiting_messages_are_delivered_to_a_late_consumer(
        self, transport: Transport, queue: str
    ) -> None:
        await publish_all(transport, queue, numbered(10))
        received = Received()
        await transport.consume(queue, received, prefetch=3)
        assert sorted(await received.until(10)) == sorted(numbered(10))

    async def test_competing_consumers_share_without_duplicates(
        self, open_transport: Open, transport: Transport, queue: str
    ) -> None:
        left, right = Received(), Received()
        await (await open_transport()).consume(queue, left, prefetch=1)
        await (await open_transport()).consume(queue, right, prefetch=1)
        await publish_all(transport, queue, numbered(60))

        async def all_arrived() -> bool:
            return len(left.deliveries) + len(right.deliveries) >= 60

        await eventually(all_arrived, what="60 messages at two consumers")
        assert sorted(left.bodies + right.bodies) == sorted(numbered(60))
        assert left.bodies
        assert right.bodies

    async def test_no_more_than_prefetch_is_in_hand(self, transport: Transport, queue: str) -> None:
        received = Received(ack=False)
        await transport.consume(queue, received, prefetch=2)
        await publish_all(transport, queue, numbered(5))
        await received.until(2)
        await eventually(lambda: _depth_is(transport, queue, 3), what="three messages waiting")
        assert len(received.deliveries) == 2
        assert received.deliveries[0].ack()
        await received.until(3)
        await eventually(lambda: _depth_is(transport, queue, 2), what="two messages waiting")
        assert len(received.deliveries) == 3

    async def test_each_consumer_has_a_credit_of_its_own(
        self, transport: Transport, queue: str
    ) -> None:
        other_queue = f"{queue}.other"
        await transport.declare(QueueSpec(other_queue))
        stuck, free = Received(ack=False), Received()
        await transport.consume(queue, stuck, prefetch=1)
        await transport.consume(other_queue, free, prefetch=1)
        await publish_all(transport, queue, numbered(3))
        await publish_all(transport, other_queue, numbered(10))
        await free.until(10)
        assert len(stuck.deliveries) <= 1
        await transport.delete(other_queue)

    async def test_cancel_stops_deliveries_and_keeps_what_is_in_hand(
        self, open_transport: Open, transport: Transport, queue: str
    ) -> None:
        received = Received(ack=False)
        consumer = await transport.consume(queue, received, prefetch=2)
        await publish_all(transport, queue, numbered(4))
        await received.until(2)
        await consumer.cancel()
        others = Received()
        await (await open_transport()).consume(queue, others, prefetch=10)
        assert set(await others.until(2)) == set(numbered(4)) - set(received.bodies)
        assert not any(delivery.redelivered for delivery in others.deliveries)
        assert all(delivery.ack() for delivery in received.deliveries)
        assert len(received.deliveries) == 2

    async def test_consuming_again_after_cancel_goes_on(
        self, transport: Transport, queue: str
    ) -> None:
        total = Received()
        for turn in range(3):
            consumer: Consumer = await transport.consume(queue, total, prefetch=1)
            await transport.publish(queue, b"%d" % turn)
            await total.until(turn + 1)
            await consumer.cancel()
        assert total.bodies == numbered(3)

    async def test_unacked_come_again_marked_when_their_transport_closes(
        self, open_transport: Open, transport: Transport, queue: str
    ) -> None:
        require(transport.capabilities, "redelivery")
        holder = await open_transport()
        held = Received(ack=False)
        await holder.consume(queue, held, prefetch=3)
        await publish_all(transport, queue, numbered(3))
        await held.until(3)
        assert held.deliveries[0].ack()
        acked = held.bodies[0]
        await eventually(lambda: _depth_is(transport, queue, 0), what="all delivered")
        await holder.close()
        again = Received()
        await transport.consume(queue, again, prefetch=3)
        assert sorted(await again.until(2)) == sorted(set(numbered(3)) - {acked})
        assert all(delivery.redelivered for delivery in again.deliveries)
        assert not held.deliveries[1].ack()

    async def test_what_was_in_hand_at_close_goes_back_to_where_it_was(
        self, open_transport: Open, transport: Transport, queue: str
    ) -> None:
        require(transport.capabilities, "returns_in_order")
        for body in numbered(150):
            await transport.publish(queue, body)
        for _ in range(2):
            holder = await open_transport()
            held = Received(ack=False)
            await holder.consume(queue, held, prefetch=100)
            assert await held.until(100) == numbered(100)
            await holder.close()
            await eventually(lambda: _depth_is(transport, queue, 150), what="all are back")
        again = Received()
        await transport.consume(queue, again, prefetch=200)
        assert await again.until(150) == numbered(150)

    async def test_unacked_of_a_cancelled_consumer_come_again_after_close(
        self, open_transport: Open, transport: Transport, queue: str
    ) -> None:
        require(transport.capabilities, "redelivery")
        holder = await open_transport()
        held = Received(ack=False)
        consumer = await holder.consume(queue, held, prefetch=1)
        await transport.publish(queue, b"mine")
        await held.until(1)
        await consumer.cancel()
        await holder.close()
        again = Received()
        await transport.consume(queue, again, prefetch=1)
        assert await again.until(1) == [b"mine"]
        assert again.deliveries[0].redelivered

    async def test_what_a_killed_process_held_comes_again_marked(
        self, shared_url: str, transport: Transport, queue: str
    ) -> None:
        require(transport.capabilities, "redelivery")
        await transport.publish(queue, b"orphan")
        with Process([sys.executable, _HOLDER, shared_url, queue]) as holder:

            async def holding() -> bool:
                assert holder.running, holder.output()
                return "holding orphan" in holder.output()

            await eventually(holding, what="the other process has it")
            holder.kill()
        received = Received()
        await transport.consume(queue, received, prefetch=1)
        assert await received.until(1) == [b"orphan"]
        assert received.deliveries[0].redelivered

    async def test_ack_counts_once(self, transport: Transport, queue: str) -> None:
        received = Received(ack=False)
        await transport.consume(queue, received, prefetch=1)
        await publish_all(transport, queue, numbered(2))
        await received.until(1)
        assert received.deliveries[0].ack()
        assert not received.deliveries[0].ack()
        await received.until(2)

    async def test_mandatory_without_a_queue_is_unroutable(self, transport: Transport) -> None:
        with pytest.raises(Unroutable):
            await transport.publish(f"nobody.{uuid4().hex}", b"lost")

    async def test_without_mandatory_nobody_complains(self, transport: Transport) -> None:
        await transport.publish(f"nobody.{uuid4().hex}", b"lost", mandatory=False)

    async def test_depth_counts_what_waits(self, transport: Transport, queue: str) -> None:
        assert await transport.depth(queue) == 0
        await publish_all(transport, queue, numbered(3))
        await eventually(lambda: _depth_is(transport, queue, 3), what="three messages waiting")
        assert await transport.depth(f"nobody.{uuid4().hex}") is None

    async def test_delete_takes_the_queue_and_its_messages(
        self, transport: Transport, queue: str
    ) -> None:
        await transport.publish(queue, b"doomed")
        await transport.delete(queue)
        assert await transport.depth(queue) is None
        with pytest.raises(Unroutable):
            await transport.publish(queue, b"late")
        await transport.delete(queue)

    async def test_declaring_twice_keeps_the_messages(
        self, transport: Transport, queue: str
    ) -> None:
        await transport.publish(queue, b"kept")
        await transport.declare(QueueSpec(queue))
        received = Received()
        await transport.consume(queue, received, prefetch=1)
        assert await received.until(1) == [b"kept"]

    async def test_a_queue_declared_by_one_serves_another(
        self, open_transport: Open, transport: Transport, queue: str
    ) -> None:
        await (await open_transport()).publish(queue, b"hello")
        received = Received()
        await transport.consume(queue, received, prefetch=1)
        assert await received.until(1) == [b"hello"]

    async def test_any_bytes_survive(self, transport: Transport, queue: str) -> None:
        bodies = [b"", bytes(range(256)), b"\xff\xfe\x00", hashlib.sha256(b"x").digest() * 1000]
        received = Received()
        await transport.consume(queue, received, prefetch=1)
        for body in bodies:
            await transport.publish(queue, body)
        assert await received.until(len(bodies)) == bodies

    async def test_headers_survive(self, transport: Transport, queue: str) -> None:
        received = Received()
        await transport.consume(queue, received, prefetch=1)
        await transport.publish(queue, b"x", headers={"x-flame-reason": "grün", "x-count": 3})
        await transport.publish(queue, b"y")
        await received.until(2)
        first, second = received.deliveries
        assert first.headers["x-flame-reason"] == "grün"
        assert first.headers["x-count"] == 3
        assert "x-count" not in second.headers

    async def test_a_body_over_the_limit_is_refused_before_it_is_sent(
        self, transport: Transport, queue: str
    ) -> None:
        limit = transport.capabilities.max_message_bytes
        with pytest.raises(PayloadTooLarge, match=str(limit)):
            await transport.publish(queue, bytes(limit + 1))
        await transport.publish(queue, b"still works")

    async def test_the_largest_body_passes_with_the_longest_reason(
        self, transport: Transport, queue: str
    ) -> None:
        body = bytes(min(transport.capabilities.max_message_bytes, 8 * 1024 * 1024))
        received = Received()
        await transport.consume(queue, received, prefetch=1)
        await transport.publish(queue, body, headers={"x-flame-reason": "\N{SNOWMAN}" * 1000})
        assert await received.until(1) == [body]

    async def test_without_a_broker_open_fails_within_its_deadline(
        self, absent_transport: Transport
    ) -> None:
        started = time.monotonic()
        with pytest.raises(BrokerUnavailable):
            await absent_transport.open(deadline_s=0.5)
        assert time.monotonic() - started < 5
        await absent_transport.close()

    async def test_a_closed_transport_says_so(self, make_transport: MakeTransport) -> None:
        transport = make_transport()
        await transport.open()
        await transport.close()
        with pytest.raises(BrokerUnavailable):
            await transport.publish("anywhere", b"x", deadline_s=0.5)

    async def test_thousands_in_flight_are_confirmed_and_delivered_once(
        self, open_transport: Open, transport: Transport, queue: str
    ) -> None:
        require(transport.capabilities, "confirms")
        count = self.in_flight
        received = Received()
        await (await open_transport()).consume(queue, received, prefetch=200)
        futures = [transport.publish(queue, body, deadline_s=120) for body in numbered(count)]
        await asyncio.gather(*futures)
        bodies = await received.until(count, timeout_s=120)
        assert sorted(bodies) == sorted(numbered(count))
        await eventually(lambda: _depth_is(transport, queue, 0), what="an empty queue")

    async def test_fanout_reaches_every_bound_queue(
        self, open_transport: Open, transport: Transport
    ) -> None:
        require(transport.capabilities, "fanout")
        exchange = f"contract.fanout.{uuid4().hex}"
        ears = [await open_transport() for _ in range(2)]
        heard = [Received() for _ in ears]
        for number, (ear, received) in enumerate(zip(ears, heard, strict=True)):
            await _listen(ear, exchange, "fanout", f"{exchange}.{number}", "", received)
        await transport.declare_exchange(exchange, "fanout")
        await transport.publish("", b"to all", exchange=exchange)
        for received in heard:
            assert await received.until(1) == [b"to all"]

    async def test_topic_reaches_whoever_asked_for_it(
        self, open_transport: Open, transport: Transport
    ) -> None:
        require(transport.capabilities, "fanout")
        exchange = f"contract.topic.{uuid4().hex}"
        ada, all_logs = Received(), Received()
        ear = await open_transport()
        await _listen(ear, exchange, "topic", f"{exchange}.ada", "ada.*", ada)
        await _listen(ear, exchange, "topic", f"{exchange}.all", "#", all_logs)
        await transport.declare_exchange(exchange, "topic")
        await transport.publish("bob.log", b"1", exchange=exchange)
        await transport.publish("ada.log", b"2", exchange=exchange)
        assert await ada.until(1) == [b"2"]
        assert await all_logs.until(2) == [b"1", b"2"]

    async def test_direct_goes_by_the_exact_key(self, transport: Transport) -> None:
        require(transport.capabilities, "fanout")
        exchange = f"contract.direct.{uuid4().hex}"
        received = Received()
        await _listen(transport, exchange, "direct", f"{exchange}.q", "right", received)
        await transport.publish("wrong", b"1", exchange=exchange, mandatory=False)
        await transport.publish("right", b"2", exchange=exchange)
        assert await received.until(1) == [b"2"]
        with pytest.raises(Unroutable):
            await transport.publish("wrong", b"3", exchange=exchange)

    async def test_an_exclusive_queue_is_gone_with_its_transport(
        self, open_transport: Open, transport: Transport
    ) -> None:
        require(transport.capabilities, "fanout")
        owner = await open_transport()
        name = f"contract.exclusive.{uuid4().hex}"
        await owner.declare(QueueSpec(name, QueueKind.CLASSIC, exclusive=True))
        await owner.publish(name, b"mine")
        await owner.close()

        async def gone() -> bool:
            return await transport.depth(name) is None

        await eventually(gone, what="the exclusive queue is gone")

    async def test_a_stream_is_read_from_its_start_by_everyone(
        self, open_transport: Open, transport: Transport
    ) -> None:
        require(transport.capabilities, "streams")
        spec = QueueSpec(f"contract.stream.{uuid4().hex}", QueueKind.STREAM)
        await transport.declare(spec)
        await transport.publish(spec.name, b"before")
        readers = [Received(), Received()]
        for received in readers:
            reader = await open_transport()
            await reader.declare(spec)
            await reader.consume(spec.name, received, prefetch=10)
        await transport.publish(spec.name, b"after")
        for received in readers:
            assert await received.until(2) == [b"before", b"after"]
        await transport.delete(spec.name)

    async def test_a_full_telemetry_queue_drops_the_oldest(
        self, transport: Transport, queue: str
    ) -> None:
        require(transport.capabilities, "fanout")
        arguments = {"x-max-length": 3, "x-overflow": "drop-head"}
        spec = replace(QueueSpec(f"{queue}.logs", QueueKind.CLASSIC), arguments=arguments)
        await transport.declare(spec)
        for body in numbered(10):
            await transport.publish(spec.name, body)
        received = Received()
        await transport.consume(spec.name, received, prefetch=10)
        assert await received.until(3) == numbered(10)[-3:]
        await transport.delete(spec.name)


async def _depth_is(transport: Transport, queue: str, expected: int) -> bool:
    return await transport.depth(queue) == expected


async def _listen(
    ear: Transport, exchange: str, kind: str, queue: str, key: str, received: Received
) -> None:
    await ear.declare_exchange(exchange, kind)
    spec = QueueSpec(queue, QueueKind.CLASSIC, exclusive=True, bindings=((exchange, key),))
    await ear.declare(spec)
    await ear.consume(queue, received, prefetch=10)
