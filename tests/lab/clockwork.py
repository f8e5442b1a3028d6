"""Event loops that a test turns by hand, under one clock that only the test moves."""

from __future__ import annotations

import asyncio
import inspect
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["Clock", "Clockwork"]

T = TypeVar("T")

_ENOUGH_TURNS = 10_000


class Clock:
    """What several loops take for the time, in seconds."""

    def __init__(self) -> None:
        self.now = 0.0


class _NeverWaits(selectors.SelectSelector):
    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return super().select(0)


class Clockwork(asyncio.SelectorEventLoop):
    """A loop that stands still between two calls of ``turn``.

    Args:
        clock: Its time, which may be that of other loops too.
    """

    def __init__(self, clock: Clock) -> None:
        super().__init__(_NeverWaits())
        self._clock = clock

    def time(self) -> float:
        """What the test says."""
        return self._clock.now

    @property
    def wakes_at(self) -> float:
        """When it has something to do next; infinity if only another loop can wake it."""
        if self._ready:  # type: ignore[attr-defined]
            return self._clock.now
        timers = self._scheduled  # type: ignore[attr-defined]
        return min((t.when() for t in timers if not t.cancelled()), default=float("inf"))

    def turn(self) -> None:
        """Call back whatever is due at this moment, and nothing that comes of it."""
        self.call_soon(self.stop)
        self.run_forever()

    def settle(self) -> None:
        """Turn until nothing is due."""
        for _ in range(_ENOUGH_TURNS):
            if self.wakes_at > self._clock.now:
                return
            self.turn()
        raise AssertionError("the loop does not come to rest")

    def complete(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something that needs no time to its end."""
        task = self.create_task(work)
        self.settle()
        return task.result()

    def perish(self) -> None:
        """End in the middle of everything, as the loop of a killed process does."""
        for task in asyncio.all_tasks(self):
            task._log_destroy_pending = False  # type: ignore[attr-defined]  # it is meant to
            work = task.get_coro()
            if inspect.iscoroutine(work) and inspect.getcoroutinestate(work) == "CORO_CREATED":
                work.close()  # or Python would say that it was forgotten
        self.close()
