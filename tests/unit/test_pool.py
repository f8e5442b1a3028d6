"""Slots come and go within the capacity, and give everything back."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import cast
from unittest.mock import Mock

from hypothesis import given
from hypothesis import strategies as st

from flame_broker.errors import WorkerLost
from flame_broker.resources import Capacity, ResourceRequirement
from flame_worker.batches import Batch
from flame_worker.gpus import GpuPool, GpuShare
from flame_worker.pool import SlotPool
from flame_worker.slots import Slot
from lab.bench import PlayedSlot, bench, frame_of
from lab.wait import eventually


async def test_a_slot_that_does_not_start_gives_its_gpus_back(tmp_path: Path) -> None:
    async with bench(tmp_path, slots=1, capacity=Capacity(2, 2**34, 1), gpus=1) as lab:
        lab.refuses = WorkerLost("no child started")
        lab.pool.grow("c1-g1")
        await eventually(lambda: lab.slots[-1].closed, 5)
        lab.refuses = None
        lab.pool.grow("c1-g1")
        await eventually(lambda: lab.slots[-1].ready and len(lab.slots) == 3, 5)
        assert lab.pool.width("c1-g1") == 1


async def test_a_class_that_gave_up_its_slots_gets_them_again(tmp_path: Path) -> None:
    async with bench(tmp_path, slots=2) as lab:
        lab.pool.grow("c2")
        await eventually(lambda: lab.pool.width("c2") == 1, 5)
        assert lab.pool.width("c1") == 0
        assert lab.pool.room("c1") == 2
        lab.pool.grow("c1")
        await eventually(lambda: lab.pool.width("c1") == 1, 5)
        assert lab.pool.width("c2") == 0


async def test_room_that_is_kept_for_one_class_is_not_taken_by_another(tmp_path: Path) -> None:
    async with bench(tmp_path, slots=1, capacity=Capacity(4, 2**34)) as lab:
        lab.pool.kept_for = "c4"
        lab.pool.grow("c1")
        assert lab.pool.room("c1") == 0
        lab.pool.grow("c4")
        await eventually(lambda: lab.pool.width("c4") == 1, 5)
        assert [slot.request.cpu for slot in lab.slots] == [1, 4]


async def test_what_an_aged_call_waits_for_is_all_that_others_leave_it(tmp_path: Path) -> None:
    capacity = Capacity(4, 2**34, 1)
    async with bench(tmp_path, slots=2, capacity=capacity, gpus=1) as lab:
        lab.pool.grow("c1-g1")
        await eventually(lambda: lab.pool.width("c1-g1") == 1, 5)
        lab.slots[-1].batches.append(_some_batch())
        lab.pool.kept_for = "c1-g1"
        assert lab.pool.left_by_the_aged("c1-g1of2") == 0
        # The call that has the GPU has a cpu too, and both come free together.
        assert lab.pool.left_by_the_aged("c1") == 3
        assert lab.pool.room("c1") == 2
        lab.pool.kept_for = "c4-g1"
        assert lab.pool.left_by_the_aged("c1") == 0
        assert lab.pool.room("c1") == 0
        assert not lab.pool.idle("c1")


async def test_room_for_two_is_not_kept_from_one_of_them(tmp_path: Path) -> None:
    async with bench(tmp_path, slots=4, capacity=Capacity(4, 2**34)) as lab:
        lab.pool.kept_for = "c2"
        assert lab.pool.room("c1") == 2
        assert len(lab.pool.idle("c1")) == 2
        lab.slots[0].batches.append(_some_batch())
        lab.slots[1].batches.append(_some_batch())
        assert lab.pool.room("c1") == 0
        lab.pool.grant("c2")
        assert lab.pool.kept_for is None
        assert lab.pool.room("c1") == 2


async def test_a_call_that_died_waiting_gives_its_cpu_back_only_once(tmp_path: Path) -> None:
    async with bench(tmp_path, slots=1, capacity=Capacity(1, 2**31)) as lab:
        first = lab.slots[0]
        first.ready = False
        lab.pool.set_waiting(first.pid, True)
        assert lab.pool.room("c1-m1") == 1
        group, first.pid = first.pid, 4711  # its child died, and another one took its place
        lab.pool.set_waiting(group, False)
        assert lab.pool.room("c1-m1") == 0


async def test_calls_that_keep_memory_use_up_no_extra_slots(tmp_path: Path) -> None:
    async with bench(tmp_path, slots=1, capacity=Capacity(1, 2**30)) as lab:
        lab.pool.grow("c1-m1")
        await eventually(lambda: lab.pool.width("c1-m1") == 1, 5)
        seat = lab.slots[-1]
        seat.batches.append(_some_batch())  # busy: no idle slot, and no memory for one more
        for _ in range(100):
            lab.pool.set_waiting(seat.pid, True)
            lab.pool.set_waiting(seat.pid, False)
        assert lab.pool._extra == 0
        seat.batches.clear()


_HALF, _QUARTER = "c1-g1of2", "c1-g1of4"


async def test_idle_shares_on_two_cards_make_way_for_a_whole_one(tmp_path: Path) -> None:
    async with bench(tmp_path, slots=0, capacity=Capacity(8, 2**34, 2), gpus=2) as lab:
        for number in range(3):
            lab.pool.grow(_HALF)
            await eventually(lambda n=number: lab.pool.width(_HALF) == n + 1, 5)
        lab.pool.grow("c1-g1")
        await eventually(lambda: lab.pool.width("c1-g1") == 1, 5)
        assert lab.pool.width(_HALF) == 2, "only the card with one share in use is emptied"


async def test_a_card_that_is_partly_in_use_counts_as_no_room(tmp_path: Path) -> None:
    async with bench(tmp_path, slots=0, capacity=Capacity(8, 2**34, 2), gpus=2) as lab:
        for number in range(3):
            lab.pool.grow(_HALF)
            await eventually(lambda n=number: lab.pool.width(_HALF) == n + 1, 5)
        for slot in (lab.slots[0], lab.slots[2]):  # one on each card
            slot.batches.append(_some_batch())
        assert lab.pool.room("c1-g1") == 0
        lab.pool.grow("c1-g1")
        assert lab.pool.width(_HALF) == 3
        for slot in lab.slots:
            slot.batches.clear()


class _Cards:
    """A pool of slots without processes that says when a card is lent twice."""

    def __init__(self, capacity: Capacity) -> None:
        self.slots: list[tuple[PlayedSlot, GpuShare | None]] = []
        self.gpus = GpuPool(int(capacity.gpu))
        self.pool = SlotPool(capacity, self.gpus, self._make)

    def _make(self, number: int, request: ResourceRequirement, gpus: GpuShare | None) -> Slot:
        slot = _SlowToLeave(number, request, Mock())
        self.slots.append((slot, gpus))
        used = Counter[str]()
        for lent in [share for slot, share in self.slots if share and not slot.closed]:
            used.update(dict.fromkeys(lent.ids, lent.amount))
        assert max(used.values(), default=0) <= 1
        return cast("Slot", slot)

    @property
    def open(self) -> list[PlayedSlot]:
        return [slot for slot, _ in self.slots if not slot.closed]

    async def grow(self, class_name: str) -> None:
        """Have one more slot, as ``room`` promised, or none."""
        promised = self.pool.room(class_name) > len(self.pool.idle(class_name))
        expected = self.pool.width(class_name) + promised
        busy = [slot for slot in self.open if slot.batches]
        self.pool.grow(class_name)
        await eventually(lambda: self.pool.width(class_name) == expected, 5, poll_s=0)
        assert not any(slot.closed for slot in busy)


class _SlowToLeave(PlayedSlot):
    async def close(self, *, grace_s: float) -> None:
        self.ready = False
        await asyncio.sleep(0)
        self.closed = True


_CLASSES = ["c1", "c2", _QUARTER, _HALF, "c1-g1", "c1-g2", "c1-m1-g1of2"]
_SHARES = st.lists(st.sampled_from([_QUARTER, _HALF]), max_size=8)
_TURNS = st.lists(
    st.tuples(st.sampled_from(["grow", "busy", "idle"]), st.integers(0, 20)), max_size=12
)


@given(st.integers(1, 3), st.integers(3, 9), _SHARES, _TURNS)
def test_room_is_never_promised_in_vain_and_no_card_lent_twice(
    gpus: int, cpu: int, shares: list[str], turns: list[tuple[str, int]]
) -> None:
    async def play() -> None:
        cards = _Cards(Capacity(cpu, 4 * 2**30, gpus))
        for share in shares:
            await cards.grow(share)
        for what, number in turns:
            if what == "grow":
                await cards.grow(_CLASSES[number % len(_CLASSES)])
            elif cards.open:
                batches = cards.open[number % len(cards.open)].batches
                batches.clear()
                batches.extend([_some_batch()] if what == "busy" else [])
        for slot in cards.open:
            slot.batches.clear()
        assert cards.pool.room("c1-g1") == gpus
        await cards.pool.close(0)

    asyncio.run(play())


async def test_a_slot_that_is_leaving_when_the_worker_ends_is_ended_too() -> None:
    cards = _Cards(Capacity(1, 2**30, 1))
    await cards.grow("c1")
    cards.pool.grow("c1-g1")
    await asyncio.sleep(0)  # the first one begins to leave
    await cards.pool.close(0)
    assert [slot.request.gpu for slot, _ in cards.slots] == [0]
    assert cards.open == []


def _some_batch() -> Batch:
    frame = frame_of([1])
    return Batch(frame.spec, "c0", frame.calls, None, object())


async def test_there_are_no_more_default_slots_than_were_asked_for(tmp_path: Path) -> None:
    async with bench(tmp_path, slots=1, capacity=Capacity(4, 2**34)) as lab:
        await lab.submit(frame_of(range(4)))
        await eventually(lambda: lab.slots[0].started == [0], 5)
        lab.pool.grow("c1")
        assert lab.pool.room("c1") == 0
        assert len(lab.slots) == 1
        lab.pool.grow("c2")
        await eventually(lambda: lab.pool.width("c2") == 1, 5)
