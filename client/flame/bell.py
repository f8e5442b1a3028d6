"""A bell: one thread waits until something holds that others bring about."""

from __future__ import annotations

from collections.abc import Callable
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Final, TypeVar

__all__ = ["Bell", "take"]

T = TypeVar("T")

_LOOK_S: Final = 0.5


class Bell:
    """Wakes the thread that waits for a condition; any thread may ring, as often as it likes.

    Ctrl-C may leave the wait at any moment. The events and conditions of ``threading`` are written
    in Python and do not stand that: hit between two of their steps they raise RuntimeError in
    place of KeyboardInterrupt, or keep their lock for ever, and then whoever rings stands still. A
    ``SimpleQueue`` is written in C, and Ctrl-C finds it before or after, never in between.
    """

    __slots__ = ("_rings",)

    def __init__(self) -> None:
        self._rings: SimpleQueue[None] = SimpleQueue()

    def ring(self) -> None:
        """The condition may hold now."""
        self._rings.put(None)

    def wait_for(self, condition: Callable[[], bool], timeout: float | None) -> bool:
        """Wait until it holds; False if that took longer than so many seconds."""
        deadline = None if timeout is None else monotonic() + timeout
        while not condition():
            left_s = None if deadline is None else max(0.0, deadline - monotonic())
            try:
                take(self._rings, left_s)
            except Empty:
                return condition()
        return True


def take(queue: SimpleQueue[T], timeout: float | None = None) -> T:
    """Take what comes next out of a queue; Ctrl-C is heard while nothing comes.

    CPython notes a signal, and looks for it before a wait; one that comes between that look and
    the wait is seen when the wait ends, which may be never. So this looks twice a second.

    Raises:
        Empty: Nothing came in so many seconds.
    """
    deadline = None if timeout is None else monotonic() + timeout
    while deadline is None or deadline - monotonic() > _LOOK_S:
        try:
            return queue.get(timeout=_LOOK_S)
        except Empty:
            continue
    return queue.get(timeout=max(0.0, deadline - monotonic()))
