"""What becomes of a kept call when an attempt has a result: its end, or another attempt."""

from __future__ import annotations

import random
from dataclasses import dataclass
from time import time
from typing import Final, cast

import msgpack

from flame_broker import errors
from flame_broker.errors import CallCancelled, CallExpired, FlameError, Quarantined
from flame_broker.frames import encode, reread
from flame_broker.keys import Key
from flame_broker.messages import CallFrame, Result, ResultFrame, RetryPolicy, Status
from flame_broker.outcomes import describe
from flame_orchestrator.schema import NEVER
from flame_orchestrator.states import CallState, ending_of

__all__ = ["Kept", "decide"]

_LONGEST_PAUSE_S: Final = 24 * 3600.0
_NEVER_AGAIN: Final = (CallCancelled, CallExpired, Quarantined)


@dataclass(slots=True)
class Kept:
    """A row of ``kept``, as this transaction leaves it."""

    id: int
    client: str
    counter: int
    once: str | None
    state: str
    attempt: int
    due_at: float
    reason: str
    retry: bytes | None
    reply: str
    body: bytes
    ended_at: float | None
    ended_by: bytes | None
    run: str | None
    worker: str
    started_at: float | None
    not_before: float
    unmet: int
    limit_key: str | None
    limit_calls: int | None
    place: int | None
    changed: bool = False
    moved: bool = False

    @property
    def frame(self) -> CallFrame:
        """What a worker gets, but for its reply address, which is the client's."""
        return cast(CallFrame, reread(self.body))

    @property
    def policy(self) -> RetryPolicy:
        """How often and when it is tried again."""
        if self.retry is None:
            return RetryPolicy(1, 0.0, 1.0, jitter=False)
        return RetryPolicy(*msgpack.unpackb(self.retry))

    def wait_again(self, reason: str) -> None:
        """Let another attempt follow."""
        self.wait(_pause_s(self.policy, self.attempt), reason)
        self.attempt += 1
        if self.place is not None:  # it is for others while this one pauses
            self.not_before, self.due_at, self.place = self.due_at, NEVER, 0

    def wait(self, pause_s: float, reason: str) -> None:
        """Wait so long for a worker's queue; no run has it any more."""
        self.due_at = time() + pause_s
        self.state, self.run, self.worker = CallState.WAITING.value, None, ""
        self.reason, self.changed = reason, True

    def change(self, frame: CallFrame, key: Key) -> None:
        """Let workers get this from now on."""
        self.body, self.moved, self.changed = encode(frame, key), True, True

    def end(self, final: Result, mark: bytes) -> None:
        """Let this be the outcome."""
        ending = ending_of(final)
        assert ending is not None
        self.state, self.ended_at = ending.state.value, time()
        self.place = None
        self.ended_by, self.changed = mark, True


def decide(row: Kept, result: Result, frame: ResultFrame, mark: bytes) -> Result | None:
    """What the client is told of a result in a frame; None for nothing yet, or any more."""
    if row.ended_at is not None:
        # The very letter that ended it comes again: perhaps its client was never told.
        return _as_final(result) if row.ended_by == mark else None
    if result.status is Status.ITEM:
        return result
    if result.status in (Status.AGAIN, Status.FAILED) and _is_of_another_run(row, frame):
        return None  # that one was lost, or refused; what this one comes to counts
    reason = _why_again(row, result)
    if reason is not None and frame.attempt != row.attempt:
        return None  # late: the next attempt is under way
    if reason is not None and row.attempt < row.policy.attempts:
        row.wait_again(reason)
        return None
    final = _as_final(result)
    row.end(final, mark)
    return final


def _is_of_another_run(row: Kept, frame: ResultFrame) -> bool:
    return row.state == CallState.RUNNING.value and frame.worker != row.worker


def _pause_s(policy: RetryPolicy, attempt: int) -> float:
    try:
        longest = min(policy.backoff_s * policy.factor ** (attempt - 1), _LONGEST_PAUSE_S)
    except OverflowError:
        longest = _LONGEST_PAUSE_S
    return random.uniform(0, longest) if policy.jitter else longest


def _why_again(row: Kept, result: Result) -> str | None:
    """Why the policy would try again after this; None if it would not.

    What the user's code raised was judged in the child, which has the classes.
    """
    if result.status is Status.AGAIN:
        return ": ".join(filter(None, describe(result)))
    if result.status is not Status.FAILED or row.retry is None:
        return None
    name, message = describe(result)
    kind = getattr(errors, name, None) if name in errors.__all__ else None
    if kind is None or not issubclass(kind, FlameError) or issubclass(kind, _NEVER_AGAIN):
        return None
    names = {f"{one.__module__}.{one.__qualname__}" for one in kind.__mro__}
    retried = not names.isdisjoint(row.frame.spec.retry_on)
    return f"{name}: {message}" if retried else None


def _as_final(result: Result) -> Result:
    return result._replace(status=Status.ERROR) if result.status is Status.AGAIN else result
