"""Which calls run here, for those who ask what a worker does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from flame_broker.messages import Plain, call_id
from flame_worker.slots import Slot

__all__ = ["MOST_CALLS", "running_calls"]

MOST_CALLS: Final = 32
"""More are not named: a heartbeat is to stay small."""

_LABEL_LENGTH: Final = 60


def running_calls(slots: Iterable[Slot], now: float) -> tuple[tuple[Plain, ...], ...]:
    """Id, label and seconds of the calls that run, those that have run longest first.

    Args:
        slots: Of a worker.
        now: In loop time.
    """
    found: list[tuple[float, str, str]] = []
    for slot in slots:
        if slot.batches:
            batch = slot.batches[0]
            left = slot.left_of(batch)
            if left:  # the first of them runs; those behind it wait, for milliseconds
                label = batch.spec.label[:_LABEL_LENGTH]
                found.append((now - batch.given_at, call_id(batch.client, left[0]), label))
    found.sort(reverse=True)
    return tuple((call, label, round(seconds, 3)) for seconds, call, label in found[:MOST_CALLS])
