"""Every frame that comes in leaves once: as results, handed back, or set aside."""

from __future__ import annotations

import shutil
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from flame_broker.codec import encode_value
from flame_broker.errors import CallCancelled, StoreError, WorkerLost
from flame_broker.messages import Call, CallFrame, Result, Status, Target
from flame_broker.objects import ObjectRef
from flame_broker.outcomes import decode_failure
from flame_broker.transport import QueueSpec
from flame_worker.batches import Lost, SpooledResult
from lab.bench import DEAD, SUSPECTS, Bench, bench, frame_of
from lab.wait import eventually


class Gate:
    """Holds the store's downloads up until it is opened."""

    def __init__(self, lab: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        fetch = lab.store.get_file

        def slow(*args: Any, **kwargs: Any) -> Any:
            self.open.wait(5)
            return fetch(*args, **kwargs)

        monkeypatch.setattr(lab.store, "get_file", slow)


def with_object(lab: Bench, counters: Iterable[int]) -> CallFrame:
    """A frame whose calls need something from the store."""
    content = encode_value(((),)).join()
    digest = sha256(content).hexdigest()
    lab.store.put(f"objects/{digest}", content)
    ref = ObjectRef(f"objects/{digest}", len(content), digest)
    return frame_of(counters, calls=tuple(Call(counter, b"", (ref,)) for counter in counters))


async def test_a_call_that_is_cancelled_while_its_arguments_arrive_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path) as lab:
        gate = Gate(lab, monkeypatch)
        await lab.submit(with_object(lab, [1]))
        await eventually(lambda: lab.intake.held, 5)
        lab.intake.cancel("c0", frozenset([1]), spare_running=False)
        gate.open.set()
        await lab.settled(1)
        assert isinstance(decode_failure(lab.finals[0].payload, ""), CallCancelled)
        assert lab.slots[0].started == []


async def test_a_target_that_somebody_cleared_from_the_cache_is_fetched_again(
    tmp_path: Path,
) -> None:
    async with bench(tmp_path) as lab:
        content = encode_value(len).join()
        target = Target("len", sha256(content).hexdigest(), len(content))
        lab.store.put(f"targets/{target.sha256}", content)
        frame = frame_of([1])
        frame = replace(frame, spec=replace(frame.spec, target=target))
        for number in (1, 2):
            await lab.submit(replace(frame, calls=tuple(frame_of([number]).calls)))
            await eventually(lambda: lab.slots[0].batches, 5)
            path = lab.slots[0].batches[0].target_path
            assert path is not None
            assert path.read_bytes() == content
            lab.slots[0].finish()
            await lab.settled(number)
            shutil.rmtree(tmp_path / "cache")


async def test_a_call_whose_arguments_arrive_during_a_drain_is_handed_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path) as lab:
        gate = Gate(lab, monkeypatch)
        frame = with_object(lab, [1])
        await lab.submit(frame)
        await eventually(lambda: lab.intake.held, 5)
        await lab.intake.close()
        lab.dispatcher.hand_back_all()
        gate.open.set()
        await eventually(lambda: not lab.intake.held, 5)
        assert lab.slots[0].started == []
        assert await lab.depth(frame.queue) == 1


async def test_suspects_are_taken_one_at_a_time_even_when_the_class_was_full(
    tmp_path: Path,
) -> None:
    async with bench(tmp_path, slots=3) as lab:
        suspects = [frame_of([n], queue=SUSPECTS) for n in (1, 2)]
        lab.intake.full("c1", "")
        await lab.submit(*suspects)
        await eventually(lambda: any(slot.started for slot in lab.slots), 5)
        for _ in range(5):
            lab.intake.full("c1", "")
            lab.intake.widen()
            await eventually(lambda: lab.intake._refilling is None, 5)
        assert await lab.depth(SUSPECTS) == 1
        next(slot for slot in lab.slots if slot.started).finish()
        await eventually(lambda: sum(len(slot.started) for slot in lab.slots) == 2, 5)
        next(slot for slot in lab.slots if slot.batches).finish()
        await lab.settled(2)


async def test_a_twin_that_is_delivered_to_another_consumer_frees_it_too(tmp_path: Path) -> None:
    async with bench(tmp_path, slots=2) as lab:
        frame = frame_of([1])
        await lab.submit(frame)
        await eventually(lambda: lab.intake.held, 5)
        await lab.submit(frame)
        draws = lab.intake._taps["c1"][2].draws
        await eventually(lambda: sum(draw.held for draw in draws) == 2, 5)
        next(slot for slot in lab.slots if slot.batches).finish()
        await lab.settled(1)
        assert not any(draw.held for draw in draws)
        assert len(lab.finals) == 1


async def test_a_suspect_of_a_class_that_does_not_fit_goes_round_calmly(tmp_path: Path) -> None:
    async with bench(tmp_path) as lab:
        await lab.submit(frame_of([1], queue=SUSPECTS, resources="c64"))
        await eventually(lambda: lab.dispatcher.waits("c64"), 5)
        await lab.submit(frame_of([2]))
        await eventually(lambda: lab.slots[0].started == [2], 5)
        lab.slots[0].finish()
        await eventually(lambda: len(lab.finals) == 1, 5)
        assert lab.intake.counts["frames"] == 2


class SlowStore:
    """Holds up each upload until the test lets it go, or fails it."""

    def __init__(self, lab: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        self._lab = lab
        self._gates: defaultdict[str, threading.Event] = defaultdict(threading.Event)
        self._faults: set[str] = set()
        self._put = lab.store.put_file
        monkeypatch.setattr(lab.store, "put_file", self._put_file)

    def _put_file(self, key: str, *args: Any, **kwargs: Any) -> Any:
        self._gates[key].wait(5)
        if key in self._faults:
            raise StoreError("the disk is full")
        return self._put(key, *args, **kwargs)

    def store(self, large: SpooledResult) -> None:
        """Let an upload go on."""
        self._gates[f"objects/{large.sha256}"].set()

    def fail(self, large: SpooledResult) -> None:
        """Let an upload fail."""
        self._faults.add(f"objects/{large.sha256}")
        self.store(large)

    async def stored(self, large: SpooledResult) -> None:
        """Let an upload go on and wait until the worker has seen the end of it."""
        self.store(large)
        await eventually(lambda: not large.path.exists(), 5)


def small(counter: int, index: int) -> Result:
    return Result(counter, Status.ITEM, encode_value(index).join(), None, index)


def end(counter: int, items: int) -> Result:
    return Result(counter, Status.OK, encode_value(None).join(), None, items)


def order(lab: Bench) -> list[tuple[int, Status, int]]:
    return [(result.counter, result.status, result.index) for result in lab.results]


async def test_a_stream_leaves_in_its_order_however_long_the_store_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path) as lab:
        store = SlowStore(lab, monkeypatch)
        await lab.submit(frame_of([1, 2]))
        await eventually(lambda: lab.slots[0].started == [1], 5)
        first, last = (lab.spooled(1, b"x" * (100_000 + n), Status.ITEM, n) for n in (0, 2))
        lab.slots[0].say(first, small(1, 1), last)
        lab.slots[0].finish(result=end(1, 3))
        lab.slots[0].finish()
        await eventually(lambda: lab.results, 5)
        assert order(lab) == [(2, Status.OK, 0)]  # a neighbour does not wait
        await store.stored(last)
        assert len(lab.results) == 1
        store.store(first)
        await lab.settled(2)
        items = [(1, Status.ITEM, n) for n in range(3)]
        assert order(lab)[1:] == [*items, (1, Status.OK, 3)]


async def test_items_before_a_large_one_leave_at_once_and_those_after_it_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path) as lab:
        store = SlowStore(lab, monkeypatch)
        await lab.submit(frame_of([1]))
        await eventually(lambda: lab.slots[0].started == [1], 5)
        large = lab.spooled(1, b"x" * 100_000, Status.ITEM, 1)
        lab.slots[0].say(small(1, 0), large)
        await eventually(lambda: len(lab.results) == 1, 5)
        store.store(large)
        await eventually(lambda: len(lab.results) == 2, 5)
        lab.slots[0].say(small(1, 2))
        await eventually(lambda: len(lab.results) == 3, 5)
        lab.slots[0].finish(result=end(1, 3))
        await lab.settled(1)
        assert [index for _, _, index in order(lab)] == [0, 1, 2, 3]


async def test_a_large_item_that_cannot_be_stored_fails_its_call_and_ends_its_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path) as lab:
        store = SlowStore(lab, monkeypatch)
        await lab.submit(frame_of([1]))
        await eventually(lambda: lab.slots[0].started == [1], 5)
        first, lost, late, later = (
            lab.spooled(1, b"x" * (100_000 + n), Status.ITEM, n) for n in range(4)
        )
        lab.slots[0].say(first, lost, late)
        store.fail(lost)
        await store.stored(late)
        assert lab.results == []
        store.store(first)
        await lab.settled(1)
        lab.slots[0].say(small(1, 3), later)
        lab.slots[0].finish(result=end(1, 5))
        await lab.submit(frame_of([2]))
        await eventually(lambda: lab.slots[0].started == [1, 2], 5)
        lab.slots[0].finish()
        await lab.settled(2)
        assert order(lab) == [(1, Status.ITEM, 0), (1, Status.FAILED, 1), (2, Status.OK, 0)]
        failure = decode_failure(lab.results[1].payload, "")
        assert isinstance(failure, StoreError)
        assert "the disk is full" in str(failure)
        assert not later.path.exists()


async def test_the_items_of_a_call_whose_child_dies_leave_before_its_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path) as lab:
        store = SlowStore(lab, monkeypatch)
        await lab.submit(frame_of([1]))
        await eventually(lambda: lab.slots[0].started == [1], 5)
        large = lab.spooled(1, b"x" * 100_000, Status.ITEM)
        lab.slots[0].say(large)
        running = lab.slots[0].batches[0], 1
        lab.slots[0].lose(Lost(WorkerLost, "killed", running, [], []))
        store.store(large)
        await lab.settled(1)
        assert order(lab) == [(1, Status.ITEM, 0), (1, Status.FAILED, 0)]


async def test_a_frame_is_held_until_every_item_of_its_streams_has_arrived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path) as lab:
        again: list[Callable[[], None]] = []
        monkeypatch.setattr(lab.outbox, "_later", lambda _, retry, *__, **___: again.append(retry))
        frame = frame_of([1], reply="replies")  # a client that makes its queue anew meanwhile
        await lab.submit(frame)
        await eventually(lambda: lab.slots[0].started == [1], 5)
        lab.slots[0].say(small(1, 0))
        await eventually(lambda: again, 5)
        await lab.broker.declare(QueueSpec(frame.reply))
        await lab.broker.consume(frame.reply, lab.on_reply, prefetch=0)
        lab.slots[0].finish(result=end(1, 1))
        await eventually(lambda: lab.finals and not lab.outbox._in_flight, 5)
        assert lab.intake.held == 1
        again[0]()
        await lab.settled(1)
        assert order(lab) == [(1, Status.OK, 1), (1, Status.ITEM, 0)]


async def test_what_cannot_be_set_aside_at_once_is_set_aside_when_its_queue_is_back(
    tmp_path: Path,
) -> None:
    async with bench(tmp_path) as lab:
        await lab.broker.delete(DEAD)
        await lab.broker.publish(frame_of([1]).queue, b"no frame")
        await eventually(lambda: lab.depth(DEAD), 5)
        await lab.submit(frame_of([2]))
        await eventually(lambda: lab.slots[0].started == [2], 5)
        lab.slots[0].finish()
        await lab.settled(1)
