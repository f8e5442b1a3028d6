"""Lanes: calls that may share a frame, because they go to one queue and share their spec."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol

from flame.packaging import PackedTarget
from flame.window import Gate, Window
from flame_broker.clock import elapsed
from flame_broker.messages import (
    FRAME_BYTES,
    FRAME_CALLS,
    SHORT_FRAME_CALLS,
    Call,
    CallSpec,
    Limitation,
    Result,
    RetryPolicy,
)
from flame_broker.objects import REF_BYTES
from flame_broker.transport import QueueSpec

__all__ = ["NO_TERMS", "Keeping", "Lane", "Pending", "Record", "Terms"]

_SAME_EXPIRY_S = 0.05
_FRAME_S = 0.008  # workers hold frames ahead that are over so soon (PROTOCOL.md, rule 2)
_SHORT_S = 0.0005  # where cores are few calls seem long; 64 of these are within the budget
_WEIGHT = 0.3


class Terms(NamedTuple):
    """What one call of several asks of the orchestrator.

    Attributes:
        not_before: When it may start, in seconds since 1970; 0: at once.
        key: What it is to be done once for; ``""``: it stands for itself.
        after: The ids of the calls that have to succeed first.
        limit: How many with the same key may be under way.
    """

    not_before: float = 0.0
    key: str = ""
    after: tuple[str, ...] = ()
    limit: Limitation | None = None


NO_TERMS: Final = Terms()


@dataclass(slots=True, eq=False)
class Keeping:
    """The calls of a lane go to the orchestrator, which has them run.

    Args:
        retry: Which failures it tries again.
        queue_timeout_s: How long each attempt may wait for a worker; 0 for ever.
        terms: Of calls in the outbox that have any.
    """

    retry: RetryPolicy | None
    queue_timeout_s: float
    terms: dict[int, Terms] = field(default_factory=dict)


class Record(Protocol):
    """Who waits for the outcome of a call: a future, or a chunk of a map."""

    published: int  # the number of its last call that went into a frame; 0 for none yet
    gate: Gate | None
    lane: Lane | None  # whose pace its results teach
    ends_with_client: bool  # cancel its calls when the client closes; others go on

    def settle(self, result: Result) -> None:
        """Take the outcome, once."""

    def follow(self, result: Result) -> Result | None:
        """Take an item, or the outcome of a stream: given back when every item is here."""

    def take_progress(self, fraction: float, text: str) -> None:
        """Take a progress report."""

    def take_sign_of_life(self) -> None:
        """Note that the call runs."""

    def fail_call(self, counter: int, exc: BaseException) -> None:
        """End a call that no worker ended."""

    def forget_locks(self) -> None:
        """In a forked child: locks that were held at the fork stay held for ever."""


@dataclass(slots=True)
class Pending:
    """The calls whose outcome somebody waits for.

    ``records`` is touched by several threads, each time by one operation that cannot be
    interrupted; whoever takes a record out settles it. The window counts in the loop only.
    """

    window: Window = field(default_factory=Window)
    records: dict[int, Record] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Lane:
    """Where calls wait in the client until they are packed into frames.

    Args:
        queue: Where the frames go.
        spec: What they share.
        packed: The target, with its pickle if it goes by value.
        pool: The worker pool, for the announcement of a resource class.
        exchange: What they go through; ``""`` straight to the queue.
        queue_timeout_s: How long a call may wait for a worker; 0 for ever.
        gate: A limit of its own on calls on their way.
        keeping: For calls that need time; None for those that go to a worker's queue.
    """

    queue: QueueSpec
    spec: CallSpec
    packed: PackedTarget
    pool: str
    exchange: str = ""
    queue_timeout_s: float = 0.0
    gate: Gate | None = None
    keeping: Keeping | None = None
    outbox: deque[Call] = field(default_factory=deque)
    born: deque[float] = field(default_factory=deque)
    busy: bool = False
    prepared: bool = False
    preparing: Any = None
    call_s: float = 0.0

    def learn(self, results: int, seconds: float) -> None:
        """Note that so many results took the children so long."""
        each = seconds / results
        self.call_s += _WEIGHT * (each - self.call_s) if self.call_s else each

    @property
    def frame_calls(self) -> int:
        """How many calls a frame may hold: as many as are over soon, by what they took so far."""
        if not self.call_s:
            return FRAME_CALLS
        short = self.call_s <= _SHORT_S or self.keeping is not None  # these the orchestrator packs
        least = FRAME_CALLS if short else 1
        return min(max(int(_FRAME_S / self.call_s), least), SHORT_FRAME_CALLS)

    def put(self, call: Call) -> None:
        """Queue a call for packing."""
        if self.queue_timeout_s:
            self.born.append(elapsed())
        self.outbox.append(call)

    def put_all(self, calls: list[Call]) -> None:
        """Queue several."""
        if self.queue_timeout_s:
            self.born.extend([elapsed()] * len(calls))
        self.outbox.extend(calls)

    def take(self, room: int, records: dict[int, Record]) -> tuple[list[Call], float]:
        """The calls of the next frame, and when they expire by ``clock.elapsed`` (0 for never).

        Calls that were cancelled meanwhile are left out.
        """
        calls: list[Call] = []
        outbox, timed = self.outbox, self.queue_timeout_s
        nbytes, first_due, most = 0, 0.0, min(room, self.frame_calls)
        while outbox and len(calls) < most:
            counter, payload, refs = call = outbox[0]
            nbytes += len(payload) + len(refs) * REF_BYTES
            if calls and nbytes > FRAME_BYTES:
                break
            if timed:
                due = self.born[0] + timed
                if calls and due - first_due > _SAME_EXPIRY_S:
                    break
                self.born.popleft()
                first_due = first_due or due
            outbox.popleft()
            record = records.get(counter)
            if record is not None:
                record.published = counter
                calls.append(call)
        return calls, first_due
