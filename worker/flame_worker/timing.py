"""How long is short: the spans of time by which calls are placed, held ahead and handed back."""

from __future__ import annotations

from typing import Final

__all__ = ["BUDGET_S", "LEAD_S", "LONE_S", "SHORT_S", "SUSPECT_S", "UNDIVIDED_S", "frames_ahead"]

BUDGET_S: Final = 0.05
"""How long a call may wait here for a slot: the time budget of rule 2."""

LONE_S: Final = 0.25
"""The same for a call that was handed back before: it was asked for since a slot was about to be
free, and at the end of its queue it would come last of all, long after its neighbours."""

SUSPECT_S: Final = 1.0
"""The same for a suspect: it comes back at once, as a worker never ceases to take suspects."""

SHORT_S: Final = 0.01
"""Work that is over so soon is given to a slot ahead of time, behind what runs there."""

UNDIVIDED_S: Final = 0.002
"""A frame of less work than this goes to one slot whole: dividing it costs more than it wins."""

LEAD_S: Final = 0.02
"""So long before a call is expected to end, its successor is asked for: the broker needs a few
milliseconds, and what comes early waits less than its budget."""

_MOST_AHEAD: Final = 6
_CLOCK_S: Final = 0.001  # what takes less may have taken no time at all


def frames_ahead(seconds: float, slots: int) -> int:
    """How many frames to hold beyond those that run: they hide the broker's latency.

    So few that what is held waits half its budget, and none that are long.

    Args:
        seconds: What a frame takes a slot.
        slots: How many run at a time.
    """
    if seconds >= LEAD_S:
        return 0
    return min(int(slots * BUDGET_S / 2 / max(seconds, _CLOCK_S)), _MOST_AHEAD)
