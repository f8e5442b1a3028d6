"""Waiting for calls; on a terminal, with a word on which are not over yet."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import flame

__all__ = ["wait_for"]

_TICK_S: Final = 0.2
_NAMED: Final = 3


def wait_for(
    futures: Sequence[flame.ObjectFuture[Any]], timeout_s: float | None
) -> list[flame.ObjectFuture[Any]]:
    """Wait until all have ended.

    Args:
        futures: Of the calls.
        timeout_s: How long; None for ever.

    Returns:
        Those that had not after that time.
    """
    from flame.progress import Bar

    until = float("inf") if timeout_s is None else time.monotonic() + timeout_s
    bar = Bar("waiting for", len(futures))
    try:
        while pending := [future for future in futures if not future.done()]:
            bar.update(len(futures) - len(pending), _names(pending))
            left_s = until - time.monotonic()
            if left_s <= 0:
                break
            pending[0].wait(min(_TICK_S, left_s))
    finally:
        bar.close()
    return pending


def _names(pending: Sequence[flame.ObjectFuture[Any]]) -> str:
    names = [f"{future.label} {future.id}" for future in pending[:_NAMED]]
    more = len(pending) - len(names)
    return ", ".join([*names, f"{more} more"] if more else names)
