"""Looks at the clock for schedules, while we lead.

Their calls are made half a second early and wait in custody, so that they start in time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from time import time
from typing import Final

from sqlalchemy.exc import SQLAlchemyError

from flame_broker.backoff import Backoff
from flame_broker.errors import FlameError
from flame_broker.logs import get_logger
from flame_orchestrator.custody import Fenced
from flame_orchestrator.database import in_words
from flame_orchestrator.schedules import Schedules
from flame_orchestrator.timekeeper import InThread

__all__ = ["Scheduler"]

_log = get_logger("flame.orchestrator")

_AHEAD_S: Final = 0.5
_LOOK_EVERY_S: Final = 5.0
"""A clock that jumps, or another process that writes, must not leave us asleep."""


class Scheduler:
    """Makes the calls of the schedules of one cluster key when they are due.

    Args:
        schedules: Knows them.
        in_thread: Where that blocks.
        epoch: Ours; None while another one leads.
        fenced: Told that another one does.
        fired: Told that calls wait in custody.
    """

    def __init__(
        self,
        schedules: Schedules,
        in_thread: InThread,
        epoch: Callable[[], int | None],
        fenced: Callable[[str], None],
        fired: Callable[[], None],
    ) -> None:
        self._schedules = schedules
        self._in_thread = in_thread
        self._epoch = epoch
        self._fenced = fenced
        self._fired = fired
        self._news = asyncio.Event()

    def look(self) -> None:
        """Something has changed: what is due now may be another."""
        self._news.set()

    async def run(self) -> None:
        """Fire when it is time; for ever."""
        backoff = Backoff()
        while True:
            self._news.clear()
            try:
                pause_s = await self._fire()
            except Fenced as news:
                self._fenced(str(news))
                pause_s = _LOOK_EVERY_S
            except (SQLAlchemyError, FlameError) as problem:
                _log.warning("schedules.not_fired", reason=in_words(problem))
                pause_s = backoff.next_s()
            else:
                backoff.reset()
            await self._until_news(pause_s)

    async def _fire(self) -> float:
        """Seconds until it may be time again."""
        epoch = self._epoch()
        if epoch is None:
            return _LOOK_EVERY_S
        now = time()
        fired = await self._in_thread(partial(self._schedules.fire, epoch, now, now + _AHEAD_S))
        if fired.calls:
            self._fired()
        next_s = _LOOK_EVERY_S if fired.next_at is None else fired.next_at - _AHEAD_S - time()
        return min(max(next_s, 0.0), _LOOK_EVERY_S)

    async def _until_news(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
        except TimeoutError:
            return
