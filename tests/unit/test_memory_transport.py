from __future__ import annotations

import asyncio
import os
import threading
from itertools import count
from uuid import uuid4

import pytest

from contract.transport import MakeTransport, Received, TransportContract, numbered, publish_all
from flame_broker.errors import BrokerUnavailable, ConfigError
from flame_broker.memory import MemoryTransport
from flame_broker.transport import Delivery, QueueKind, QueueSpec, Transport


class TestMemoryContract(TransportContract):
    @pytest.fixture
    def make_transport(self) -> MakeTransport:
        namespace = uuid4().hex
        return lambda: MemoryTransport(namespace)

    @pytest.fixture
    def absent_transport(self) -> Transport:
        pytest.skip("the in-process broker is never absent")


@pytest.fixture
def namespace() -> str:
    return uuid4().hex


async def test_namespaces_do_not_meet(namespace: str) -> None:
    here, there = MemoryTransport(namespace), MemoryTransport(f"{namespace}.other")
    await here.open()
    await there.open()
    await here.declare(QueueSpec("q"))
    assert await there.depth("q") is None


async def test_nameless_transports_are_alone() -> None:
    here, there = MemoryTransport(), MemoryTransport()
    await here.open()
    await there.open()
    await here.declare(QueueSpec("q"))
    assert await there.depth("q") is None


async def test_a_namespace_is_gone_when_nobody_refers_to_it(namespace: str) -> None:
    first = MemoryTransport(namespace)
    await first.open()
    await first.declare(QueueSpec("q"))
    await first.close()
    del first
    second = MemoryTransport(namespace)
    await second.open()
    assert await second.depth("q") is None


async def test_a_forked_child_starts_with_an_empty_namespace(namespace: str) -> None:
    parent = MemoryTransport(namespace)
    await parent.open()
    await parent.declare(QueueSpec("q"))
    pid = os.fork()
    if pid == 0:
        same = MemoryTransport(namespace)._broker is parent._broker
        os._exit(1 if same else 0)
    _, status = await asyncio.to_thread(os.waitpid, pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert MemoryTransport(namespace)._broker is parent._broker


async def test_an_exception_in_a_callback_reaches_the_loop_and_the_rest_goes_on(
    namespace: str,
) -> None:
    seen: list[bytes] = []
    complaints: list[dict[str, object]] = []
    done = asyncio.Event()

    def picky(delivery: Delivery) -> None:
        delivery.ack()
        seen.append(delivery.body)
        if delivery.body == b"9":
            done.set()
        if delivery.body == b"3":
            raise ValueError("three")

    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    transport = MemoryTransport(namespace)
    await transport.open()
    await transport.declare(QueueSpec("q"))
    await transport.consume("q", picky, prefetch=10)
    await publish_all(transport, "q", numbered(10))
    await asyncio.wait_for(done.wait(), 5)
    assert seen == numbered(10)
    assert [str(context["exception"]) for context in complaints] == ["three"]


async def test_cancel_gives_back_what_no_callback_has_seen_in_its_old_place(namespace: str) -> None:
    transport = MemoryTransport(namespace)
    await transport.open()
    await transport.declare(QueueSpec("q"))
    unlucky, lucky = Received(), Received()
    consumer = await transport.consume("q", unlucky, prefetch=3)
    for body in numbered(5):
        transport.publish("q", body)  # the loop has not turned: nothing was shown yet
    await consumer.cancel()
    await transport.consume("q", lucky, prefetch=5)
    assert await lucky.until(5) == numbered(5)
    assert unlucky.bodies == []
    assert not any(delivery.redelivered for delivery in lucky.deliveries)


async def test_transports_in_two_threads_exchange_messages(namespace: str) -> None:
    client = MemoryTransport(namespace)
    await client.open()
    await client.declare(QueueSpec("calls"), QueueSpec("replies"))
    received = Received()
    await client.consume("replies", received, prefetch=50)
    worker = threading.Thread(target=lambda: asyncio.run(_serve(namespace, 500)))
    worker.start()
    await publish_all(client, "calls", numbered(500))
    assert await received.until(500) == numbered(500)
    await asyncio.to_thread(worker.join)
    await client.close()


async def _serve(namespace: str, limit: int) -> None:
    transport = MemoryTransport(namespace)
    await transport.open()
    done, seen = asyncio.Event(), count(1)
    thread = threading.get_ident()

    def echo(delivery: Delivery) -> None:
        assert threading.get_ident() == thread
        transport.publish("replies", delivery.body)
        delivery.ack()
        if next(seen) == limit:
            done.set()

    await transport.consume("calls", echo, prefetch=10)
    await asyncio.wait_for(done.wait(), 20)
    await transport.close()


async def test_a_transport_whose_loop_died_gives_its_messages_back(namespace: str) -> None:
    survivor = MemoryTransport(namespace)
    await survivor.open()
    await survivor.declare(QueueSpec("q"))
    await survivor.publish("q", b"orphan")
    victim = threading.Thread(target=lambda: asyncio.run(_take_and_die(namespace)))
    victim.start()
    await asyncio.to_thread(victim.join)
    rescuer = MemoryTransport(namespace)
    await rescuer.open()
    received = Received()
    await rescuer.consume("q", received, prefetch=1)
    assert await received.until(1) == [b"orphan"]
    assert received.deliveries[0].redelivered


async def _take_and_die(namespace: str) -> None:
    transport = MemoryTransport(namespace)
    await transport.open()
    received = Received(ack=False)
    await transport.consume("q", received, prefetch=1)
    await received.until(1)


async def test_redeclaring_with_other_arguments_is_refused(namespace: str) -> None:
    transport = MemoryTransport(namespace)
    await transport.open()
    await transport.declare(QueueSpec("q", QueueKind.QUORUM))
    with pytest.raises(ConfigError, match="other arguments"):
        await transport.declare(QueueSpec("q", QueueKind.CLASSIC))


async def test_before_open_everything_says_unavailable(namespace: str) -> None:
    transport = MemoryTransport(namespace)
    with pytest.raises(BrokerUnavailable, match=namespace):
        await transport.declare(QueueSpec("q"))
    with pytest.raises(BrokerUnavailable):
        await transport.consume("q", lambda _: None, prefetch=1)


@pytest.mark.parametrize(
    ("pattern", "key", "taken"),
    [
        ("ada", "ada", True),
        ("ada", "bob", False),
        ("*", "ada", True),
        ("*", "ada.log", False),
        ("#", "", True),
        ("#", "ada.log.x", True),
        ("ada.#", "ada", True),
        ("ada.#", "ada.log.x", True),
        ("#.log", "ada.x.log", True),
        ("#.log", "ada.x", False),
        ("ada.*.log", "ada.x.log", True),
        ("ada.*.log", "ada.log", False),
    ],
)
async def test_topic_patterns(namespace: str, pattern: str, key: str, taken: bool) -> None:
    transport = MemoryTransport(namespace)
    await transport.open()
    await transport.declare_exchange("logs", "topic")
    await transport.declare(QueueSpec("q", bindings=(("logs", pattern),)))
    await transport.publish(key, b"x", exchange="logs", mandatory=False)
    assert await transport.depth("q") == int(taken)
