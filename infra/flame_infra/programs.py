"""Which programs have an embedded cluster, and which of them were killed."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Final

__all__ = ["Programs"]

_SUFFIX: Final = ".program"
_LONGEST_WAIT_S: Final = 20.0
_TRY_EVERY_S: Final = 0.05


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
            OSError: The folder cannot be made or read, or one of them has been at it for 20 s.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        turn = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            _wait_for(turn, self._folder)
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


def _wait_for(turn: int, folder: Path) -> None:
    """Take the lock; a plain wait for it would have no end if a program was stopped."""
    deadline = monotonic() + _LONGEST_WAIT_S
    while True:
        try:
            fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if monotonic() > deadline:
                raise OSError(
                    f"another program has held the lock on {folder} for {_LONGEST_WAIT_S:g} s; was "
                    "it stopped? `fuser` names it"
                ) from None
            sleep(_TRY_EVERY_S)
        else:
            return


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
