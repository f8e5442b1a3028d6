"""Waiting for many futures; Ctrl-C may leave it at any moment.

``concurrent.futures.wait`` and ``as_completed`` lock each future while they look at it. Left
between two of their steps they keep the locks, and whoever settles such a future then stands still.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from queue import SimpleQueue
from time import monotonic
from typing import TYPE_CHECKING, Any

from flame.bell import take

if TYPE_CHECKING:
    from flame.futures import ObjectFuture

__all__ = ["as_they_end", "wait_for_all"]


def wait_for_all(futures: Iterable[ObjectFuture[Any]], timeout: float | None = None) -> bool:
    """Wait until all are done; False if that took longer than so many seconds."""
    deadline = None if timeout is None else monotonic() + timeout
    for future in futures:
        left = None if deadline is None else max(0.0, deadline - monotonic())
        if not future.done() and not future.wait(left):
            return False
    return True


def as_they_end(futures: Iterable[ObjectFuture[Any]]) -> Iterator[ObjectFuture[Any]]:
    """Each of them once, in the order in which they end."""
    left = dict.fromkeys(futures)
    heard: SimpleQueue[ObjectFuture[Any]] = SimpleQueue()
    with ExitStack() as listening:
        for future in left:
            listening.enter_context(future.listening(partial(heard.put, future)))
        for future in left:
            if future.done():
                heard.put(future)
        while left:
            future = take(heard)
            if future in left and future.done():  # a generator is heard at each item
                del left[future]
                yield future
