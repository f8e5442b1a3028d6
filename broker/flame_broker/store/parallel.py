"""Pieces of one transfer, side by side; the first that fails ends the others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

from flame_broker.errors import StoreError

__all__ = ["PARALLEL", "Parallel"]

PARALLEL = 8
"""Requests at a time for one object: at S3's usual 90 MB/s each they fill some 6 Gbit/s."""

T = TypeVar("T")


class Parallel(Generic[T]):
    """A context manager; on leaving it no piece is running any more."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(PARALLEL, "flame-store")
        self._started: list[Future[T]] = []
        self._lock = threading.Lock()
        self._left = False
        self._first_error: StoreError | OSError | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._left = True
        self._pool.shutdown(cancel_futures=True)

    def start(self, piece: Callable[[], T]) -> None:
        """Do a piece as soon as a thread is free."""
        self._started.append(self._pool.submit(self._do, piece))

    def results(self) -> Iterator[T]:
        """What the pieces return, in the order of their start.

        Raises:
            StoreError: What the first piece that failed raised; so with OSError.
        """
        for future in self._started:
            yield future.result()

    def check(self) -> None:
        """To be called by pieces now and then.

        Raises:
            StoreError: Another piece failed (with its reason), or nobody waits any more; so with
                OSError.
        """
        if self._first_error is not None:
            raise self._first_error
        if self._left:
            raise StoreError("the transfer was given up")

    def _do(self, piece: Callable[[], T]) -> T:
        self.check()
        try:
            return piece()
        except (StoreError, OSError) as exc:
            with self._lock:
                self._first_error = self._first_error or exc
            raise
