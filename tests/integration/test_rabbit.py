"""The RabbitMQ transport on a real broker: what it promises beyond the contract."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from flame_broker.errors import BrokerUnavailable, PayloadTooLarge
from flame_broker.rabbit import RabbitTransport
from flame_broker.transport import Delivery, QueueKind, QueueMismatch, QueueSpec, Unroutable
from lab import RabbitNode, TcpProxy
from lab.certificates import write_certificates
from lab.inbox import Inbox, numbered
from lab.ports import free_port
from lab.rabbit_client import count_reconnects, make, through
from lab.wait import eventually

Open = Callable[[str], Awaitable[RabbitTransport]]

QUEUE = "work"


class TestPublishing:
    async def test_a_confirmed_message_is_in_the_queue(self, transport: RabbitTransport) -> None:
        await transport.publish(QUEUE, b"kept")
        inbox = Inbox()
        await transport.consume(QUEUE, inbox, prefetch=1)
        assert await inbox.until(1) == [b"kept"]

    async def test_only_the_unroutable_ones_of_a_burst_fail(
        self, transport: RabbitTransport
    ) -> None:
        futures = [
            transport.publish("nowhere" if number % 10 == 0 else QUEUE, b"same body")
            for number in range(200)
        ]
        outcomes = await asyncio.gather(*futures, return_exceptions=True)
        for number, outcome in enumerate(outcomes):
            assert isinstance(outcome, Unroutable) == (number % 10 == 0), number

    async def test_a_missing_exchange_fails_its_messages_and_no_others(
        self, transport: RabbitTransport
    ) -> None:
        good = [transport.publish(QUEUE, body) for body in numbered(50)]
        bad = transport.publish("any", b"x", exchange="no.such.exchange")
        good += [transport.publish(QUEUE, body) for body in numbered(50)]
        with pytest.raises(Unroutable, match=r"no\.such\.exchange"):
            await bad
        await asyncio.gather(*good)
        assert transport.connected

    async def test_an_endless_routing_key_fails_its_message_only(
        self, transport: RabbitTransport
    ) -> None:
        with pytest.raises(Exception, match="cannot send") as caught:
            await transport.publish("k" * 300, b"x")
        assert type(caught.value).__module__.startswith("flame_broker")
        await transport.publish(QUEUE, b"fine")

    async def test_publishing_before_open_waits_for_it(
        self, transport: RabbitTransport, rabbit_vhost: str
    ) -> None:
        early = make(rabbit_vhost)
        future = early.publish(QUEUE, b"early")
        await early.open()
        await future
        await early.close()

    async def test_a_full_queue_holds_its_publisher_until_there_is_room(
        self, transport: RabbitTransport
    ) -> None:
        limits: dict[str, str | int] = {"x-max-length": 1, "x-overflow": "reject-publish"}
        await transport.declare(QueueSpec("full", QueueKind.CLASSIC, arguments=limits))
        await transport.publish("full", b"first")
        with pytest.raises(BrokerUnavailable):
            await transport.publish("full", b"refused", deadline_s=0.5)
        patient = transport.publish("full", b"second", deadline_s=20)
        inbox = Inbox()
        await transport.consume("full", inbox, prefetch=1)
        await patient
        assert await inbox.until(2) == [b"first", b"second"]

    async def test_a_broker_with_a_lower_limit_fails_the_large_message_only(
        self, opened: Open, own_rabbit: RabbitNode
    ) -> None:
        # 3.10 reads the one, 4.0 the other.
        own_rabbit.ctl("eval", "application:set_env(rabbit, max_message_size, 1000).")
        own_rabbit.ctl("eval", "persistent_term:put(max_message_size, 1000).")
        transport = await opened(own_rabbit.url)
        await transport.declare(QueueSpec(QUEUE))
        small = transport.publish(QUEUE, bytes(900))
        with pytest.raises(PayloadTooLarge, match="1000"):
            await transport.publish(QUEUE, bytes(2000))
        await small
        await transport.publish(QUEUE, bytes(900))


class TestConsuming:
    @pytest.mark.parametrize("kind", [QueueKind.QUORUM, QueueKind.CLASSIC])
    async def test_cancel_in_a_flood_loses_nothing_and_rejects_nothing(
        self, transport: RabbitTransport, kind: QueueKind
    ) -> None:
        queue, count = f"flood.{kind}", 5000
        await transport.declare(QueueSpec(queue, kind))
        await asyncio.gather(*(transport.publish(queue, body) for body in numbered(count)))
        first, second = Inbox(), Inbox()
        consumer = await transport.consume(queue, first, prefetch=1000)
        await first.until(10)
        await consumer.cancel()
        taken = len(first.deliveries)
        assert taken < count
        await transport.consume(queue, second, prefetch=1000)
        await second.until(count - taken)
        assert len(first.deliveries) == taken
        assert sorted(first.bodies + second.bodies) == sorted(numbered(count))
        # A quorum queue itself returns what a cancel overtakes on its way to the channel (seen on
        # 3.10); on a classic queue only a reject of ours would make it come again.
        if kind is QueueKind.CLASSIC:
            assert not any(delivery.redelivered for delivery in second.deliveries)

    async def test_consuming_what_does_not_exist_is_refused(
        self, transport: RabbitTransport
    ) -> None:
        with pytest.raises(QueueMismatch, match="missing"):
            await transport.consume("missing", Inbox(), prefetch=1)

    async def test_a_declare_that_is_refused_disturbs_nobody(
        self, transport: RabbitTransport
    ) -> None:
        inbox = Inbox(ack=False)
        await transport.consume(QUEUE, inbox, prefetch=1)
        await transport.publish(QUEUE, b"held")
        await inbox.until(1)
        with pytest.raises(QueueMismatch, match="x-queue-type"):
            await transport.declare(QueueSpec(QUEUE, QueueKind.CLASSIC))
        with pytest.raises(QueueMismatch, match="exchange"):
            await transport.declare(QueueSpec("bound", bindings=(("missing", "key"),)))
        assert inbox.deliveries[0].ack()

    async def test_a_queue_deleted_under_its_consumer_comes_back(
        self, opened: Open, transport: RabbitTransport, rabbit_vhost: str
    ) -> None:
        inbox = Inbox()
        await transport.consume(QUEUE, inbox, prefetch=10)
        other = await opened(rabbit_vhost)
        await other.delete(QUEUE)

        async def served() -> bool:
            try:
                await other.publish(QUEUE, b"again")
            except Unroutable:
                return False
            return True

        await eventually(served)
        assert await inbox.until(1) == [b"again"]

    async def test_a_channel_closed_by_the_broker_is_replaced_alone(
        self, transport: RabbitTransport
    ) -> None:
        await transport.declare(QueueSpec("other"))
        struck, calm = Inbox(ack=False), Inbox(ack=False)
        consumer = await transport.consume(QUEUE, struck, prefetch=1)
        await transport.consume("other", calm, prefetch=1)
        await transport.publish(QUEUE, b"x")
        await transport.publish("other", b"y")
        await struck.until(1)
        await calm.until(1)
        consumer.lane.channel.raw.basic_ack(4711)  # type: ignore[attr-defined]
        await struck.until(2)
        assert struck.deliveries[1].redelivered
        assert not struck.deliveries[0].ack()
        assert struck.deliveries[1].ack()
        assert calm.deliveries[0].ack()

    async def test_an_error_in_a_callback_reaches_the_loop_and_nothing_else(
        self, transport: RabbitTransport
    ) -> None:
        reported: list[object] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: reported.append(context["exception"]))
        inbox = Inbox()

        def faulty(delivery: Delivery) -> None:
            inbox(delivery)
            raise ZeroDivisionError

        await transport.consume(QUEUE, faulty, prefetch=1)
        await transport.publish(QUEUE, b"1")
        await transport.publish(QUEUE, b"2")
        await inbox.until(2)
        await eventually(lambda: len(reported) == 2)
        assert transport.connected

    async def test_a_consumer_that_stands_still_is_restarted(
        self, opened: Open, rabbit_vhost: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("flame_broker.rabbit.consumer._PROBE_S", 0.05)
        transport = await opened(rabbit_vhost)
        await transport.declare(QueueSpec(QUEUE))
        inbox = Inbox()
        consumer = await transport.consume(QUEUE, inbox, prefetch=1)
        lane = consumer.lane  # type: ignore[attr-defined]
        # The broker forgets the consumer, and no notice of it reaches the transport.
        await lane.channel.call(lane.channel.raw.basic_cancel, lane.tag)
        await transport.publish(QUEUE, b"waits")
        assert await inbox.until(1) == [b"waits"]

    async def test_a_stream_is_read_from_its_start_and_after_a_loss_from_where_it_was(
        self, opened: Open, proxy: TcpProxy, rabbit_vhost: str
    ) -> None:
        transport = await opened(through(proxy, rabbit_vhost))
        await transport.declare(QueueSpec("classes", QueueKind.STREAM))
        for body in (b"0", b"1"):
            await transport.publish("classes", body)
        inbox = Inbox()
        await transport.consume("classes", inbox, prefetch=10)
        await inbox.until(2)
        reconnects = count_reconnects(transport)
        proxy.cut()
        await eventually(lambda: reconnects)
        await transport.publish("classes", b"2")
        assert await inbox.until(3) == numbered(3)


class TestConnecting:
    async def test_without_a_broker_open_names_the_hosts_and_not_the_password(self) -> None:
        port = free_port()
        transport = make(f"amqp://ada:hunter2@127.0.0.1:{port};localhost:{port}/")
        started = time.monotonic()
        with pytest.raises(BrokerUnavailable) as caught:
            await transport.open(deadline_s=0.5)
        assert time.monotonic() - started < 3
        assert f"127.0.0.1:{port}: connection refused" in str(caught.value)
        assert f"localhost:{port}" in str(caught.value)
        assert "hunter2" not in str(caught.value)

    async def test_a_wrong_password_is_said_at_once(self, rabbit: RabbitNode) -> None:
        transport = make(f"amqp://guest:wrong@127.0.0.1:{rabbit.port}/")
        started = time.monotonic()
        with pytest.raises(BrokerUnavailable, match="user or password refused"):
            await transport.open(deadline_s=30)
        assert time.monotonic() - started < 10

    async def test_a_missing_vhost_is_said_at_once(self, rabbit: RabbitNode) -> None:
        transport = make(rabbit.url + "not-there")
        with pytest.raises(BrokerUnavailable, match="not-there"):
            await transport.open(deadline_s=30)

    async def test_a_server_that_never_answers_is_given_up_in_time(self, proxy: TcpProxy) -> None:
        proxy.stall()
        transport = make(f"amqp://guest:guest@127.0.0.1:{proxy.port}/")
        started = time.monotonic()
        with pytest.raises(BrokerUnavailable):
            await transport.open(deadline_s=1)
        assert time.monotonic() - started < 6

    async def test_a_failed_open_can_be_tried_again(
        self, proxy: TcpProxy, rabbit_vhost: str
    ) -> None:
        proxy.refuse()
        transport = make(through(proxy, rabbit_vhost))
        with pytest.raises(BrokerUnavailable):
            await transport.open(deadline_s=0.3)
        proxy.accept()
        await transport.open(deadline_s=20)
        await transport.declare(QueueSpec(QUEUE))
        await transport.publish(QUEUE, b"x")
        await transport.close()

    async def test_a_dead_first_host_is_passed_over(
        self, opened: Open, rabbit: RabbitNode, rabbit_vhost: str
    ) -> None:
        vhost = rabbit_vhost.rpartition("/")[2]
        hosts = f"127.0.0.1:{free_port()};127.0.0.1:{rabbit.port}"
        transport = await opened(f"amqp://guest:guest@{hosts}/{vhost}")
        await transport.declare(QueueSpec(QUEUE))
        await transport.publish(QUEUE, b"x")

    async def test_when_a_host_dies_the_next_one_serves(
        self, opened: Open, proxy: TcpProxy, rabbit: RabbitNode, rabbit_vhost: str
    ) -> None:
        vhost = rabbit_vhost.rpartition("/")[2]
        hosts = f"127.0.0.1:{proxy.port};127.0.0.1:{rabbit.port}"
        transport = await opened(f"amqp://guest:guest@{hosts}/{vhost}")
        await transport.declare(QueueSpec(QUEUE))
        inbox = Inbox()
        await transport.consume(QUEUE, inbox, prefetch=10)
        assert proxy.connections == 2
        proxy.refuse()
        proxy.cut()
        await transport.publish(QUEUE, b"x")
        await inbox.until(1)
        assert proxy.connections == 0

    async def test_tls_with_an_authority_of_our_own(self, tmp_path: Path, opened: Open) -> None:
        authority = write_certificates(tmp_path)
        port = free_port()
        config = {
            "listeners.ssl.1": f"127.0.0.1:{port}",
            "ssl_options.cacertfile": str(authority),
            "ssl_options.certfile": str(tmp_path / "server.pem"),
            "ssl_options.keyfile": str(tmp_path / "server.key"),
        }
        with RabbitNode(config=config) as node:
            assert node.running
            transport = await opened(f"amqps://guest:guest@127.0.0.1:{port}/?ca={authority}")
            await transport.declare(QueueSpec(QUEUE))
            inbox = Inbox()
            await transport.consume(QUEUE, inbox, prefetch=10)
            await transport.publish(QUEUE, bytes(1_000_000))
            assert await inbox.until(1) == [bytes(1_000_000)]
            stranger = make(f"amqps://guest:guest@127.0.0.1:{port}/")
            with pytest.raises(BrokerUnavailable, match="certificate"):
                await stranger.open(deadline_s=1)
            await transport.close()
