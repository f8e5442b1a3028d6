"""No silence when no worker answers: asks once who is there, and says so if nobody is."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Final

from flame.inquiry import Inquiry
from flame.lanes import Pending
from flame_broker.errors import FlameError
from flame_broker.logs import get_logger
from flame_broker.topology import DEFAULT_POOL

__all__ = ["Silence"]

_QUIET_S: Final = 10.0
_LOOKS: Final = 5  # in each quiet time
_ANSWER_S: Final = 2.0
_BUSY_S: Final = 60.0
_AGAIN_S: Final = 300.0

_log = get_logger("flame.client")


class Silence:
    """Watches, in the courier's loop, whether calls that are published bring any results.

    Workers that answer are merely busy: then nothing is said. A broker without fan-out cannot be
    asked, so nothing is watched there.

    Args:
        inquiry: Asks who is there.
        pending: The calls that wait.
        last_result_s: When the last result came, by ``monotonic``.
        key_id: Shown, since workers with another key do not hear us.
        connected: Whether the broker is there; its absence is told elsewhere.
        quiet_s: How long no result may come before workers are asked.
    """

    def __init__(
        self,
        inquiry: Inquiry,
        pending: Pending,
        *,
        last_result_s: Callable[[], float],
        key_id: str,
        connected: Callable[[], bool],
        quiet_s: float = _QUIET_S,
    ) -> None:
        self._inquiry = inquiry
        self._pending = pending
        self._last_result_s = last_result_s
        self._key_id = key_id
        self._connected = connected
        self._quiet_s = quiet_s
        self._next_ask_s = 0.0
        self._watching: asyncio.Task[None] | None = None

    def watch(self) -> None:
        """See that somebody looks; called whenever calls may have been published."""
        if self._watching is None and self._inquiry.reaches_workers:
            self._watching = asyncio.ensure_future(self._watch())

    def close(self) -> None:
        """Ask nothing more."""
        if self._watching is not None:
            self._watching.cancel()

    async def _watch(self) -> None:
        since_s = monotonic()
        try:
            while True:
                # Before the first look: calls that were just handed in are not published yet.
                await asyncio.sleep(self._quiet_s / _LOOKS)
                if self._pending.window.inside <= 0:
                    return
                now_s = monotonic()
                since_s = max(since_s, self._last_result_s())
                due = now_s - since_s >= self._quiet_s and now_s >= self._next_ask_s
                if due and self._connected():
                    await self._ask()
        except FlameError as exc:
            _log.info("workers.not_asked", reason=str(exc))
            self._next_ask_s = monotonic() + _BUSY_S
        finally:
            self._watching = None

    async def _ask(self) -> None:
        waiting = self._waiting()
        workers = await self._inquiry.workers(
            _ANSWER_S, lambda found: waiting.keys() <= {_pool(facts) for facts in found}
        )
        deserted = sorted(waiting.keys() - {_pool(facts) for facts in workers})
        self._next_ask_s = monotonic() + (_AGAIN_S if deserted else _BUSY_S)
        for pool in deserted:
            _log.warning(
                "workers.none",
                reason=f"{waiting[pool]} calls wait in pool {pool!r} and no worker of it answers",
                remedy=_remedy(pool, self._key_id),
            )

    def _waiting(self) -> Counter[str]:
        """How many published calls wait in each pool."""
        records = [*self._pending.records.values()]
        lanes = (r.lane for r in records if r.published)
        # What the orchestrator keeps may have days to wait.
        return Counter(lane.pool for lane in lanes if lane is not None and lane.keeping is None)


def _pool(facts: Mapping[str, object]) -> str:
    return str(facts.get("pool"))


def _remedy(pool: str, key_id: str) -> str:
    option = "" if pool == DEFAULT_POOL else f" --pool {pool}"
    return (
        f"start one with `flame-worker{option}`, or see `flame doctor`; a worker with another key "
        f"does not hear us (our key id is {key_id})"
    )
