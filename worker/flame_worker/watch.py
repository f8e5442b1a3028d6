"""Watching one child from outside: how long its call runs, and how much memory it uses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from flame_broker.messages import CallSpec, Target
from flame_worker.batches import SlotSettings
from flame_worker.limits import private_bytes, tree_bytes

__all__ = ["CallClock", "MemoryWatch"]

_LOAD_GRACE_S: Final = 60.0
"""A target's first call also imports it: that is no part of its timeout."""
_BUSY_EVERY_S: Final = 0.5
_IDLE_EVERY_S: Final = 5.0
_MEASURE_EVERY_S: Final = 1.0


class CallClock:
    """Since when the call that runs has been running, and when it must have ended.

    What lies behind the call that runs has its own limit when its turn comes: ``follow`` is to be
    told of every change.

    Args:
        on_due: Called when the call that runs may be over its limit. Its end may not be known
            yet, so look first.
    """

    def __init__(self, on_due: Callable[[], None]) -> None:
        self._on_due = on_due
        self._since = 0.0
        self._loaded: set[Target] = set()
        self._timer: asyncio.TimerHandle | None = None

    def reset(self) -> None:
        """Forget the child; the next one has loaded nothing and runs nothing."""
        self._loaded.clear()
        self.follow(None)

    def sign_of_life(self, now: float) -> None:
        """The child began or ended something."""
        self._since = now

    def loaded(self, target: Target, now: float) -> None:
        """The child has imported a target; only now its call begins."""
        self._loaded.add(target)
        self._since = now

    def due(self, spec: CallSpec) -> float:
        """When the call that runs must have ended, if it is of this kind."""
        grace_s = spec.grace_s if spec.target in self._loaded else spec.grace_s + _LOAD_GRACE_S
        return self._since + spec.timeout_s + grace_s

    def follow(self, spec: CallSpec | None) -> None:
        """Watch over the call that runs now; None if nothing runs.

        A look that comes too early costs little and sets the next one, so a timer is replaced
        only by an earlier one: signs of life come for every call, and put the end off.
        """
        due = None if spec is None or not spec.timeout_s else self.due(spec)
        timer = self._timer
        if timer is not None:
            if due is not None and timer.when() <= due:
                return
            timer.cancel()
            self._timer = None
        if due is not None:
            self._timer = asyncio.get_running_loop().call_at(due, self._look)

    def _look(self) -> None:
        self._timer = None
        self._on_due()


class MemoryWatch:
    """Compares the memory of a child and its sub-processes with the limit, from time to time.

    Args:
        settings: With the limits.
        pid: Of the child; None while there is none.
        busy: Whether it runs calls.
        on_excess: Called when the limit is exceeded.
    """

    def __init__(
        self,
        settings: SlotSettings,
        pid: Callable[[], int | None],
        busy: Callable[[], bool],
        on_excess: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._pid, self._busy, self._on_excess = pid, busy, on_excess
        self._timer: asyncio.TimerHandle | None = None
        self._measured_at = 0.0

    def start(self) -> None:
        """Watch from now on, if there is a limit."""
        if self._settings.memory_bytes and self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(_BUSY_EVERY_S, self._look)

    def stop(self) -> None:
        """Watch no more."""
        if self._timer is not None:
            self._timer.cancel()

    def is_grown(self, now: float) -> bool:
        """Whether the child, between two batches, holds more than it may keep."""
        limit, pid = self._settings.recycle_over_bytes, self._pid()
        if not limit or pid is None or now - self._measured_at < _MEASURE_EVERY_S:
            return False
        self._measured_at = now
        return private_bytes(pid) > limit

    def _look(self) -> None:
        pid = self._pid()
        if pid is not None and tree_bytes(pid) > self._settings.memory_bytes:
            self._on_excess()
        wait_s = _BUSY_EVERY_S if self._busy() else _IDLE_EVERY_S
        self._timer = asyncio.get_running_loop().call_later(wait_s, self._look)
