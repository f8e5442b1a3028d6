"""Calls that must not run beside others, and the door that keeps the others out meanwhile."""

from __future__ import annotations

import asyncio
from typing import Final

from flame_broker.messages import Suspicion
from flame_worker.holding import Holding

__all__ = ["ARMED_S", "Apart"]

ARMED_S: Final = 1.0
"""How long an empty worker stays so for a call that it has just announced to start alone."""


class Apart:
    """Sees that a call under suspicion and all others never run side by side (promise P5).

    Such a call comes as ``Suspicion.APART`` and waits until the worker is empty; nothing else
    starts meanwhile. Then it is published again as ``ALONE``, so that whoever finds its worker lost
    knows that nobody else was there, comes back as that, and starts.
    """

    def __init__(self) -> None:
        self._holding: Holding | None = None
        self._expected_until = 0.0
        self._announced: set[tuple[str, int]] = set()

    @property
    def closed(self) -> bool:
        """Whether the door is closed to all but one call."""
        return self._holding is not None or self._expected_until > _now()

    def admits(self, holding: Holding, *, in_use: bool) -> bool:
        """Whether a holding's calls may start, or be announced, beside what runs.

        While an announced call is expected, others that wait to be announced come before it; one
        that comes back unstarted was given to a busy worker, and is not sent round at once.
        """
        if in_use:
            return not self.closed
        if self._holding is not None:
            return holding is self._holding
        return not self.closed or (
            holding.frame.suspicion is Suspicion.APART and _call(holding) not in self._announced
        )

    def take(self, holding: Holding, *, in_use: bool) -> bool:
        """Take a call that must run apart; False if it was to start at once and cannot."""
        alone = holding.frame.suspicion is Suspicion.ALONE
        if alone and (in_use or self._holding is not None):
            return False
        if alone or not self.closed:
            self._holding, self._expected_until = holding, 0.0
        return True

    def announced(self, holding: Holding) -> None:
        """It is published as ``ALONE`` and about to come back."""
        if not self._expected_until > _now():
            self._announced.clear()
        self._announced.add(_call(holding))
        self._holding, self._expected_until = None, _now() + ARMED_S

    def left(self, holding: Holding) -> None:
        """A holding's calls do not wait here any more and do not run."""
        if holding is self._holding:
            self._holding = None

    def settled(self, *, in_use: bool) -> None:
        """Open the door if the call is over."""
        if self._holding is not None and not self._holding.waiting and not in_use:
            self._holding = None


def _call(holding: Holding) -> tuple[str, int]:
    """A suspect is alone in its frame."""
    return holding.frame.client, holding.frame.calls[0].counter


def _now() -> float:
    return asyncio.get_running_loop().time()
