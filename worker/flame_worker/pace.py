"""How long a target's calls take, learned from those that ran here."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final, NamedTuple

from flame_broker.messages import Target

__all__ = ["Pace"]

_TARGETS: Final = 1000
_WEIGHT: Final = 0.3


class _Learned(NamedTuple):
    mean_s: float
    deviation_s: float


class Pace:
    """Mean seconds a call and how far calls are from it, by target; forgets the least used targets.

    Both are exponentially weighted, and the first call counts for a deviation of half its length,
    as TCP learns its round trips (RFC 6298, 2).
    """

    def __init__(self) -> None:
        self._learned: OrderedDict[Target, _Learned] = OrderedDict()

    def learn(self, target: Target, calls: int, seconds: float) -> None:
        """Note that so many calls took so long together."""
        each = seconds / calls
        mean_s, deviation_s = self._learned.get(target) or _Learned(each, each / 2)
        off_s = abs(each - mean_s)
        self._learned[target] = _Learned(
            mean_s + _WEIGHT * (each - mean_s), deviation_s + _WEIGHT * (off_s - deviation_s)
        )
        self._learned.move_to_end(target)
        if len(self._learned) > _TARGETS:
            self._learned.popitem(last=False)

    def guess_s(self, target: Target, calls: int) -> float | None:
        """Seconds that so many calls will take one after another; None for an unknown target."""
        learned = self._learned.get(target)
        return None if learned is None else learned.mean_s * calls

    def foresee_s(self, target: Target, calls: int, within_s: float) -> float | None:
        """The same, but None if calls of the target are usually further off than ``within_s``."""
        learned = self._learned.get(target)
        if learned is None or learned.deviation_s * calls > within_s:
            return None
        return learned.mean_s * calls
