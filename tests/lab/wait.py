"""Waiting for a condition instead of sleeping."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

__all__ = ["eventually", "wait_until"]

T = TypeVar("T")

_POLL_S = 0.02


def wait_until(
    condition: Callable[[], T],
    timeout_s: float = 15.0,
    describe: str | Callable[[], str] = "",
    *,
    poll_s: float = _POLL_S,
) -> T:
    """Call ``condition`` until it returns something true, and return that.

    Args:
        condition: What to wait for.
        timeout_s: How long, in seconds.
        describe: Says in the failure's message what was waited for, or what is there instead.
        poll_s: Pause between two calls, in seconds.

    Raises:
        AssertionError: It did not become true in time.
    """
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(_complaint(describe, timeout_s, value))
        time.sleep(poll_s)
    return value


async def eventually(
    condition: Callable[[], T | Awaitable[T]],
    timeout_s: float = 15.0,
    describe: str | Callable[[], str] = "",
    *,
    poll_s: float = _POLL_S,
) -> T:
    """Do what ``wait_until`` does, without blocking the loop; ``condition`` may be async."""
    deadline = time.monotonic() + timeout_s
    while True:
        outcome = condition()
        value = await outcome if inspect.isawaitable(outcome) else outcome
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(_complaint(describe, timeout_s, value))
        await asyncio.sleep(poll_s)


def _complaint(describe: str | Callable[[], str], timeout_s: float, last: object) -> str:
    what = describe() if callable(describe) else describe
    return f"not within {timeout_s:g} s: {what or 'the condition'} (last seen: {last!r})"
