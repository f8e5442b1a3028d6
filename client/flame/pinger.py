"""``Pinger``: how long a call takes that does nothing."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Final

from flame.calls import Caller, CallOptions
from flame.packaging import NOTHING
from flame_broker.topology import DEFAULT_POOL

if TYPE_CHECKING:
    from flame.client import Client

__all__ = ["Pinger"]

# A ping that nobody took must not wait for the next worker for ever; and a worker whose clock
# runs ahead must not drop it too early.
_LEFT_BEHIND_S: Final = 60.0


class Pinger:
    """Measures round trips through a worker of one pool.

    Args:
        client: Who asks.
        pool: Whose workers.
        timeout_s: How long a round trip may take.
    """

    def __init__(
        self, client: Client, pool: str = DEFAULT_POOL, *, timeout_s: float = 10.0
    ) -> None:
        self._timeout_s = timeout_s
        options = CallOptions(
            label="ping", pool=pool, queue_timeout_s=timeout_s + _LEFT_BEHIND_S, echo=False
        )
        self._caller = Caller(client, NOTHING, options)

    def trip(self) -> float:
        """Seconds of one round trip, from the call to its result.

        Raises:
            TimeoutError: No worker answered in time; the call is cancelled.
        """
        started_s = perf_counter()
        future = self._caller.submit((), {})
        try:
            future.result(self._timeout_s)
        finally:
            future.cancel()
        return perf_counter() - started_s
