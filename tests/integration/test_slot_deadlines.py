"""What a slot does later it does to the call that it was meant for: hard timeouts and cancels."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from flame_broker.errors import CallCancelled, CallTimeout, WorkerLost
from lab.slots import SlotLab, slot_lab
from lab.wait import eventually


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[SlotLab]:
    async with slot_lab(tmp_path, grace_s=0.2) as lab:
        yield lab


def hold(path: str) -> str:
    """Runs until the file is gone; says that it has started."""
    Path(path).with_suffix(".started").touch()
    while Path(path).exists():
        time.sleep(0.005)
    return "released"


def stubborn(seconds: float) -> None:
    """Runs for so long, whatever is raised in it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            time.sleep(max(0.0, end - time.monotonic()))
        except CallTimeout:
            continue


async def test_a_long_timeout_that_is_over_does_not_put_off_a_short_one(lab: SlotLab) -> None:
    assert await lab.call(stubborn, 0, timeout_s=3600) is None
    batch = lab.give(stubborn, (20,), timeout_s=0.1, grace_s=0.1)
    await lab.until_ended(batch)
    (lost,) = lab.lost
    assert lost.reason is CallTimeout
    assert lost.running == (batch, batch.calls[0].counter)


async def test_a_short_timeout_holds_behind_a_long_one(lab: SlotLab, tmp_path: Path) -> None:
    assert await lab.call(stubborn, 0) is None
    gate = tmp_path / "gate"
    gate.touch()
    before = lab.give(hold, (str(gate),), timeout_s=3600)
    batch = lab.give(stubborn, (20,), timeout_s=0.1, grace_s=0.1)
    await eventually(gate.with_suffix(".started").exists, poll_s=0.005)
    gate.unlink()
    await lab.until_ended(before, batch)
    (lost,) = lab.lost
    assert lost.reason is CallTimeout
    assert lost.running == (batch, batch.calls[0].counter)


async def test_a_short_timeout_holds_in_the_next_child_too(lab: SlotLab) -> None:
    await lab.until_ended(lab.give("os:_exit", (3,), timeout_s=3600))
    assert await lab.call(stubborn, 0, timeout_s=3600) is None
    await lab.until_ended(lab.give(stubborn, (20,), timeout_s=0.1, grace_s=0.1))
    assert [lost.reason for lost in lab.lost] == [WorkerLost, CallTimeout]


async def test_a_cancel_of_a_dead_childs_call_spares_its_successors(
    lab: SlotLab, tmp_path: Path
) -> None:
    def leave_when_cancelled(path: str) -> None:
        try:
            hold(path)
        except CallCancelled:
            os._exit(3)

    gate = tmp_path / "gate"
    gate.touch()
    batch = lab.give(leave_when_cancelled, (str(gate),))
    await eventually(gate.with_suffix(".started").exists, poll_s=0.005)
    assert lab.slot.cancel("client", batch.calls[0].counter)
    await lab.until_ended(batch)
    innocent = lab.give(time.sleep, (0.5,))  # longer than the grace of the cancel
    await lab.until_ended(innocent)
    assert innocent.calls[0].counter in lab.results
    assert len(lab.lost) == 1


class HeldUp:
    """Its unpickling lasts until a file is gone."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return hold, (self._path,)


async def test_a_cancel_while_the_target_is_loaded_stops_the_call(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    gate.touch()
    marker = HeldUp(str(gate))

    def slow_to_load() -> object:
        time.sleep(30)
        return marker

    async with slot_lab(tmp_path) as lab:
        batch = lab.give(slow_to_load, ())
        await eventually(gate.with_suffix(".started").exists, poll_s=0.005)
        assert lab.slot.cancel("client", batch.calls[0].counter)
        gate.unlink()
        await lab.until_ended(batch)
        assert isinstance(lab.outcome(batch.calls[0].counter), CallCancelled)
        assert not lab.lost
