"""How long to wait between two attempts."""

from __future__ import annotations

import random

__all__ = ["Backoff"]


class Backoff:
    """Exponential back-off with full jitter.

    Each delay is uniform between 0 and the doubling ceiling: a thousand clients that lost one
    broker together do not come back together. Source of the method: M. Brooker, "Exponential
    Backoff And Jitter", AWS Architecture Blog, 2015.

    Args:
        base_s: The first ceiling, in seconds.
        cap_s: The highest ceiling, in seconds.
    """

    def __init__(self, *, base_s: float = 0.1, cap_s: float = 5.0) -> None:
        self._base_s = base_s
        self._cap_s = cap_s
        self._ceiling_s = base_s

    def next_s(self) -> float:
        """Draw the next delay, in seconds, and double the ceiling."""
        delay_s = random.uniform(0, self._ceiling_s)
        self._ceiling_s = min(self._ceiling_s * 2, self._cap_s)
        return delay_s

    def reset(self) -> None:
        """Start over, after an attempt that held."""
        self._ceiling_s = self._base_s
