"""Calls find slots: at once, behind short work, or not at all; none is left behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flame_broker.errors import CallExpired, WorkerLost
from flame_broker.messages import Status
from flame_broker.outcomes import decode_failure
from flame_broker.resources import Capacity
from flame_worker import dispatch
from flame_worker.batches import Lost
from flame_worker.holding import Holding
from lab.bench import CALLS, KEYRING, bench, frame_of
from lab.wait import eventually


async def test_a_frame_is_divided_among_idle_slots_and_settled_when_all_are_done(
    tmp_path: Path,
) -> None:
    async with bench(tmp_path, slots=2) as lab:
        await lab.submit(frame_of(range(4)))
        await eventually(lambda: all(slot.started for slot in lab.slots), 5)
        for slot in lab.slots:
            slot.finish()
        assert lab.intake.held == 1
        for slot in lab.slots:
            slot.finish()
        await lab.settled(4)
        assert sorted(result.counter for result in lab.finals) == [0, 1, 2, 3]


async def test_calls_behind_a_slow_one_are_handed_back_alone_and_run_by_whoever_is_free(
    tmp_path: Path,
) -> None:
    async with bench(tmp_path, slots=1) as lab:
        await lab.submit(frame_of(range(3)))
        await eventually(lambda: lab.slots[0].started == [0], 5)
        queue = frame_of([0]).queue
        await eventually(lambda: lab.intake.held == 1 and not lab.dispatcher.waits("c1"), 5)
        async with bench(tmp_path, slots=1) as other:
            await eventually(lambda: other.slots[0].started == [1], 5)
            other.slots[0].finish()
            await eventually(lambda: 2 in other.slots[0].started, 5)
            other.slots[0].finish()
            lab.slots[0].finish()
            await eventually(lambda: len({r.counter for r in lab.results + other.results}) == 3, 5)
        assert await lab.depth(queue) == 0


async def test_a_call_that_was_handed_back_before_waits_longer_than_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or it would go to the end of its queue whenever the call before it takes a bit longer."""
    monkeypatch.setattr(dispatch, "LONE_S", 60.0)
    async with bench(tmp_path, slots=1) as lab:
        await lab.submit(frame_of([1]))
        await eventually(lambda: lab.slots[0].started == [1], 5)
        for frame in (replace(frame_of([2]), handed=1), frame_of([3])):
            lab.dispatcher.take(Holding([], frame, KEYRING.signer, lambda _: None))

        async def handed_back() -> bool:
            return await lab.depth(CALLS) == 1

        await eventually(handed_back, 5)
        assert [h.frame.calls[0].counter for h in lab.dispatcher._waiting()] == [2]
        lab.slots[0].finish()
        await eventually(lambda: lab.slots[0].started == [1, 2], 5)


async def test_a_lost_child_fails_its_running_call_and_hands_the_others_back(
    tmp_path: Path,
) -> None:
    async with bench(tmp_path, slots=1) as lab:
        await lab.submit(frame_of([7, 8]))
        await eventually(lambda: lab.slots[0].started == [7], 5)
        batch = lab.slots[0].batches[0]
        lab.slots[0].lose(Lost(WorkerLost, "killed", (batch, 7), [], [(batch, 8)]))
        lab.slots[0].ready = True
        await eventually(lambda: lab.slots[0].started == [7, 8], 5)
        lab.slots[0].finish()
        await lab.settled(2)
        lost = next(result for result in lab.finals if result.counter == 7)
        assert isinstance(decode_failure(lost.payload, ""), WorkerLost)


async def test_what_was_taken_back_does_not_make_a_slow_target_look_short(tmp_path: Path) -> None:
    async with bench(tmp_path, slots=1) as lab:
        await lab.submit(frame_of(range(64)))
        await eventually(lambda: lab.slots[0].revoked, 5)
        lab.slots[0].finish(seconds=0.3)
        guess_s = lab.dispatcher._pace.guess_s(frame_of([0]).spec.target, 1)
        assert guess_s
        assert guess_s > 0.2


async def test_short_calls_get_a_slot_when_another_class_has_taken_them_all(
    tmp_path: Path,
) -> None:
    async with bench(tmp_path, slots=1, capacity=Capacity(1, 2**31)) as lab:
        await lab.submit(frame_of([1]))
        await eventually(lambda: lab.slots[0].started == [1], 5)
        lab.slots[0].finish(seconds=0.0001)  # now the target is known to be short
        await lab.settled(1)
        lab.pool.grow("c1-m1")  # takes the cpu of the only slot
        await eventually(lambda: len(lab.slots) == 2 and lab.slots[1].ready, 5)
        await lab.submit(frame_of([2]))
        await eventually(lambda: len(lab.slots) == 3 and lab.slots[2].started == [2], 5)
        lab.slots[2].finish()
        await lab.settled(2)


async def test_nothing_is_given_ahead_while_room_is_kept_for_another_class(tmp_path: Path) -> None:
    async with bench(tmp_path, slots=1) as lab:
        await lab.submit(frame_of([1]))
        await eventually(lambda: lab.slots[0].started == [1], 5)
        lab.slots[0].finish(seconds=0.0001)
        await lab.submit(frame_of([2]))
        await eventually(lambda: len(lab.slots[0].batches) == 1, 5)
        lab.pool.kept_for = "c1-m1"
        await lab.submit(frame_of([3]))
        lab.dispatcher.pump()
        await eventually(lambda: lab.dispatcher.waits("c1"), 5)
        assert lab.slots[0].given == [1, 2]
        lab.slots[0].finish()
        assert lab.slots[0].started == [1, 2]
        lab.pool.kept_for = None
        await eventually(lambda: lab.slots[0].started[-1] == 3, 5)
        lab.slots[0].finish()
        await lab.settled(3)
        assert {result.status for result in lab.finals} == {Status.OK}


async def test_the_next_call_is_here_before_a_steady_one_is_expected_to_end(tmp_path: Path) -> None:
    async with bench(tmp_path, slots=1) as lab:
        slot = lab.slots[0]
        for number in range(8):
            await lab.submit(frame_of([number]))
            await eventually(lambda n=number: slot.started[-1:] == [n], 5)  # type: ignore[misc]
            slot.finish(seconds=0.1)
        await lab.settled(8)
        lab.intake.full("c1", "")
        await lab.submit(frame_of([8]))
        await eventually(lambda: slot.started[-1] == 8, 5)
        await lab.submit(frame_of([9]))
        await eventually(lambda: lab.intake.counts["frames"] >= 10, 5)
        assert slot.started[-1] == 8
        slot.finish(seconds=0.1)
        await eventually(lambda: slot.started[-1] == 9, 5)
        slot.finish(seconds=0.1)
        await lab.settled(10)


async def test_idle_slots_start_the_calls_of_a_frame_in_their_order(tmp_path: Path) -> None:
    async with bench(tmp_path, slots=3) as lab:
        await lab.submit(frame_of(range(6)))
        await eventually(lambda: all(slot.started for slot in lab.slots), 5)
        assert sorted(slot.started[0] for slot in lab.slots) == [0, 1, 2]


async def test_what_several_slots_give_back_goes_on_in_its_order(tmp_path: Path) -> None:
    async with bench(tmp_path, slots=2) as lab:
        await lab.submit(frame_of(range(8)))
        await eventually(lambda: all(slot.revoked for slot in lab.slots), 5)
        started: list[int] = []
        while len(started) < 8:
            slot = next(slot for slot in lab.slots if slot.batches)
            started.append(slot.started[-1])
            slot.finish(seconds=0.1)
            await eventually(lambda: any(slot.batches for slot in lab.slots) or lab.finals[7:], 5)
        # The last one comes first: it cannot be kept from a credit that was given before.
        assert [n for n in started if n != 7] == [*range(7)]


async def test_calls_that_have_waited_too_long_are_dropped_unless_they_have_started(
    tmp_path: Path,
) -> None:
    async with bench(tmp_path, slots=1) as lab:
        await lab.submit(frame_of([1, 2, 3]))
        await eventually(lambda: lab.slots[0].started == [1], 5)
        assert lab.intake.expire("c0", frozenset([1, 2, 4])) == {1}
        await lab.submit(frame_of([4]))
        lab.slots[0].finish()
        await eventually(lambda: lab.slots[0].started == [1, 3], 5)
        lab.slots[0].finish()
        await lab.settled(4)
        failed = [result for result in lab.finals if result.status is Status.FAILED]
        assert {result.counter for result in failed} == {2, 4}
        for result in failed:
            assert isinstance(decode_failure(result.payload, ""), CallExpired)


async def test_a_call_that_was_handed_back_has_not_started(tmp_path: Path) -> None:
    async with bench(tmp_path, slots=1) as lab:
        await lab.submit(frame_of([1, 2]))
        await eventually(lambda: lab.slots[0].revoked and not lab.dispatcher.waits("c1"), 5)
        assert lab.intake.expire("c0", frozenset([1, 2])) == {1}
        assert lab.intake.expire("c1", frozenset([1, 2])) == set()
        lab.slots[0].finish()
        await lab.settled(2)
        assert lab.slots[0].started == [1]


async def test_a_worker_that_is_about_to_end_hands_nothing_back(tmp_path: Path) -> None:
    async with bench(tmp_path) as lab:
        await lab.submit(frame_of([1, 2]))
        await eventually(lambda: lab.slots[0].started == [1], 5)
        lab.dispatcher._revoke_all(lambda _: True)
        lab.dispatcher.close()
        await eventually(lambda: lab.dispatcher._watching is None, 5)
        assert lab.dispatcher.waits("c1")
        assert await lab.depth(frame_of([2]).queue) == 0
