"""How many calls of one client are on their way at once (PROTOCOL.md, rule 14).

Published calls stand in the queue before everybody else's, so a client with a million calls
publishes only what keeps the workers busy, and another user's single call waits about a second, not
hours. What keeps them busy is learned:

- About half a second's worth of results, by the rate at which they come.
- More, if the queue is found empty while calls are held back here: a large fleet, long calls.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from time import monotonic
from typing import Final

from flame_broker.messages import FRAME_CALLS

__all__ = ["Gate", "Window"]

FIRST_CALLS: Final = 512
LEAST_CALLS: Final = 64
MOST_CALLS: Final = 64 * 1024

_SPAN_S: Final = 0.5
_MEASURE_S: Final = 0.1


@dataclass(slots=True)
class Gate:
    """A limit on how many calls of some lanes are on their way at once."""

    limit: int
    inside: int = 0

    @property
    def room(self) -> int:
        """How many more may go."""
        return self.limit - self.inside


@dataclass(slots=True)
class Window(Gate):
    """A gate whose limit follows what the workers get done.

    Attributes:
        floor: The least limit; raised when the queue runs dry.
    """

    limit: int = FIRST_CALLS
    floor: int = LEAST_CALLS
    _results: int = 0
    _since: float = field(default_factory=monotonic)

    def settled(self, results: int, now: float) -> None:
        """Note that so many calls have their outcome.

        Within a tenth of a second the limit grows by what came, so it doubles with each round
        trip, as TCP's slow start does (RFC 5681, 3.1); then the measured rate decides.
        """
        limited = self.room < FRAME_CALLS
        self.inside -= results
        self._results += results
        elapsed = now - self._since
        if elapsed >= _MEASURE_S:
            wanted = int(self._results / elapsed * _SPAN_S)
            # Halved at most: a pause between two bursts says nothing about the workers.
            self.limit = _clamp(max(wanted, self.floor, self.limit // 2))
            self._results, self._since = 0, now
        elif limited:
            self.limit = _clamp(self.limit + results)

    def starved(self) -> None:
        """The queue is empty while calls are held back here: let twice as many go."""
        self.floor = _clamp(self.floor * 2)
        self.limit = max(self.limit, self.floor)


def _clamp(calls: int) -> int:
    return min(max(calls, LEAST_CALLS), MOST_CALLS)
