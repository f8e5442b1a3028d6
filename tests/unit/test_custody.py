"""Every frame that comes in leaves once: as results, handed back, or set aside."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from flame_broker.codec import encode_value
from flame_broker.errors import CallCancelled
from flame_broker.messages import Call, CallFrame, Result, Status, Target
from flame_broker.objects import ObjectRef
from flame_broker.outcomes import decode_failure
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
        lab.intake.full("c1")
        await lab.submit(*suspects)
        await eventually(lambda: any(slot.started for slot in lab.slots), 5)
        for _ in range(5):
            lab.intake.full("c1")
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


async def test_a_stream_is_not_settled_before_its_large_items_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path) as lab:
        await lab.submit(frame_of([1]))
        await eventually(lambda: lab.slots[0].started == [1], 5)
        gate, put = threading.Event(), lab.store.put_file

        def slow(*args: Any, **kwargs: Any) -> Any:
            gate.wait(5)
            return put(*args, **kwargs)

        monkeypatch.setattr(lab.store, "put_file", slow)
        lab.slots[0].say(lab.spooled(1, b"x" * 100_000, Status.ITEM))
        lab.slots[0].finish(result=Result(1, Status.OK, encode_value(None).join(), None, 1))
        await eventually(lambda: len(lab.finals) == 1, 5)
        assert lab.intake.held == 1
        gate.set()
        await lab.settled(1)
        assert [result.status for result in lab.results] == [Status.OK, Status.ITEM]


async def test_an_item_that_cannot_be_stored_does_not_settle_its_call_twice(
    tmp_path: Path,
) -> None:
    async with bench(tmp_path) as lab:
        await lab.submit(frame_of([1, 2]))
        await eventually(lambda: lab.slots[0].started == [1], 5)
        lost = lab.spooled(1, b"x" * 100_000, Status.ITEM)
        lost.path.unlink()
        lab.slots[0].say(lost)
        await eventually(lambda: len(lab.finals) == 1, 5)
        lab.slots[0].finish(result=Result(1, Status.OK, encode_value(None).join(), None, 1))
        await eventually(lambda: len(lab.finals) == 2, 5)
        assert lab.intake.held == 1
        lab.slots[0].finish()
        await lab.settled(3)


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
