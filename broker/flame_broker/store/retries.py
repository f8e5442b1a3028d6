"""Trying again: bounded in time, with full jitter, and ended by ``close``.

The pause before try *n* is uniform in 0 to min(cap, base * 2^n) ("full jitter", Marc Brooker,
"Exponential Backoff And Jitter", AWS Architecture Blog, 2015).
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from flame_broker.errors import StoreError
from flame_broker.logs import get_logger

__all__ = ["DEFAULT_RETRY_S", "Retries", "Transient"]

_log = get_logger("flame.broker")

DEFAULT_RETRY_S = 20.0
"""For how long a store that fails is tried again, in seconds."""

_BASE_S = 0.1
_CAP_S = 3.0
_LEAST_TRIES = 2

T = TypeVar("T")


class Transient(StoreError):
    """A failure that may be over at the next try; never leaves this package."""


class Retries:
    """The patience of one store.

    Args:
        retry_s: No new try starts later than this after the first, except that a second try
            always happens: the first may have found a connection that died long ago.
    """

    def __init__(self, retry_s: float = DEFAULT_RETRY_S) -> None:
        self._retry_s = retry_s
        self._stopped = threading.Event()

    def run(self, attempt: Callable[[], T]) -> T:
        """The result of the first try that does not end as ``Transient``.

        Raises:
            StoreError: No try succeeded in time, or the store was closed meanwhile.
        """
        started = time.monotonic()
        tries = 0
        while True:
            try:
                return attempt()
            except Transient as exc:
                tries += 1
                pause_s = random.uniform(0, min(_CAP_S, _BASE_S * 2**tries))
                elapsed_s = time.monotonic() - started
                if tries >= _LEAST_TRIES and elapsed_s + pause_s > self._retry_s:
                    raise StoreError(
                        f"{exc} (gave up after {tries} tries in {elapsed_s:.0f} s)"
                    ) from exc.__cause__
                _log.info("store.retry", reason=str(exc), tries=tries, pause_s=round(pause_s, 2))
                if self._stopped.wait(pause_s):
                    raise StoreError(f"{exc} (and the store was closed)") from exc.__cause__

    def stop(self) -> None:
        """End all waits: what would be tried again fails instead."""
        self._stopped.set()
