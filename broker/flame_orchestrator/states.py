"""The one state machine of calls.

::

    pending → queued → running → succeeded | failed | cancelled | expired | quarantined

with *waiting* before *queued* for a call that the orchestrator keeps until its time has come. A
call is *pending* in its client, *queued* once the broker has it, and *running* when its worker has
said so: after some seconds, with the claim for a lease. What the ledger hears may arrive in any
order and more than once, so a state is derived from what is known instead of stepped: the first
terminal outcome wins (PROTOCOL.md, promise P2).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final, NamedTuple

from flame_broker.errors import CallCancelled, CallExpired, Quarantined
from flame_broker.messages import Result, Status
from flame_broker.outcomes import describe

__all__ = ["TERMINAL", "CallState", "Ending", "ending_of"]


class CallState(StrEnum):
    """Where a call is in its life."""

    WAITING = "waiting"
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    QUARANTINED = "quarantined"


TERMINAL: Final = frozenset(CallState) - {
    CallState.WAITING, CallState.QUEUED, CallState.RUNNING
}  # fmt: skip

_STATES: Final = {
    CallCancelled.__name__: CallState.CANCELLED,
    CallExpired.__name__: CallState.EXPIRED,
    Quarantined.__name__: CallState.QUARANTINED,
}


class Ending(NamedTuple):
    """How a call ended, in words.

    Attributes:
        state: A terminal state.
        error: The name of the error; ``""`` for a success.
        reason: What it said, one sentence or more.
    """

    state: CallState
    error: str = ""
    reason: str = ""


_SUCCESS: Final = Ending(CallState.SUCCEEDED)


def ending_of(result: Result) -> Ending | None:
    """What a result says about its call; None if it may go on: an item, or to be tried again.

    Raises:
        MalformedMessage: A failure that describes nothing.
    """
    if result.status is Status.OK:
        return _SUCCESS
    if result.status in (Status.ITEM, Status.AGAIN):
        return None
    error, reason = describe(result)
    return Ending(_STATES.get(error, CallState.FAILED), error, reason)
