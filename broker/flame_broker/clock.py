"""Time that nobody can set, and a time of day that is not believed blindly."""

from __future__ import annotations

import time
from typing import Final

__all__ = ["Clock", "elapsed"]

# Linux counts the sleep of a laptop here, which its monotonic clock leaves out; macOS does in that.
_STEADY: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def elapsed() -> float:
    """Seconds since some moment in the past, for intervals: they hold when the clock is set."""
    return time.clock_gettime(_STEADY)


class Clock:
    """The time of day in seconds since 1970, for deadlines that other machines read.

    A clock that is set anew was wrong before, or is now: nobody here can tell. So there are two
    answers, by the clock and by what it said when this object was made, and who asks takes the one
    that ends no call too early. The later one stamps a deadline, and the earlier one judges it.
    """

    def __init__(self) -> None:
        self._made_at = time.time() - elapsed()

    def earliest(self) -> float:
        """The earlier of the two answers."""
        return min(time.time(), self._made_at + elapsed())

    def latest(self) -> float:
        """The later of the two answers."""
        return max(time.time(), self._made_at + elapsed())
