"""A consumer of a portable transport: one thread with a connection of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Final

from flame_broker.backoff import Backoff
from flame_broker.logs import get_logger
from flame_broker.portable.link import Dialect, Link, Parcel, Subscription

__all__ = ["Listener"]

_log = get_logger("flame.broker")
_CAP_S: Final = 5.0


class Listener:
    """Fetches messages while it has credit, and hands them to the loop.

    Args:
        dialect: The broker.
        queue: The queue.
        credit: How many messages may be in hand.
        hand_over: Called in the loop for each message.
        put_back: Called in this thread for what arrives after the end.
    """

    def __init__(
        self,
        dialect: Dialect,
        queue: str,
        *,
        credit: int,
        hand_over: Callable[[Parcel], None],
        put_back: Callable[[Link, Parcel], None],
    ) -> None:
        self._dialect, self._hand_over, self._put_back = dialect, hand_over, put_back
        self._loop = asyncio.get_running_loop()
        self._subscription = Subscription(queue, self._received)
        self._credit = credit
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._backoff = Backoff(cap_s=_CAP_S)
        self._link: Link | None = None
        self._thread = threading.Thread(target=self._run, name=f"listen-{queue}", daemon=True)
        self._thread.start()

    def grant(self) -> None:
        """Give one credit back."""
        with self._changed:
            self._credit += 1
            self._changed.notify()

    def stop(self) -> None:
        """Fetch no more. The thread ends when its last request has been answered."""
        self._stopping.set()
        with self._changed:
            self._changed.notify()

    @property
    def alive(self) -> bool:
        """Whether its thread still runs."""
        return self._thread.is_alive()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._listen()
            except self._dialect.failures as exc:
                _log.warning("broker_lost", broker=str(self._dialect), error=str(exc))
                self._stopping.wait(self._backoff.next_s())

    def _listen(self) -> None:
        link = self._link = self._dialect.connect()
        try:
            link.subscribe(self._subscription)
            self._backoff.reset()
            while credit := self._wait_for_credit():
                link.receive(credit)
        finally:
            link.close()  # may deliver what a request under way brings

    def _wait_for_credit(self) -> int:
        """Return the credit, or 0 at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._credit > 0 or self._stopping.is_set())
            return 0 if self._stopping.is_set() else self._credit

    def _received(self, parcel: Parcel) -> None:
        with self._changed:
            self._credit -= 1
        if not self._stopping.is_set() and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._hand_over, parcel)
        elif self._link is not None:
            self._put_back(self._link, parcel)
