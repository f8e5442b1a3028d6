"""What a child tells its daemon: records of results, notices, and the bell (see ``pipes``)."""

from __future__ import annotations

import os
import threading
from time import perf_counter
from typing import Any, Final

import msgpack

from flame_worker.pipes import (
    ATOMIC_BYTES,
    NOTICE,
    PROGRESS,
    RING_AFTER_S,
    RING_BYTES,
    ChildEnds,
)

__all__ = ["Progress", "Reporter"]

_PROGRESS_EVERY_S: Final = 0.1
_TEXT_LIMIT: Final = 200


class Reporter:
    """The writing end of the records pipe."""

    def __init__(self, ends: ChildEnds) -> None:
        self._records, self._bells = ends.records, ends.bells
        self._pack = msgpack.Packer(use_bin_type=True, unicode_errors="replace").pack
        self._lock = threading.Lock()
        self._unread = 0
        self._rung_at = 0.0

    def send(self, record: tuple[Any, ...], now: float) -> None:
        """Send a result, from the main thread; the daemon may look at it a little later."""
        data = self._pack(record)
        if len(data) > ATOMIC_BYTES:
            self._send_in_pieces(data)
            return
        os.write(self._records, data)
        self._unread += len(data)
        if self._unread >= RING_BYTES or now - self._rung_at >= RING_AFTER_S:
            self.ring()

    def notify(self, *fields: Any) -> None:
        """Send a notice at once, from any thread. It must be short."""
        data = msgpack.packb((NOTICE, *fields), unicode_errors="replace")
        with self._lock:
            os.write(self._records, data)
        self.ring()

    def ring(self) -> None:
        """Have the daemon look now."""
        os.write(self._bells, b"!")
        self._unread = 0
        self._rung_at = perf_counter()

    def _send_in_pieces(self, data: bytes) -> None:
        # A ring after each piece: whatever blocks on a full pipe was announced before.
        view = memoryview(data)
        with self._lock:
            while view:
                sent = os.write(self._records, view[:RING_BYTES])
                view = view[sent:]
                self.ring()


class Progress:
    """Progress of one call: at most ten reports a second, and always the last."""

    def __init__(self, reporter: Reporter, serial: int) -> None:
        self._reporter, self._serial = reporter, serial
        self._sent_at = 0.0
        self._waiting: tuple[float, str] | None = None

    def report(self, fraction: float, text: str) -> None:
        """Send, or keep as the newest if the last one is too recent."""
        self._waiting = (fraction, text)
        if perf_counter() - self._sent_at >= _PROGRESS_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Send what was kept back."""
        if self._waiting is None:
            return
        (fraction, text), self._waiting = self._waiting, None
        self._sent_at = perf_counter()
        self._reporter.notify(PROGRESS, self._serial, fraction, text[:_TEXT_LIMIT])
