"""One of a thing per process: connections must not be shared with a forked child."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["PerProcess"]

T = TypeVar("T")


class PerProcess(Generic[T]):
    """Makes a value at its first use, and another one after a fork.

    Args:
        make: Makes it; called under a lock.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._held: tuple[T, int] | None = None
        self._new_lock()
        # A lock that another thread held at the fork would stay locked in the child.
        os.register_at_fork(after_in_child=self._new_lock)

    def get(self) -> T:
        """The value of this process."""
        held = self._held
        if held is None or held[1] != os.getpid():
            with self._lock:
                held = self._held
                if held is None or held[1] != os.getpid():
                    held = self._held = (self._make(), os.getpid())
        return held[0]

    def take(self) -> T | None:
        """Give up the value, if this process has made one."""
        with self._lock:
            held, self._held = self._held, None
        return held[0] if held is not None and held[1] == os.getpid() else None

    def _new_lock(self) -> None:
        self._lock = threading.Lock()
