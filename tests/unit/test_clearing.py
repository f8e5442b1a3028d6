"""Taking messages off their shelves: confirmed first, nothing lost, nothing else touched."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import pytest

from flame_broker import frames
from flame_broker.errors import BrokerUnavailable
from flame_broker.keys import Key, Keyring
from flame_broker.memory import MemoryTransport
from flame_broker.memory_broker import MemoryDelivery
from flame_broker.messages import Call, CallFrame, CallSpec, Target
from flame_broker.topology import calls_queue, classes_queue, dead_queue
from flame_cli import hands
from flame_cli.aside import Aside, Fate, Shelf
from flame_cli.clearing import drop, replay
from flame_cli.replay import Edits
from flame_cli.survey import Survey, survey
from flame_cli.tally import Tally
from lab.inbox import Inbox

KEY = Key(b"a key of the cluster, which is long enough")
KEYRING = Keyring([KEY])
SHELF = Shelf(KEY.hex_id, "default", Fate.DEAD)
CALLS = calls_queue(KEY.hex_id, "default", "c1").name


def body_of(counter: int, resources: str = "c1") -> bytes:
    spec = CallSpec(Target("m:f"), resources=resources)
    frame = CallFrame(SHELF.queue, "replies", "k3j9", spec, (Call(counter, b"x"),))
    return frames.encode(frame, KEY)


@dataclass
class Lab:
    """A broker in this process, and what was said of its messages."""

    transport: MemoryTransport
    url: str
    sent: list[tuple[str, str]] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)

    async def put(self, *bodies: bytes) -> None:
        await self.transport.declare(dead_queue(KEY.hex_id, "default"))
        for body in bodies:
            await self.transport.publish(SHELF.queue, body)

    async def look(self) -> Survey:
        return await survey(self.url, KEYRING, [SHELF])

    async def replay(self, *chosen: Aside, edits: Edits | None = None) -> None:
        await replay(
            self.url, KEYRING, chosen, edits or Edits(), noting(self.sent), noting(self.refused)
        )

    async def bodies(self, queue: str) -> list[bytes]:
        """Empty a queue."""
        inbox, count = Inbox(), await self.transport.depth(queue)
        await self.transport.consume(queue, inbox, prefetch=0)
        return await inbox.until(count or 0)


def noting(into: list[tuple[str, str]]) -> Callable[[Aside, str], None]:
    return lambda aside, text: into.append((aside.id, text))


@pytest.fixture
async def lab() -> AsyncIterator[Lab]:
    name = uuid4().hex
    transport = MemoryTransport(name)
    await transport.open()
    yield Lab(transport, f"memory://{name}")
    await transport.close()


async def test_a_look_leaves_everything_where_it_is(lab: Lab) -> None:
    bodies = [body_of(n) for n in range(20)]
    await lab.put(*bodies)
    found = await lab.look()
    assert [aside.calls for aside in found.asides] == [[f"k3j9-{n}"] for n in range(20)]
    assert found.lying == 20
    assert await lab.bodies(SHELF.queue) == bodies


async def test_a_look_stops_at_its_limit(lab: Lab) -> None:
    await lab.put(*[body_of(n) for n in range(20)])
    found = await survey(lab.url, KEYRING, [SHELF], 3)
    assert ([*map(len, (found.asides,))], found.lying) == ([3], 20)


async def test_shelves_that_do_not_exist_are_empty(lab: Lab) -> None:
    assert await lab.look() == Survey([], 0)


async def test_replay_publishes_and_takes_off_and_leaves_the_others(lab: Lab) -> None:
    await lab.put(*[body_of(n) for n in range(5)])
    found = (await lab.look()).asides
    await lab.replay(found[1], found[3])
    assert lab.sent == [(found[1].id, CALLS), (found[3].id, CALLS)]
    sent = [frames.decode(body, KEYRING, queue=CALLS) for body in await lab.bodies(CALLS)]
    assert [f.calls[0].counter for f in sent if isinstance(f, CallFrame)] == [1, 3]
    assert await lab.bodies(SHELF.queue) == [body_of(0), body_of(2), body_of(4)]


async def test_copies_of_a_message_are_sent_once_and_all_taken_off(lab: Lab) -> None:
    await lab.put(body_of(1), body_of(1), body_of(2))
    found = (await lab.look()).find([(await lab.look()).asides[0].id])
    assert len(found.asides) == 2
    await lab.replay(*found.asides)
    assert await lab.transport.depth(CALLS) == 1
    assert await lab.transport.depth(SHELF.queue) == 1


async def test_nothing_is_taken_off_before_it_is_confirmed(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    await lab.put(body_of(1), body_of(2))
    found = (await lab.look()).asides
    publish, ack, events = MemoryTransport.publish, MemoryDelivery.ack, list[str]()

    def confirm_later(self: MemoryTransport, *args: Any, **options: Any) -> Any:
        async def confirm() -> None:
            await asyncio.sleep(0)
            await publish(self, *args, **options)
            events.append("confirmed")

        return asyncio.ensure_future(confirm())

    def note(self: MemoryDelivery) -> bool:
        events.append("taken off")
        return ack(self)

    monkeypatch.setattr(MemoryTransport, "publish", confirm_later)
    monkeypatch.setattr(MemoryDelivery, "ack", note)
    await lab.replay(*found)
    assert sorted(events) == ["confirmed"] * 2 + ["taken off"] * 2
    assert all(
        events[: n + 1].count("confirmed") >= events[: n + 1].count("taken off") for n in range(4)
    )


async def test_what_was_not_confirmed_stays(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    await lab.put(body_of(1), body_of(2), body_of(3))
    found = (await lab.look()).asides
    publish, sent = MemoryTransport.publish, list[str]()

    def fail_the_second(self: MemoryTransport, queue: str, *args: Any, **options: Any) -> Any:
        sent.append(queue)
        if len(sent) == 1:
            return publish(self, queue, *args, **options)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.set_exception(BrokerUnavailable("no confirm"))
        return future

    monkeypatch.setattr(MemoryTransport, "publish", fail_the_second)
    with pytest.raises(BrokerUnavailable):
        await lab.replay(*found)
    assert [one for one, _ in lab.sent] == [found[0].id]
    assert await lab.bodies(SHELF.queue) == [body_of(2), body_of(3)]


async def test_another_class_is_announced_to_the_workers(lab: Lab) -> None:
    await lab.put(body_of(1, "c2"))
    await lab.replay(*(await lab.look()).asides)
    stream = classes_queue(KEY.hex_id, "default").name
    (said,) = await lab.bodies(stream)
    order: Any = frames.decode(said, KEYRING, queue=stream)
    assert (order.verb, order.arguments) == ("class", {"pool": "default", "name": "c2"})


async def test_drop_takes_off_what_was_chosen_and_nothing_that_came_later(lab: Lab) -> None:
    await lab.put(b"one", b"two")
    found = (await lab.look()).asides
    await lab.put(b"three")
    await drop(lab.url, found, noting(lab.sent))
    assert [one for one, _ in lab.sent] == [aside.id for aside in found]
    assert await lab.bodies(SHELF.queue) == [b"three"]


async def test_what_somebody_else_took_meanwhile_is_told(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hands, "_QUIET_S", 0.05)
    await lab.put(b"one", b"two")
    found = (await lab.look()).asides
    await drop(lab.url, found[:1], noting([]))
    tally = Tally("dropped", {})
    with tally.shown(found, as_json=False):
        await drop(lab.url, found, tally.done)
    assert tally.code == 1
    told = capsys.readouterr()
    assert f"{found[0].id}: gone: it is no longer there" in told.err
    assert found[1].id in told.out
