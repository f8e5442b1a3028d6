"""Queue timeouts of calls that wait at the broker, where no worker may ever take them.

A worker that takes an expired call says so. Nobody does while all are busy, and where none serves
the pool or the resource class: so the client watches its own calls, and asks before it gives up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Final

from flame.inquiry import Inquiry
from flame.lanes import Lane, Pending
from flame_broker.clock import elapsed
from flame_broker.errors import CallExpired, FlameError
from flame_broker.logs import get_logger

__all__ = ["Expiry"]

_AGAIN_S: Final = 1.0
_SWEEP_AT: Final = 1024

_log = get_logger("flame.client")


@dataclass(slots=True, eq=False)
class _Timed:
    """The calls of one published frame."""

    due: float
    lane: Lane
    counters: tuple[int, ...]

    def __lt__(self, other: _Timed) -> bool:
        return self.due < other.due


class Expiry:
    """Ends, in the courier's loop, published calls that no worker has started in time.

    Args:
        inquiry: Tells the workers, and hears which calls they have started.
        client_id: Whose calls these are.
        pending: Who still waits.
        fail: Ends calls that are still pending.
    """

    def __init__(
        self,
        inquiry: Inquiry,
        client_id: str,
        pending: Pending,
        fail: Callable[[Iterable[int], BaseException], None],
    ) -> None:
        self._inquiry = inquiry
        self._client_id = client_id
        self._pending = pending
        self._fail = fail
        self._timed: list[_Timed] = []
        self._sweep_at = _SWEEP_AT
        self._timer: asyncio.TimerHandle | None = None
        self._asking: set[asyncio.Task[None]] = set()

    def watch(self, lane: Lane, counters: Iterable[int], due: float) -> None:
        """See that the calls of a frame do not wait longer than this, by ``clock.elapsed``.

        Where workers cannot be asked what they have started, they alone enforce it.
        """
        if not self._inquiry.reaches_workers:
            return
        timed = _Timed(due, lane, tuple(counters))
        heappush(self._timed, timed)
        if len(self._timed) > self._sweep_at:
            self._sweep()
        if self._timed and self._timed[0] is timed:
            self._set_timer()

    def close(self) -> None:
        """Watch nothing more."""
        if self._timer is not None:
            self._timer.cancel()
        for task in self._asking:
            task.cancel()

    def _sweep(self) -> None:
        """Forget what has ended: with a long timeout that is nearly everything."""
        self._timed = [timed for timed in self._timed if self._unsettled([timed])]
        heapify(self._timed)
        self._sweep_at = max(_SWEEP_AT, 2 * len(self._timed))

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._timed:
            delay_s = max(0.0, self._timed[0].due - elapsed())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._look)

    def _look(self) -> None:
        due: list[_Timed] = []
        now = elapsed()
        while self._timed and self._timed[0].due <= now:
            due.append(heappop(self._timed))
        self._set_timer()
        if self._unsettled(due):
            task = asyncio.ensure_future(self._expire(due))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)

    def _unsettled(self, due: Iterable[_Timed]) -> list[int]:
        records = self._pending.records
        return [n for timed in due for n in timed.counters if n in records]

    async def _expire(self, due: list[_Timed]) -> None:
        try:
            running = await self._inquiry.expire(self._client_id, self._unsettled(due))
        except FlameError as exc:
            _log.info("expiry.not_asked", reason=str(exc))
            for timed in due:
                self.watch(timed.lane, timed.counters, elapsed() + _AGAIN_S)
            return
        for timed in due:
            self._fail([n for n in timed.counters if n not in running], self._story(timed.lane))

    def _story(self, lane: Lane) -> CallExpired:
        return CallExpired(
            f"a call of {lane.spec.label!r} in pool {lane.pool!r} waited longer than its queue "
            f"timeout of {lane.queue_timeout_s:g} s and was never started"
        )
