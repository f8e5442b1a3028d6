"""Children are replaced by count and by memory, and no call is lost on the way."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flame_worker import process
from flame_worker.batches import Batch
from flame_worker.slots import Slot
from lab.slots import SlotLab, slot_lab
from lab.wait import eventually


def process_id() -> int:
    return os.getpid()


class Eager(SlotLab):
    """Does something when the first batch is done."""

    then: Callable[[], object] | None = None

    def on_done(self, slot: Slot, batch: Batch, seconds: float) -> None:
        """Also do it."""
        super().on_done(slot, batch, seconds)
        then, self.then = self.then, None
        if then is not None:
            then()


async def test_calls_given_after_a_revocation_reach_the_successor(tmp_path: Path) -> None:
    lab = Eager(tmp_path, recycle_after_calls=1, grace_s=0.2)
    await lab.slot.start()
    old = lab.slot.pid
    assert old is not None
    waiting: list[Batch] = []

    def give_more_to_a_child_that_does_not_start_it() -> None:
        os.kill(old, signal.SIGSTOP)
        waiting.append(lab.give(process_id, ()))

    lab.then = give_more_to_a_child_that_does_not_start_it
    await lab.until_ended(lab.give(process_id, ()))
    await eventually(lambda: lab.children == 2, 10)  # the successor waits for the old child's call
    assert [batch for batch, _ in lab.slot.revoke()] == waiting
    assert await lab.call(process_id) not in (None, old)
    await lab.slot.close(grace_s=5)
    assert not lab.lost


async def test_a_child_gives_its_gpus_back_before_its_successor_works(tmp_path: Path) -> None:
    def linger() -> int:
        threading.Thread(target=time.sleep, args=(0.5,)).start()
        return os.getpid()

    def is_there(pid: int) -> bool:
        return Path(f"/proc/{pid}").exists()

    async with slot_lab(tmp_path, gpus=("GPU-a",), recycle_after_calls=1) as lab:
        old = await lab.call(linger)
        assert await lab.call(is_there, old) is False
        assert not lab.lost


async def test_a_successor_that_cannot_be_started_now_comes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = iter([OSError("no more processes")])
    spawn = process._spawn

    def refuse_once(*args: object) -> object:
        for refusal in refusals:
            raise refusal
        return spawn(*args)  # type: ignore[arg-type]

    async with slot_lab(tmp_path, recycle_after_calls=1) as lab:
        monkeypatch.setattr(process, "_spawn", refuse_once)
        first = await lab.call(process_id)
        assert await lab.call(process_id) not in (None, first)
        assert not lab.lost


async def test_a_slot_that_closes_while_its_child_is_replaced_ends_them_all(
    tmp_path: Path,
) -> None:
    lab = SlotLab(tmp_path, recycle_after_calls=1)
    await lab.slot.start()
    old = lab.slot.pid
    await lab.until_ended(lab.give(process_id, ()))
    given = lab.give(process_id, ())  # waits for the successor, which does not come any more
    await lab.slot.close(grace_s=5)
    assert given in lab.ended
    assert not Path(f"/proc/{old}").exists()
