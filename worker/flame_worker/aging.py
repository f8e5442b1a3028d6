"""Which class of calls room is kept for: the one that has waited longest with none of it started.

A large call needs several slots free at once, which among endless small ones never happens by
itself; small ones can wait as long behind large ones (PROTOCOL.md, rule 14).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

__all__ = ["AGED_S", "Aging"]

AGED_S: Final = 5.0
"""Room is kept for calls that have waited so long."""


class _Wait(NamedTuple):
    """Since when calls of a class wait; ``started`` tells whether one has started meanwhile."""

    since: float
    started: int


class Aging:
    """Notes, look by look, how long calls of each class have waited while none started."""

    def __init__(self) -> None:
        self._waits: dict[str, _Wait] = {}

    def look(self, waiting: Mapping[str, int], now: float) -> str | None:
        """The class to keep room for, if calls of one have waited long enough.

        A free slot at the moment of a look says nothing: small calls may have it in the next.

        Args:
            waiting: The classes that calls wait of, and how many of each have started so far.
            now: The monotonic clock, in seconds.
        """
        self._waits = {
            name: known
            if (known := self._waits.get(name)) is not None and known.started == started
            else _Wait(now, started)
            for name, started in waiting.items()
        }
        oldest = min(self._waits, key=lambda name: self._waits[name].since, default=None)
        if oldest is None or now - self._waits[oldest].since <= AGED_S:
            return None
        return oldest
