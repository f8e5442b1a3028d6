"""Which programs have an embedded cluster, and which of them were killed."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

__all__ = ["Programs"]

_SUFFIX: Final = ".program"


class Programs:
    """Marks of the programs that share a folder: a file for each cluster.

    A ``flock`` on the file tells that its program lives: the kernel lets go of a killed one's.

    Args:
        folder: Where the marks are.
        own: The name of our cluster.
    """

    def __init__(self, folder: Path, own: str) -> None:
        self._folder = folder
        self._own = folder / f"{own}{_SUFFIX}"
        self._lock: int | None = None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep all other programs from coming and from clearing up.

        Raises:
            OSError: The folder cannot be made or read.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        turn = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(turn, fcntl.LOCK_EX)
            yield
        finally:
            os.close(turn)

    def come(self) -> None:
        """Make our mark; do so ``alone``.

        Raises:
            OSError: It cannot be made.
        """
        self._own.touch(mode=0o600)
        self._lock = _lock_of(self._own)

    def gone(self) -> Iterator[str]:
        """The clusters of programs that were killed; do so ``alone``.

        The mark of each is removed once the next is asked for: whoever is cut off finds it again.
        """
        for mark in sorted(self._folder.glob(f"*{_SUFFIX}")):
            lock = _lock_of(mark)
            if lock is not None:
                try:
                    yield mark.name.removesuffix(_SUFFIX)
                    mark.unlink(missing_ok=True)
                finally:
                    os.close(lock)

    def leave(self) -> None:
        """Remove our mark. Safe to call twice."""
        lock, self._lock = self._lock, None
        if lock is not None:
            self._own.unlink(missing_ok=True)
            os.close(lock)


def _lock_of(mark: Path) -> int | None:
    """The lock on a mark, as an open descriptor; None if its program lives, or it is gone."""
    try:
        descriptor = os.open(mark, os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
