"""Where the children of one worker leave large results, until they are in the store."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

__all__ = ["SpoolFolder"]


class SpoolFolder:
    """A folder of the worker's own, removed with it, or by the next worker if it was killed.

    A ``flock`` on the folder tells that its worker lives: the kernel lets go of a killed one's.

    Args:
        parent: Where the workers of this node have their folders.
        worker: The worker's name.
    """

    def __init__(self, parent: Path, worker: str) -> None:
        self.path = parent / worker
        self._lock: int | None = None

    def make(self) -> None:
        """Make the folder, and remove those of workers that were killed."""
        self.path.mkdir(parents=True, exist_ok=True)
        turn = os.open(self.path.parent, os.O_RDONLY)
        try:
            # One at a time, or we might remove the folder of a worker that is just starting.
            fcntl.flock(turn, fcntl.LOCK_EX)
            self.path.mkdir(exist_ok=True)
            self._lock = _lock_of(self.path)
            for left in self.path.parent.iterdir():
                _remove_abandoned(left)
        finally:
            os.close(turn)

    def remove(self) -> None:
        """Remove the folder. Safe to call twice."""
        lock, self._lock = self._lock, None
        if lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(lock)


def _remove_abandoned(folder: Path) -> None:
    lock = _lock_of(folder)
    if lock is not None:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _lock_of(folder: Path) -> int | None:
    """The lock on a folder, as an open descriptor; None if its worker lives, or it is gone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
