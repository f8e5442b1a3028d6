"""The RabbitMQ transport when connections, hosts and brokers fail."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from flame_broker.errors import BrokerUnavailable
from flame_broker.rabbit import RabbitTransport
from flame_broker.rabbit.address import RabbitAddress
from flame_broker.rabbit.connection import Connection
from flame_broker.rabbit.link import Link
from flame_broker.transport import Delivery, QueueKind, QueueSpec
from lab import RabbitNode, TcpProxy
from lab.inbox import Inbox, numbered
from lab.rabbit_client import count_reconnects, drop_connection, make, through
from lab.wait import eventually

Open = Callable[[str], Awaitable[RabbitTransport]]

QUEUE = "work"


class TestLosses:
    @pytest.mark.parametrize("role", ["publisher", "consumer"])
    async def test_one_lost_connection_comes_back_with_all_it_had(
        self, opened: Open, rabbit: RabbitNode, rabbit_vhost: str, role: str
    ) -> None:
        transport = await opened(rabbit_vhost)
        await transport.declare(QueueSpec(QUEUE))
        inbox = Inbox()
        await transport.consume(QUEUE, inbox, prefetch=50)
        reconnects = count_reconnects(transport)
        futures = [transport.publish(QUEUE, body) for body in numbered(100)]
        await asyncio.to_thread(drop_connection, rabbit, role)
        futures += [transport.publish(QUEUE, body) for body in numbered(100)]
        await asyncio.gather(*futures)
        await eventually(lambda: len(reconnects) == 1)
        await eventually(lambda: set(inbox.bodies) == set(numbered(100)))
        assert transport.connected

    async def test_cut_in_a_burst_everything_is_confirmed_and_arrives(
        self, opened: Open, proxy: TcpProxy, rabbit_vhost: str
    ) -> None:
        transport = await opened(through(proxy, rabbit_vhost))
        await transport.declare(QueueSpec(QUEUE))
        inbox = Inbox(ack=False)
        inbox_acks: list[bool] = []

        def receive(delivery: Delivery) -> None:
            inbox(delivery)
            inbox_acks.append(delivery.ack())

        await transport.consume(QUEUE, receive, prefetch=100)
        futures = []
        for number, body in enumerate(numbered(2000)):
            futures.append(transport.publish(QUEUE, body))
            if number % 500 == 250:
                await inbox.until(number // 2)
                proxy.cut()
        await asyncio.gather(*futures)
        await eventually(lambda: set(inbox.bodies) == set(numbered(2000)))
        await eventually(lambda: depth_is(transport, 0))

    async def test_a_stale_ack_is_dropped_and_the_message_comes_again(
        self, opened: Open, proxy: TcpProxy, rabbit_vhost: str
    ) -> None:
        transport = await opened(through(proxy, rabbit_vhost))
        await transport.declare(QueueSpec(QUEUE))
        inbox = Inbox(ack=False)
        await transport.consume(QUEUE, inbox, prefetch=10)
        await transport.publish(QUEUE, b"once")
        await inbox.until(1)
        proxy.cut()
        await inbox.until(2)
        stale, fresh = inbox.deliveries
        assert not stale.ack()
        assert fresh.redelivered
        assert fresh.ack()
        await eventually(lambda: depth_is(transport, 0))

    async def test_exclusive_queues_come_back_with_their_bindings(
        self, opened: Open, proxy: TcpProxy, rabbit_vhost: str
    ) -> None:
        ear = await opened(through(proxy, rabbit_vhost))
        await ear.declare_exchange("control", "fanout")
        spec = QueueSpec("ear", QueueKind.CLASSIC, exclusive=True, bindings=(("control", ""),))
        await ear.declare(spec)
        inbox = Inbox()
        await ear.consume("ear", inbox, prefetch=10)
        reconnects = count_reconnects(ear)
        proxy.cut()
        await eventually(lambda: reconnects)
        mouth = await opened(rabbit_vhost)
        await mouth.publish("", b"listen", exchange="control")
        assert await inbox.until(1) == [b"listen"]

    async def test_a_cancelled_consumer_stays_cancelled_after_a_loss(
        self, opened: Open, proxy: TcpProxy, rabbit_vhost: str
    ) -> None:
        transport = await opened(through(proxy, rabbit_vhost))
        await transport.declare(QueueSpec(QUEUE), QueueSpec("other"))
        silent, inbox = Inbox(), Inbox()
        consumer = await transport.consume(QUEUE, silent, prefetch=10)
        await consumer.cancel()
        reconnects = count_reconnects(transport)
        proxy.cut()
        await eventually(lambda: reconnects)
        await consumer.cancel()
        await transport.publish(QUEUE, b"x")
        await transport.consume("other", inbox, prefetch=10)
        await transport.publish("other", b"y")
        await inbox.until(1)
        assert not silent.deliveries
        assert await transport.depth(QUEUE) == 1

    async def test_a_broker_that_leaves_a_request_unanswered_is_connected_to_anew(
        self, rabbit_vhost: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("flame_broker.rabbit.link._RESTORE_S", 0.2)
        restored: list[Connection] = []

        async def restore(connection: Connection) -> None:
            restored.append(connection)
            if len(restored) == 1:
                await asyncio.get_running_loop().create_future()

        address = RabbitAddress.parse(rabbit_vhost)
        link = Link(address, "x", restore=restore, on_up=lambda: None, on_down=lambda: None)
        await link.open(10)
        assert len(restored) == 2
        assert restored[0].lost.done()
        assert not restored[1].lost.done()
        await link.close()

    async def test_while_it_is_down_calls_wait_up_to_their_deadline(
        self,
        opened: Open,
        proxy: TcpProxy,
        rabbit_vhost: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        transport = await opened(through(proxy, rabbit_vhost))
        await transport.declare(QueueSpec(QUEUE))
        proxy.refuse()
        proxy.cut()
        await eventually(lambda: not transport.connected)
        monkeypatch.setattr("flame_broker.rabbit.transport.DEFAULT_DEADLINE_S", 0.5)
        started = time.monotonic()
        patient = transport.publish(QUEUE, b"patient")
        outcomes = await asyncio.gather(
            transport.publish(QUEUE, b"x", deadline_s=0.5),
            transport.declare(QueueSpec("new")),
            transport.depth(QUEUE),
            transport.consume(QUEUE, Inbox(), prefetch=1),
            return_exceptions=True,
        )
        assert [type(outcome) for outcome in outcomes] == [BrokerUnavailable] * 4
        assert 0.4 < time.monotonic() - started < 5
        assert str(proxy.port) in str(outcomes[0])
        proxy.accept()
        await patient
        assert await transport.depth(QUEUE) == 1

    async def test_a_silent_peer_is_noticed_by_its_missing_heartbeat(
        self, opened: Open, proxy: TcpProxy, rabbit_vhost: str
    ) -> None:
        transport = await opened(through(proxy, rabbit_vhost, "?heartbeat=1"))
        await transport.declare(QueueSpec(QUEUE))
        proxy.stall()
        future = transport.publish(QUEUE, b"x", deadline_s=60)
        await eventually(lambda: not transport.connected, 20)
        proxy.resume()
        await future
        assert transport.connected

    async def test_a_killed_broker_loses_none_of_a_thousand_in_flight(
        self, opened: Open, own_rabbit: RabbitNode
    ) -> None:
        transport = await opened(own_rabbit.url)
        await transport.declare(QueueSpec(QUEUE))
        own_rabbit.settle()
        before = [transport.publish(QUEUE, body, deadline_s=120) for body in numbered(500)]
        await before[0]
        during = [transport.publish(QUEUE, body, deadline_s=120) for body in numbered(1000)[500:]]
        await asyncio.to_thread(own_rabbit.kill)
        await eventually(lambda: not transport.connected)
        assert not all(future.done() for future in during)
        await asyncio.to_thread(own_rabbit.start)
        await asyncio.gather(*before, *during)
        inbox = Inbox()
        await transport.consume(QUEUE, inbox, prefetch=100)
        await eventually(lambda: set(inbox.bodies) == set(numbered(1000)))


class TestAlarm:
    async def test_publishers_wait_and_consumers_go_on(
        self, opened: Open, own_rabbit: RabbitNode
    ) -> None:
        publisher, consumer = await opened(own_rabbit.url), await opened(own_rabbit.url)
        await publisher.declare(QueueSpec(QUEUE))
        await asyncio.gather(*(publisher.publish(QUEUE, body) for body in numbered(100)))
        await asyncio.to_thread(own_rabbit.set_alarm)
        late = [publisher.publish(QUEUE, body, deadline_s=0.5) for body in numbered(200)[100:]]
        inbox = Inbox()
        await consumer.consume(QUEUE, inbox, prefetch=10)
        assert set(await inbox.until(100)) == set(numbered(100))
        assert await publisher.depth(QUEUE) == 0
        done, _ = await asyncio.wait(late, timeout=1.5)
        assert not done, "a deadline ran while the broker blocked publishers"
        await asyncio.to_thread(own_rabbit.clear_alarm)
        await asyncio.gather(*late)
        assert set(await inbox.until(200)) == set(numbered(200))

    async def test_close_does_not_wait_for_the_end_of_an_alarm(
        self, own_rabbit: RabbitNode
    ) -> None:
        transport = make(own_rabbit.url)
        await transport.open(deadline_s=20)
        await transport.declare(QueueSpec(QUEUE))
        await asyncio.to_thread(own_rabbit.set_alarm)
        stuck = transport.publish(QUEUE, b"x")
        started = time.monotonic()
        await transport.close()
        assert time.monotonic() - started < 8
        with pytest.raises(BrokerUnavailable):
            await stuck


class TestClosing:
    async def test_close_waits_for_confirms_and_leaves_nothing_behind(
        self, rabbit: RabbitNode, rabbit_vhost: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        before = asyncio.all_tasks()
        transport = make(rabbit_vhost)
        await transport.open()
        await transport.declare(QueueSpec(QUEUE))
        await transport.consume(QUEUE, Inbox(), prefetch=10)
        futures = [transport.publish(QUEUE, body) for body in numbered(500)]
        await transport.close()
        assert all(future.done() and not future.exception() for future in futures)
        assert asyncio.all_tasks() == before
        assert not transport.connected
        assert not [record for record in caplog.records if record.name.startswith("pika")]
        vhost = rabbit_vhost.rpartition("/")[2]

        def connections() -> str:
            return rabbit.ctl("list_connections", "--no-table-headers", "vhost")

        await eventually(lambda: vhost not in connections())

    async def test_closing_while_the_broker_is_away_is_quick(
        self, opened: Open, proxy: TcpProxy, rabbit_vhost: str
    ) -> None:
        before = asyncio.all_tasks()
        transport = await opened(through(proxy, rabbit_vhost))
        await transport.declare(QueueSpec(QUEUE))
        proxy.refuse()
        proxy.cut()
        await eventually(lambda: not transport.connected)
        orphan = transport.publish(QUEUE, b"x")
        started = time.monotonic()
        await transport.close()
        assert time.monotonic() - started < 3
        with pytest.raises(BrokerUnavailable, match="closed"):
            await orphan
        assert asyncio.all_tasks() == before


async def depth_is(transport: RabbitTransport, count: int) -> bool:
    return await transport.depth(QUEUE) == count


async def test_a_consumer_that_is_refused_has_one_revival_until_its_queue_is_back(
    opened: Open, rabbit_vhost: str, caplog: pytest.LogCaptureFixture
) -> None:
    owner, other = await opened(rabbit_vhost), await opened(rabbit_vhost)
    await owner.declare(QueueSpec("work", QueueKind.CLASSIC))
    inbox, told = Inbox(), count_reconnects(other)
    await other.consume("work", inbox, prefetch=1)
    await owner.delete("work")
    await eventually(lambda: told, 10)
    revivals = lambda: [t for t in asyncio.all_tasks() if "_revive" in repr(t.get_coro())]  # noqa: E731
    await eventually(lambda: caplog.text.count("consumer_lost") >= 6, 30)
    assert len(revivals()) == 1
    await owner.declare(QueueSpec("work", QueueKind.CLASSIC))
    await owner.publish("work", b"x")
    await eventually(lambda: inbox.bodies, 30)
