"""Redis and SQS when things go wrong; what goes right is in the contract."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from uuid import uuid4

import pytest
import redis

from contract.transport import Received, eventually, numbered, publish_all
from flame_broker.connect import open_transport
from flame_broker.errors import BrokerUnavailable, ConfigError
from flame_broker.transport import QueueKind, QueueSpec, Transport
from lab import Process, RedisServer, TcpProxy

Open = Callable[..., Awaitable[Transport]]

_EATER = Path(__file__).parents[1] / "contract" / "eat.py"


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture(params=["redis", "sqs"])
def url(request: pytest.FixtureRequest) -> str:
    """A broker that takes a message from a silent consumer after two seconds."""
    if request.param == "redis":
        return f"{request.getfixturevalue('redis_url')}?visibility_s=2"
    return f"{request.getfixturevalue('sqs_url')}&visibility_s=2&wait_s=1"


@pytest.fixture
async def connect() -> AsyncIterator[Open]:
    opened: list[Transport] = []

    async def open_one(url: str, **options: float) -> Transport:
        transport = open_transport(url, name="test")
        opened.append(transport)
        await transport.open(**options)
        return transport

    yield open_one
    for transport in opened:
        await transport.close()


@pytest.fixture
def queue() -> str:
    return f"test.{uuid4().hex}"


async def test_what_is_in_hand_stays_there_however_long(
    url: str, queue: str, connect: Open
) -> None:
    transport, other = await connect(url), await connect(url)
    await transport.declare(QueueSpec(queue))
    await transport.publish(queue, b"long")
    busy, idle = Received(ack=False), Received()
    await transport.consume(queue, busy, prefetch=1)
    await busy.until(1)
    await other.consume(queue, idle, prefetch=1)
    # Three visibility times and more: without renewal another consumer would have it by now.
    with pytest.raises(TimeoutError):
        await idle.until(1, timeout_s=7)
    assert busy.deliveries[0].ack()
    assert idle.deliveries == []


async def test_publishes_wait_for_a_broker_that_restarts(
    own_redis: RedisServer, queue: str, connect: Open
) -> None:
    transport = await connect(own_redis.url)
    back = asyncio.Event()
    transport.on_reconnect = back.set
    received = Received()
    await transport.declare(QueueSpec(queue))
    await transport.consume(queue, received, prefetch=10)
    await publish_all(transport, queue, numbered(10))
    await received.until(10)
    await asyncio.to_thread(own_redis.kill)
    pending = [transport.publish(queue, body) for body in numbered(20)[10:]]
    await asyncio.to_thread(own_redis.start)
    await asyncio.gather(*pending)
    await asyncio.wait_for(back.wait(), 10)
    assert sorted(set(await received.until(20))) == sorted(numbered(20))
    assert transport.connected


async def test_declarations_survive_a_broker_that_forgot_them(
    own_redis: RedisServer, queue: str, connect: Open
) -> None:
    transport = await connect(f"{own_redis.url}?visibility_s=1")
    back = asyncio.Event()
    transport.on_reconnect = back.set
    await transport.declare_exchange("ears", "fanout")
    await transport.declare(QueueSpec(queue, bindings=(("ears", ""),)))
    await asyncio.to_thread(own_redis.kill)
    for file in own_redis.folder.glob("appendonly*/*"):
        file.unlink()
    await asyncio.to_thread(own_redis.start)
    await asyncio.wait_for(back.wait(), 20)
    await transport.publish("", b"heard", exchange="ears")
    assert await transport.depth(queue) == 1


async def test_a_broker_that_went_away_is_reported_within_the_deadline(
    own_redis: RedisServer, queue: str, connect: Open
) -> None:
    transport = await connect(own_redis.url)
    await transport.declare(QueueSpec(queue))
    await asyncio.to_thread(own_redis.kill)
    started = time.monotonic()
    with pytest.raises(BrokerUnavailable, match="within 1 s"):
        await transport.publish(queue, b"x", deadline_s=1)
    assert time.monotonic() - started < 3
    assert not transport.connected
    await transport.close()
    assert time.monotonic() - started < 10


async def test_a_frozen_broker_is_reported_within_the_deadline(
    own_redis: RedisServer, queue: str, connect: Open
) -> None:
    transport = await connect(own_redis.url)
    await transport.declare(QueueSpec(queue))
    own_redis.pause()
    started = time.monotonic()
    with pytest.raises(BrokerUnavailable):
        await transport.publish(queue, b"x", deadline_s=1)
    assert time.monotonic() - started < 3
    own_redis.resume()
    await transport.publish(queue, b"y")


async def test_nothing_is_lost_when_the_broker_is_killed_with_messages_in_hand(
    own_redis: RedisServer, queue: str, connect: Open
) -> None:
    url = f"{own_redis.url}?visibility_s=2"
    transport, other = await connect(url), await connect(url)
    await transport.declare(QueueSpec(queue))
    await publish_all(transport, queue, numbered(100))
    held = Received(ack=False)
    await transport.consume(queue, held, prefetch=20)
    await held.until(20)
    await asyncio.to_thread(own_redis.kill)
    await asyncio.to_thread(own_redis.start)
    acked = [delivery.body for delivery in held.deliveries[:10] if delivery.ack()]
    await transport.close()
    rest = Received()
    await other.consume(queue, rest, prefetch=50)
    seen = set(await rest.until(100 - len(acked)))
    assert seen | set(acked) == set(numbered(100))


async def test_a_message_whose_reply_is_cut_off_goes_to_another(
    own_redis: RedisServer, queue: str, connect: Open
) -> None:
    url = f"{own_redis.url}?visibility_s=1"
    transport = await connect(url)
    await transport.declare(QueueSpec(queue))

    async def waits() -> bool:
        with redis.Redis.from_url(own_redis.url) as client:
            return int(client.info("clients")["blocked_clients"]) == 1

    async def is_gone() -> bool:
        return await transport.depth(queue) == 0

    with TcpProxy(own_redis.port) as proxy:
        cut_off = await connect(url.replace(str(own_redis.port), str(proxy.port)))
        await cut_off.consume(queue, Received(), prefetch=1)
        await eventually(waits, what="a consumer that waits for a message")
        proxy.stall()
        await transport.publish(queue, b"on its way")
        await eventually(is_gone, what="the message on its way")
        proxy.refuse()
        proxy.cut()
        received = Received()
        await transport.consume(queue, received, prefetch=1)
        assert await received.until(1) == [b"on its way"]
        assert not received.deliveries[0].redelivered, "nobody has seen it"


async def test_nothing_is_lost_when_consumers_are_killed_while_they_take(
    own_redis: RedisServer, queue: str, connect: Open
) -> None:
    url = f"{own_redis.url}?visibility_s=2"
    transport = await connect(url)
    await transport.declare(QueueSpec(queue))
    handled, published = set[str](), 0
    for _ in range(5):
        with ExitStack() as stack:
            command = [sys.executable, _EATER, url, queue]
            eaters = [stack.enter_context(Process(command)) for _ in range(4)]
            for eater in eaters:
                while not eater.output():
                    assert eater.running
                    bodies = numbered(published + 50)[published:]
                    await publish_all(transport, queue, bodies)
                    published += len(bodies)
                eater.kill()
            handled.update(*(eater.output().split() for eater in eaters))
    rest = Received()
    await transport.consume(queue, rest, prefetch=100)

    async def complete() -> bool:
        return len({*handled, *(body.decode() for body in rest.bodies)}) == published

    await eventually(complete, what=f"all {published} messages")


async def test_an_exclusive_queue_of_a_killed_process_goes_away(
    redis_url: str, queue: str, connect: Open
) -> None:
    url = f"{redis_url}?visibility_s=1"
    program = (
        "import asyncio, sys\n"
        "from flame_broker.connect import open_transport\n"
        "from flame_broker.transport import QueueSpec\n"
        "async def main(url, queue):\n"
        "    transport = open_transport(url, name='owner')\n"
        "    await transport.open()\n"
        "    await transport.declare(QueueSpec(queue, exclusive=True))\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main(*sys.argv[1:]))\n"
    )
    transport = await connect(url)

    async def there() -> bool:
        return await transport.depth(queue) is not None

    async def gone() -> bool:
        return not await there()

    with Process([sys.executable, "-c", program, url, queue]) as owner:
        await eventually(there, what=f"the queue of {owner.output()}")
        await asyncio.sleep(4)  # longer than an owner may be silent: it is kept by renewal
        assert await there()
        owner.kill()
    await eventually(gone, what="the queue without an owner")


@pytest.mark.parametrize(
    "spec",
    [
        QueueSpec("q", QueueKind.STREAM),
        QueueSpec("q", bindings=(("logs", "#"),)),
        QueueSpec("q", exclusive=True),
        QueueSpec("q", arguments={"x-max-length": 10}),
    ],
)
async def test_sqs_refuses_what_it_cannot_keep(
    sqs_url: str, connect: Open, spec: QueueSpec
) -> None:
    transport = await connect(sqs_url)
    with pytest.raises(ConfigError, match="SQS has no"):
        await transport.declare(spec)


async def test_sqs_takes_queue_names_of_any_length(sqs_url: str, connect: Open) -> None:
    transport = await connect(f"{sqs_url}&wait_s=1")
    left, right = f"{'long.' * 30}left", f"{'long.' * 30}right"
    await transport.declare(QueueSpec(left), QueueSpec(right))
    await transport.publish(left, b"x")
    assert await transport.depth(left) == 1
    assert await transport.depth(right) == 0


async def test_the_password_is_not_in_the_error() -> None:
    transport = open_transport("redis://user:hunter2@127.0.0.1:1/0", name="test")
    with pytest.raises(BrokerUnavailable) as caught:
        await transport.open(deadline_s=0.3)
    assert "hunter2" not in str(caught.value)
    assert "refused" in str(caught.value)


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("redis://localhost/0?visibility_timeout=5", "visibility_timeout"),
        ("redis://localhost/0?visibility_s=soon", "soon"),
        ("sqs://localhost/?visibility_s=0", "visibility_s"),
    ],
)
def test_a_wrong_option_is_a_config_error(url: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        open_transport(url, name="test")


async def test_the_first_host_may_be_dead(redis_url: str, queue: str, connect: Open) -> None:
    host = redis_url.removeprefix("redis://")
    transport = await connect(f"redis://127.0.0.1:1;{host}")
    await transport.declare(QueueSpec(queue))
    received = Received()
    await transport.consume(queue, received, prefetch=1)
    await transport.publish(queue, b"x")
    assert await received.until(1) == [b"x"]
