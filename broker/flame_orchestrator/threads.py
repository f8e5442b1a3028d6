"""Work that blocks, in a thread; also while the program around us ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

__all__ = ["in_thread"]

T = TypeVar("T")


async def in_thread(threads: Executor, work: Callable[[], T]) -> T:
    """Do something there, and wait for it; what it raises is raised here."""
    try:
        done = asyncio.get_running_loop().run_in_executor(threads, work)
    except RuntimeError:
        # The program around us ends, and its thread pools have ended: the last words are
        # written in this thread, which nobody needs any more.
        return work()
    return await done
