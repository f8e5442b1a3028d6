"""The clock of the schedules: calls are made a little early, and only while we lead."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from flame_orchestrator.custody import Fenced
from flame_orchestrator.scheduler import Scheduler
from flame_orchestrator.schedules import Fired
from lab.wait import eventually


class Clockwork:
    """A scheduler with schedules that note when they are asked; the test sets the clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.due_at = 1000.0, 1010.0
        self.epoch: int | None = 1
        self.asked: list[float] = []
        self.faults: list[Exception] = []
        self.fenced: list[str] = []
        self.told = 0
        monkeypatch.setattr("flame_orchestrator.scheduler.time", lambda: self.now)
        self.scheduler = Scheduler(
            self,  # type: ignore[arg-type]  # it has what is needed
            self._in_thread,
            lambda: self.epoch,
            self.fenced.append,
            self._tell,
        )

    def fire(self, epoch: int, now: float, until: float) -> Fired:
        self.asked.append(until)
        if self.faults:
            raise self.faults.pop()
        calls = int(until >= self.due_at)
        self.due_at += 10.0 * calls
        return Fired(calls, self.due_at)

    def _tell(self) -> None:
        self.told += 1

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        return work()


@pytest.fixture
def works(monkeypatch: pytest.MonkeyPatch) -> Clockwork:
    return Clockwork(monkeypatch)


@asynccontextmanager
async def running(works: Clockwork) -> AsyncIterator[None]:
    task = asyncio.ensure_future(works.scheduler.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def asked(works: Clockwork, times: int) -> None:
    await eventually(lambda: len(works.asked) >= times)


async def test_calls_are_made_half_a_second_early_and_custody_hears_of_them(
    works: Clockwork,
) -> None:
    async with running(works):
        await asked(works, 1)
        assert (works.asked, works.told) == ([1000.5], 0)
        works.now = 1009.5
        works.scheduler.look()
        await eventually(lambda: works.told)
        assert works.asked[1] == 1010.0


async def test_who_does_not_lead_asks_for_nothing_until_it_does(works: Clockwork) -> None:
    works.epoch = None
    async with running(works):
        works.scheduler.look()
        await eventually(lambda: not works.scheduler._news.is_set())
        assert works.asked == []
        works.epoch = 2
        works.scheduler.look()
        await asked(works, 1)


async def test_a_database_that_refuses_is_asked_again_and_a_fence_is_told_of(
    works: Clockwork,
) -> None:
    works.faults = [Fenced("epoch 1 is over"), OperationalError("locked", {}, OSError("locked"))]
    async with running(works):
        await eventually(lambda: works.fenced == ["epoch 1 is over"])
        assert len(works.asked) == 2
