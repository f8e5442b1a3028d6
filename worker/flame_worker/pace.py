"""How long a target's calls take, learned from those that ran here."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from flame_broker.messages import Target

__all__ = ["Pace"]

_TARGETS: Final = 1000
_WEIGHT: Final = 0.3


class Pace:
    """Exponentially weighted mean seconds a call, by target; forgets the least used targets."""

    def __init__(self) -> None:
        self._seconds: OrderedDict[Target, float] = OrderedDict()

    def learn(self, target: Target, calls: int, seconds: float) -> None:
        """Note that so many calls took so long together."""
        each = seconds / calls
        before = self._seconds.get(target, each)
        self._seconds[target] = before + _WEIGHT * (each - before)
        self._seconds.move_to_end(target)
        if len(self._seconds) > _TARGETS:
            self._seconds.popitem(last=False)

    def guess_s(self, target: Target, calls: int) -> float | None:
        """Seconds that so many calls will take one after another; None for an unknown target."""
        each = self._seconds.get(target)
        return None if each is None else each * calls
