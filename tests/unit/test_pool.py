"""Slots come and go within the capacity, and give everything back."""

from __future__ import annotations

from pathlib import Path

from flame_broker.errors import WorkerLost
from flame_broker.resources import Capacity
from flame_worker.batches import Batch
from lab.bench import bench, frame_of
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
        lab.pool.reserved_class = "c4"
        lab.pool.grow("c1")
        assert lab.pool.room("c1") == 0
        lab.pool.grow("c4")
        await eventually(lambda: lab.pool.width("c4") == 1, 5)
        assert [slot.request.cpu for slot in lab.slots] == [1, 4]


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
        batch = Batch(frame_of([1]).spec, "c0", frame_of([1]).calls, None, object())
        seat.batches.append(batch)  # busy: no idle slot, and no memory for one more
        for _ in range(100):
            lab.pool.set_waiting(seat.pid, True)
            lab.pool.set_waiting(seat.pid, False)
        assert lab.pool._extra == 0
        seat.batches.clear()
