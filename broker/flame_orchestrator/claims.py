"""Who may run a kept call: what is said to a claim, and what becomes of a run that is lost.

A lease is for one run, which is one start at one worker. While it has it, nobody else gets it
(PROTOCOL.md, rules 4 to 6).
"""

from __future__ import annotations

from dataclasses import replace
from time import time

from flame_broker.errors import CallTimeout, FlameError, Quarantined, WorkerLost
from flame_broker.keys import Key
from flame_broker.messages import (
    MAX_STRIKES,
    Call,
    CallFrame,
    Claim,
    Result,
    ResultFrame,
    Status,
    Suspicion,
)
from flame_broker.outcomes import encode_failure
from flame_broker.topology import suspects_beside
from flame_orchestrator.attempts import Kept, decide
from flame_orchestrator.states import CallState

__all__ = ["grant", "lose", "overrun", "release"]


def grant(row: Kept, claim: Claim, call: Call, key: Key) -> bool:
    """Whether a run gets the lease on a call that is kept; the row says so then."""
    if row.ended_at is not None or claim.frame.attempt != row.attempt:
        return False
    if row.state == CallState.RUNNING.value:
        return row.run == claim.run
    if claim.look:
        return True
    row.state, row.run, row.worker = CallState.RUNNING.value, claim.run, claim.worker
    row.started_at, row.changed = time(), True
    if claim.frame.suspicion or claim.frame.strikes or _is_suspect(claim.frame):
        row.change(replace(claim.frame, calls=(call,), reply=row.reply), key)
    return True


def release(row: Kept, run: object, key: Key) -> None:
    """A run gives a call back that it has not started, or that may be started anew."""
    if row.state == CallState.RUNNING.value and row.run == run:
        frame = row.frame
        # A frame like the one before would pass for a copy of it.
        row.change(replace(frame, handed=frame.handed + 1), key)
        row.wait(0.0, "")


def lose(row: Kept, run: object, mark: bytes, key: Key) -> Result | None:
    """Its run is silent: it is started again, or that is its end, which the client is told."""
    if row.ended_at is not None:
        again = row.ended_by == mark  # perhaps its client was never told
        return _end_of(row) if again else None
    if row.state != CallState.RUNNING.value or row.run != run:
        return None
    frame = row.frame
    strikes = frame.strikes + (frame.suspicion is Suspicion.ALONE)
    row.reason = f"its worker {row.worker} was lost: nothing was heard of it any more"
    if frame.spec.at_most_once or strikes >= MAX_STRIKES:
        row.state = (CallState.FAILED if strikes < MAX_STRIKES else CallState.QUARANTINED).value
        final = _end_of(row)
        row.end(final, mark)
        return final
    suspects = suspects_beside(frame.queue)
    was_suspect = frame.queue == suspects
    row.change(
        replace(
            frame,
            queue=suspects,
            strikes=strikes,
            suspicion=Suspicion.APART if was_suspect else Suspicion.SHARED,
            handed=frame.handed + 1,
        ),
        key,
    )
    row.wait(0.0, row.reason)
    return None


def overrun(row: Kept, run: object, mark: bytes) -> Result | None:
    """Its worker has not ended it in time: it ends as if it had, which the client may be told."""
    if row.ended_at is None and (row.state != CallState.RUNNING.value or row.run != run):
        return None
    reason = (
        f"the call ran longer than its timeout of {row.frame.spec.timeout_s:g} s, and its worker "
        f"{row.worker} did not end it: `flame workers show {row.worker}` says whether it is well"
    )
    final = Result(row.counter, Status.FAILED, encode_failure(CallTimeout, reason))
    return decide(row, final, ResultFrame("", row.client, row.worker, (final,), row.attempt), mark)


def _is_suspect(frame: CallFrame) -> bool:
    return frame.queue == suspects_beside(frame.queue)


def _end_of(row: Kept) -> Result:
    """How a call ends that is not started any more."""
    quarantined = row.state == CallState.QUARANTINED.value
    kind: type[FlameError] = Quarantined if quarantined else WorkerLost
    return Result(row.counter, Status.FAILED, encode_failure(kind, row.reason))
