"""A call under suspicion runs with nothing beside it, and only then it can be blamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flame_broker.errors import Quarantined
from flame_broker.frames import encode, open_frame
from flame_broker.messages import CallFrame, Suspicion
from flame_broker.outcomes import decode_failure
from lab.bench import DEAD, KEYRING, SUSPECTS, Bench, bench, frame_of
from lab.wait import eventually


def suspect(counter: int, suspicion: Suspicion, **changes: Any) -> CallFrame:
    return frame_of([counter], queue=SUSPECTS, suspicion=suspicion, **changes)


async def lose_with(lab: Bench, frame: CallFrame) -> None:
    """Let a worker take a message and be lost with it, before ours sees it."""
    victim = type(lab.broker)(lab.folder.name)
    await victim.open()
    taken: list[object] = []
    await victim.consume(frame.queue, taken.append, prefetch=1)
    await lab.broker.publish(frame.queue, encode(frame, KEYRING.signer))
    await eventually(lambda: taken, 5)
    await victim.close()


async def in_queue(lab: Bench, queue: str) -> CallFrame:
    """The frame that waits in a queue."""
    found: list[CallFrame] = []

    def take(delivery: Any) -> None:
        frame = open_frame(delivery.body, KEYRING).frame
        assert isinstance(frame, CallFrame)
        found.append(frame)

    reader = type(lab.broker)(lab.folder.name)
    await reader.open()
    await reader.consume(queue, take, prefetch=1)
    await eventually(lambda: found, 5)
    await reader.close()
    return found[0]


async def passed_on(folder: Path, frame: CallFrame) -> CallFrame:
    """What becomes of a suspect that comes back from a lost worker to a busy one."""
    async with bench(folder) as lab:
        await lab.submit(frame_of([99]))
        await eventually(lambda: lab.slots[0].started == [99], 5)
        tap = lab.intake._taps["c1"][0]
        await lab.intake._shut(tap)
        await lose_with(lab, frame)
        await lab.intake._draw(tap, 1)
        await eventually(lambda: lab.intake._held and lab.dispatcher.waits("c1"), 5)
        await lab.intake.close()
        lab.dispatcher.hand_back_all()
        await lab.outbox.drain(1)
        lab.slots[0].finish()
        return await in_queue(lab, SUSPECTS)


async def test_a_suspect_lost_beside_others_is_not_blamed_but_runs_apart_from_then_on(
    tmp_path: Path,
) -> None:
    back = await passed_on(tmp_path, suspect(1, Suspicion.SHARED))
    assert (back.strikes, back.suspicion) == (0, Suspicion.APART)


async def test_a_suspect_lost_while_it_waited_for_an_empty_worker_is_not_blamed(
    tmp_path: Path,
) -> None:
    back = await passed_on(tmp_path, suspect(1, Suspicion.APART, strikes=2))
    assert (back.strikes, back.suspicion) == (2, Suspicion.APART)


async def test_a_suspect_lost_while_it_ran_alone_gets_a_strike(tmp_path: Path) -> None:
    back = await passed_on(tmp_path, suspect(1, Suspicion.ALONE, strikes=1))
    assert (back.strikes, back.suspicion) == (2, Suspicion.APART)


async def test_three_losses_alone_quarantine_a_call(tmp_path: Path) -> None:
    async with bench(tmp_path) as lab:
        tap = lab.intake._taps["c1"][0]
        await lab.intake._shut(tap)
        await lose_with(lab, suspect(1, Suspicion.ALONE, strikes=2))
        await lab.intake._draw(tap, 1)
        await lab.settled(1)
        assert isinstance(decode_failure(lab.finals[0].payload, ""), Quarantined)
        assert (await in_queue(lab, DEAD)).strikes == 3
        assert lab.slots[0].started == []


async def test_a_suspect_starts_when_the_worker_is_empty_and_nothing_starts_before_it_ends(
    tmp_path: Path,
) -> None:
    async with bench(tmp_path, slots=2) as lab:
        await lab.submit(frame_of([1]))
        await eventually(lambda: lab.slots[0].started == [1], 5)
        await lab.submit(suspect(2, Suspicion.APART))
        await eventually(lambda: lab.dispatcher.waits("c1"), 5)
        await lab.submit(frame_of([3]))
        assert lab.dispatcher.room("c1") == 0
        assert [slot.started for slot in lab.slots] == [[1], []]
        lab.slots[0].finish()
        await eventually(lambda: any(2 in slot.started for slot in lab.slots), 5)
        alone = next(slot for slot in lab.slots if slot.batches)
        holding: Any = alone.batches[0].context
        assert holding.holding.frame.suspicion is Suspicion.ALONE
        assert not any(3 in slot.started for slot in lab.slots)
        alone.finish()
        await eventually(lambda: any(3 in slot.started for slot in lab.slots), 5)
        next(slot for slot in lab.slots if slot.batches).finish()
        await lab.settled(3)


async def test_a_suspect_announced_to_an_empty_worker_does_not_start_in_a_busy_one(
    tmp_path: Path,
) -> None:
    async with bench(tmp_path, slots=2) as lab:
        await lab.submit(frame_of([1]))
        await eventually(lambda: lab.slots[0].started == [1], 5)
        await lab.submit(suspect(2, Suspicion.ALONE))
        await eventually(lambda: lab.intake.counts["calls"] == 3, 5)  # it came twice
        assert lab.dispatcher.waits("c1")
        assert lab.slots[1].started == []
        lab.slots[0].finish()
        await eventually(lambda: any(2 in slot.started for slot in lab.slots), 5)
        next(slot for slot in lab.slots if slot.batches).finish()
        await lab.settled(2)


async def test_cancelling_a_suspect_that_waits_lets_the_others_go_on(tmp_path: Path) -> None:
    async with bench(tmp_path) as lab:
        await lab.submit(frame_of([1]))
        await eventually(lambda: lab.slots[0].started == [1], 5)
        await lab.submit(suspect(2, Suspicion.APART))
        await eventually(lambda: lab.dispatcher.waits("c1"), 5)
        lab.intake.cancel("c0", frozenset([2]), spare_running=False)
        lab.slots[0].finish()
        await lab.submit(frame_of([3]))
        await eventually(lambda: lab.slots[0].started == [1, 3], 5)
        lab.slots[0].finish()
        await lab.settled(3)
