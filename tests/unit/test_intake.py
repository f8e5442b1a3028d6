"""The intake opens its consumers when their queues are there, and again after a failure."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

from flame_broker.errors import BrokerUnavailable
from flame_broker.keys import Keyring
from flame_broker.transport import QueueSpec
from flame_worker.intake import Intake
from flame_worker.leases import Leases
from flame_worker.taps import Draw
from lab.wait import eventually

KEYRING = Keyring.parse("k" * 40)


class FaultyBroker:
    """Declares slowly, and refuses to consume what is not declared, or when told to."""

    def __init__(self) -> None:
        self.declared: set[str] = set()
        self.consumed: Counter[str] = Counter()
        self.refusals = 0
        self.violations: list[str] = []

    capabilities = SimpleNamespace(fanout=True)

    async def declare_exchange(self, name: str, kind: str) -> None:
        await asyncio.sleep(0)

    async def declare(self, *queues: QueueSpec) -> None:
        for queue in queues:
            await asyncio.sleep(0)
            self.declared.add(queue.name)

    async def consume(self, queue: str, on_delivery: object, *, prefetch: int) -> object:
        if queue not in self.declared:
            self.violations.append(queue)
        if self.refusals:
            self.refusals -= 1
            raise BrokerUnavailable("not now")
        await asyncio.sleep(0)
        self.consumed[queue] += prefetch
        return object()

    async def depth(self, queue: str) -> int:
        return 0


class Cancellable:
    """A consumer that the broker takes its time to cancel."""

    def __init__(self) -> None:
        self.asked, self.answered = asyncio.Event(), asyncio.Event()

    async def cancel(self) -> None:
        self.asked.set()
        await self.answered.wait()


def make_intake(broker: FaultyBroker, *, width: int = 2) -> Intake:
    dispatcher = SimpleNamespace(pool=SimpleNamespace(width=lambda _: width), room=lambda _: width)
    outbox = SimpleNamespace(stalled=False)
    parts: list[Any] = [broker, KEYRING, "default", outbox, None, dispatcher]
    intake = Intake(*parts)
    intake.leases = cast(Leases, SimpleNamespace(occupied=lambda _: 0))
    return intake


async def test_a_slot_that_is_ready_early_does_not_open_undeclared_queues() -> None:
    broker = FaultyBroker()
    intake = make_intake(broker)
    adding = asyncio.ensure_future(intake.add_class("c1", with_suspects=True))
    await asyncio.sleep(0)
    intake.widen()  # a child got ready meanwhile
    await adding
    await eventually(lambda: len(broker.consumed) == 4, 5)
    assert broker.violations == []


async def test_a_consumer_that_could_not_start_is_started_by_the_next_refill() -> None:
    broker = FaultyBroker()
    intake = make_intake(broker)
    await intake.add_class("c1", with_suspects=True)
    before = broker.consumed.total()
    intake.short("c1", 0.001)
    broker.refusals = 1
    await eventually(lambda: not broker.refusals, 5)
    await eventually(lambda: intake._refilling is None, 5)
    intake.widen()
    healthy = FaultyBroker()
    twin = make_intake(healthy)
    await twin.add_class("c1", with_suspects=True)
    twin.short("c1", 0.001)
    await eventually(lambda: healthy.consumed.total() > before, 5)
    await eventually(lambda: broker.consumed == healthy.consumed, 5)


async def test_refills_at_the_same_time_open_no_more_than_one_does() -> None:
    broker = FaultyBroker()
    intake = make_intake(broker, width=1)
    await intake.add_class("c1")
    intake._dispatcher.pool.width = lambda _: 4  # type: ignore[method-assign,assignment]
    await asyncio.gather(*(intake._refill_class("c1") for _ in range(3)))
    assert set(broker.consumed.values()) == {4}


async def test_short_calls_that_nothing_waits_behind_end_the_asking_one_by_one() -> None:
    broker = FaultyBroker()
    intake = make_intake(broker, width=2)
    await intake.add_class("c1")
    intake.full("c1", "")
    intake._dispatcher.waits = lambda _: True  # type: ignore[method-assign]
    intake.short("c1", 0.001)
    assert "c1" in intake._full
    intake._dispatcher.waits = lambda _: False  # type: ignore[method-assign]
    intake.short("c1", 0.001)
    await eventually(lambda: set(broker.consumed.values()) == {2 + 6}, 5)


async def test_short_calls_open_again_what_was_shut_while_nothing_could_leave() -> None:
    broker = FaultyBroker()
    intake = make_intake(broker, width=2)
    intake._dispatcher.waits = lambda _: False  # type: ignore[method-assign]
    await intake.add_class("c1")
    intake.short("c1", 0.001)
    await eventually(lambda: set(broker.consumed.values()) == {2 + 6}, 5)
    await eventually(lambda: intake._refilling is None, 5)
    intake._full.add("c1")
    for tap in intake._taps["c1"]:
        tap.draws.clear()
    broker.consumed.clear()
    intake._outbox.stalled = True  # type: ignore[misc]
    intake.short("c1", 0.001)
    assert "c1" in intake._full
    intake._outbox.stalled = False  # type: ignore[misc]
    intake.short("c1", 0.001)
    await eventually(lambda: set(broker.consumed.values()) == {2 + 6}, 5)


async def test_a_consumer_whose_message_ends_while_others_are_cancelled_goes_on() -> None:
    """Another message is on its way to it then, which its cancel would make a suspect."""
    intake = make_intake(FaultyBroker())
    await intake.add_class("c1")
    (tap, *_) = intake._taps["c1"]
    slow, quick = Cancellable(), Cancellable()
    quick.answered.set()
    first, second = (Draw(1, held=1, consumer=c) for c in (slow, quick))
    tap.draws = {first, second}
    shutting = asyncio.ensure_future(intake._shut(tap, [first, second]))
    await slow.asked.wait()
    second.held -= 1
    slow.answered.set()
    await shutting
    assert tap.draws == {second}
    assert not quick.asked.is_set()


async def test_a_call_that_is_about_to_end_has_the_next_one_asked_for_not_sent_with_its_ack() -> (
    None
):
    intake = make_intake(FaultyBroker())
    await intake.add_class("c1")
    intake.foresee("c1")
    assert "c1" in intake._full


async def test_frames_that_are_held_ahead_need_not_be_asked_for() -> None:
    intake = make_intake(FaultyBroker())
    await intake.add_class("c1")
    intake.short("c1", 0.001)
    intake.foresee("c1")
    assert "c1" not in intake._full
