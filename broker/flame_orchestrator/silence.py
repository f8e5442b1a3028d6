"""How long nothing was heard of the runs that have leases, and which go on for too long."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from flame_broker.clock import elapsed
from flame_orchestrator.custody import Run

__all__ = ["ECHO_EVERY_S", "OVERRUN_S", "Silence"]

ECHO_EVERY_S: Final = 1.0
OVERRUN_S: Final = 90.0
"""So long after its limit a run is ended here, whose worker should have ended it.

A worker gives a target a minute to load, which is no part of the limit. The rest is for the way of
what its call came to.
"""
_GAP_S: Final = 3.0


class Silence:
    """Tells which runs are lost: silent for a whole lease while heartbeats did arrive.

    A broker with an alarm takes no heartbeats (19 s of it silenced healthy workers), and whoever
    was stopped for a while has heard none. So the orchestrator sends heartbeats too, and listens
    for its own: where these are missing, the silence of others says nothing, and when they are
    back every lease begins anew (PROTOCOL.md, rule 6).

    Args:
        lease_s: How long a run may be silent.
        clock: Seconds since some moment, never set back; of the computer by default.
    """

    def __init__(self, lease_s: float, clock: Callable[[], float] = elapsed) -> None:
        self.lease_s = lease_s
        self._clock = clock
        self._runs: dict[str, Run] = {}
        self._heard_at: dict[str, float] = {}
        self._due_at: dict[str, float] = {}
        self._echo_at = float("-inf")
        self._fresh_since = clock()

    def start_anew(self, runs: Iterable[Run]) -> None:
        """We lead from now on, and these are the runs with leases."""
        self.forget_all()
        for run in runs:
            self.add(run)

    def forget_all(self) -> None:
        """Another one leads."""
        self._runs.clear()
        self._heard_at.clear()
        self._due_at.clear()

    def add(self, run: Run) -> None:
        """A run has got a lease."""
        known = self._runs.get(run.run)
        if known is not None:
            run = run._replace(counters=run.counters | known.counters)
        self._runs[run.run] = run
        now = self._heard_at[run.run] = self._clock()
        if run.limit_s:
            self._due_at.setdefault(run.run, now + run.limit_s + OVERRUN_S)

    def forget(self, run: str) -> None:
        """A run has no lease any more."""
        self._runs.pop(run, None)
        self._heard_at.pop(run, None)
        self._due_at.pop(run, None)

    def beat(self, runs: Iterable[str]) -> list[str]:
        """A worker says that these go on; those of them that have no lease."""
        now, unknown = self._clock(), list[str]()
        for run in runs:
            if run in self._runs:
                self._heard_at[run] = now
            else:
                unknown.append(run)
        return unknown

    def echo(self) -> None:
        """Our own heartbeat has come back."""
        now = self._clock()
        if now - self._echo_at > _GAP_S:
            self._fresh_since = now
        self._echo_at = now

    def take_lost(self) -> list[Run]:
        """Take out the runs that are lost, and those that ended a lease ago."""
        now = self._clock()
        if self._is_deaf(now):
            return []
        lost = [
            run
            for name, run in self._runs.items()
            if now - max(self._heard_at[name], self._fresh_since) > self.lease_s
        ]
        for run in lost:
            self.forget(run.run)
        return lost

    def overdue(self) -> list[Run]:
        """The runs that should have ended; what they came to would be here by now."""
        now = self._clock()
        if self._is_deaf(now) or now - self._fresh_since <= OVERRUN_S:
            return []
        return [self._runs[name] for name, due_at in self._due_at.items() if due_at < now]

    def _is_deaf(self, now: float) -> bool:
        return now - self._echo_at > _GAP_S
