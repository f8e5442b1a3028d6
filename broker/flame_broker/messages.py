"""What travels: calls, results, events and control, in frames of 1..N.

A record says *what*; ``frames`` turns it into signed bytes and back. Everything here is immutable.
Records that exist once a frame are slotted frozen dataclasses; records that exist once a call are
named tuples, which the msgpack packer takes as they are and which cost a quarter to make.

A call's id is ``<client>-<counter>``, so the calls of a frame need one client and their counters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import NamedTuple

from flame_broker.objects import ObjectRef

__all__ = [
    "FRAME_BYTES",
    "FRAME_CALLS",
    "INLINE_BYTES",
    "MAX_STRIKES",
    "SHORT_FRAME_CALLS",
    "Call",
    "CallFrame",
    "CallSpec",
    "Claim",
    "ControlFrame",
    "Deposit",
    "Event",
    "EventFrame",
    "EventKind",
    "Frame",
    "Limitation",
    "Plain",
    "Priority",
    "Result",
    "ResultFrame",
    "RetryPolicy",
    "Status",
    "Suspicion",
    "Target",
    "call_id",
    "is_plain",
    "parse_call_id",
]

FRAME_CALLS = 64
"""At most so many calls travel in one frame (13 times the rate of one a message, measured)."""

SHORT_FRAME_CALLS = 256
"""So many, once the calls of a target are known to be short: the broker's work is by message."""

FRAME_BYTES = 64 * 1024
"""A frame is closed when its payloads reach this size."""

INLINE_BYTES = 64 * 1024
"""A value over this size goes to the object store, and the frame carries its reference."""

MAX_STRIKES = 3
"""So many lost workers while a call runs alone quarantine it (PROTOCOL.md, rule 4)."""

Plain = None | bool | int | float | str | bytes | tuple["Plain", ...] | Mapping[str, "Plain"]


class Priority(StrEnum):
    """Which of a pool's queues a call waits in; workers empty the higher ones first."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


class Suspicion(IntEnum):
    """What is known of a call in the suspects queue (PROTOCOL.md, rule 4).

    A redelivery says that a worker was lost, not who was to blame. So it counts against a call only
    if that call is known to have run with nothing else on its worker (promise P5).

    ``SHARED``: it may run beside others; most suspects only had a bad neighbour. ``APART``: lost
    again, so from now on it runs by itself, once some worker has nothing else to do. ``ALONE``:
    that worker is empty and is about to start it; a redelivery now is a strike.
    """

    SHARED = 0
    APART = 1
    ALONE = 2


class Status(IntEnum):
    """How a result came about.

    ``OK``: the payload is the encoded value. ``ERROR``: the target raised; the payload describes
    the exception. ``FAILED``: the call did not end by itself (timeout, lost, cancelled…); the
    payload names the error class. ``ITEM``: one item of a stream, more to come. ``AGAIN``: an
    ``ERROR`` that the call's retry policy names; its custodian decides what becomes of it.
    """

    OK = 0
    ERROR = 1
    FAILED = 2
    ITEM = 3
    AGAIN = 4


class EventKind(StrEnum):
    """What an event tells: a line of output, or progress."""

    STDOUT = "stdout"
    STDERR = "stderr"
    PROGRESS = "progress"


@dataclass(frozen=True, slots=True)
class Target:
    """What a call runs.

    Args:
        name: ``module:qualname``; for a target by value only its name in messages.
        sha256: Of the cloudpickled object in the store under ``targets/``; ``""`` by reference.
        size: Of that object, in bytes.
        python: ``major.minor`` that pickled it: code by value needs the same Python.
    """

    name: str
    sha256: str = ""
    size: int = 0
    python: str = ""


@dataclass(frozen=True, slots=True)
class CallSpec:
    """What all calls of a frame share.

    Args:
        target: What to run.
        resources: The resource class, as in queue names: ``c1``, ``c2-m4-g1``.
        timeout_s: Run timeout in seconds; 0 for none.
        grace_s: From the soft timeout (an exception in the call) to the hard one (its end).
        echo: Print the call's output on the client's console.
        label: The name the user knows the service by.
        track: Keep the call's story in the ledger, where an orchestrator does so.
        retry_on: Exceptions after which the custodian may try again, as ``module.qualname``.
        exit_codes: The same for a call that exits, by its code.
        at_most_once: Never start it twice; a lost run is its end (PROTOCOL.md, promise P3).
    """

    target: Target
    resources: str = "c1"
    timeout_s: float = 0.0
    grace_s: float = 5.0
    echo: bool = True
    label: str = ""
    track: bool = True
    retry_on: tuple[str, ...] = ()
    exit_codes: tuple[int, ...] = ()
    at_most_once: bool = False

    @property
    def limit_s(self) -> float:
        """How long a call may run until its worker ends it; 0 for ever."""
        return self.timeout_s + self.grace_s if self.timeout_s else 0.0


class Call(NamedTuple):
    """One call of a frame.

    Attributes:
        counter: Its number at its client.
        payload: Encoded arguments; empty if they are the first of ``refs``.
        refs: Objects that the arguments name, fetched to the node before the call starts. With
            an empty payload the first one holds the arguments themselves.
    """

    counter: int
    payload: bytes
    refs: tuple[ObjectRef, ...] = ()


@dataclass(frozen=True, slots=True)
class CallFrame:
    """Calls on their way to a worker. Everything but ``calls`` is their circumstances.

    Args:
        queue: The queue that it is signed for.
        reply: The queue that takes the results.
        client: Whose counters these are.
        spec: What all the calls share.
        calls: One or more.
        attempt: 1 for the first try, one more for each retry.
        strikes: How often the call lost its worker while it ran alone.
        suspicion: See ``Suspicion``.
        handed: How often it was handed back, so that a copy never equals its original.
        expires_at: When a call that has not started is too late, in seconds since 1970; 0: never.
    """

    queue: str
    reply: str
    client: str
    spec: CallSpec
    calls: tuple[Call, ...]
    attempt: int = 1
    strikes: int = 0
    suspicion: Suspicion = Suspicion.SHARED
    handed: int = 0
    expires_at: float = 0.0


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and when a call that failed is tried again; what for, its ``CallSpec`` says.

    Args:
        attempts: In all, the first included.
        backoff_s: The longest pause before the second attempt, in seconds.
        factor: By how much it grows with each attempt more.
        jitter: Pause for a random part of it, so that calls that failed together come apart.
    """

    attempts: int
    backoff_s: float
    factor: float
    jitter: bool


class Limitation(NamedTuple):
    """A call starts only while fewer calls with the same key are under way.

    Attributes:
        key: What they share.
        calls: How many of them there may be, this one included.
    """

    key: str
    calls: int


@dataclass(frozen=True, slots=True)
class Deposit:
    """Calls that need time: the orchestrator keeps them and has them run (PROTOCOL.md, rule 7).

    Args:
        queue: The custody queue, that it is signed for.
        frame: The calls as a worker gets them, but for their reply address, which is the client's.
        due: When each call may start at the earliest, in seconds since 1970; 0: at once.
        keys: What each call is to be done once for; ``""``: it stands for itself.
        retry: None to try once.
        queue_timeout_s: How long each attempt may wait for a worker; 0 for ever.
        after: The ids of the calls that each call waits for; empty if none waits for any.
        limits: The limit that each call is under; empty if none is.
    """

    queue: str
    frame: CallFrame
    due: tuple[float, ...]
    keys: tuple[str, ...]
    retry: RetryPolicy | None = None
    queue_timeout_s: float = 0.0
    after: tuple[tuple[str, ...], ...] = ()
    limits: tuple[Limitation | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Claim:
    """A worker asks for the lease on calls that it has (PROTOCOL.md, rules 4 to 6).

    The answer is a control frame ``leased``. Once a lease is granted, the orchestrator has the
    call itself, and the worker takes it off its queue.

    Args:
        queue: The custody queue, that it is signed for.
        frame: The calls, as they were delivered.
        run: Which start of them this is; a lease is for one.
        worker: Who asks.
        reply: Where the answer goes.
        look: Only say whether somebody else may be running them.
    """

    queue: str
    frame: CallFrame
    run: str
    worker: str
    reply: str
    look: bool = False


class Result(NamedTuple):
    """The outcome of one call, or one item of its stream.

    Attributes:
        counter: The call's number at its client.
        status: See ``Status``.
        payload: The encoded value or description; empty if ``ref`` is set.
        ref: Where a large value lies.
        index: Position of an ``ITEM`` in its stream; of a final result, how many items preceded.
    """

    counter: int
    status: Status
    payload: bytes
    ref: ObjectRef | None = None
    index: int = 0  # type: ignore[assignment]  # nobody asks a result for tuple.index


@dataclass(frozen=True, slots=True)
class ResultFrame:
    """Results on their way to a client's reply queue; all of calls to one target.

    Args:
        queue: The reply queue.
        client: Whose calls these were.
        worker: Who ran them.
        results: One or more.
        attempt: Of the calls.
        seconds: That the children spent on these results together; 0 if nobody measured.
    """

    queue: str
    client: str
    worker: str
    results: tuple[Result, ...]
    attempt: int = 1
    seconds: float = 0.0


class Event(NamedTuple):
    """Something a running call says: output, or ``(fraction, text)`` as progress.

    Attributes:
        counter: The call's number at its client.
        kind: See ``EventKind``.
        text: A line of output, or what the progress says.
        fraction: Of progress, 0 to 1.
        run: Which run of a call this is, among those that printed on this worker, from 1 on; 0 if
            nobody counts.
        index: Of a line in its run, from 0 on: so a line that was dropped, or came twice, shows.
    """

    counter: int
    kind: EventKind
    text: str
    fraction: float = 0.0
    run: int = 0
    index: int = 0  # type: ignore[assignment]  # hides tuple.index, as in Result


@dataclass(frozen=True, slots=True)
class EventFrame:
    """Telemetry for one client; it may be dropped under load.

    Args:
        queue: The logs exchange, that it is signed for.
        client: Whose calls these are.
        worker: Who runs them.
        label: The name of the service.
        events: One or more.
        attempt: Of the calls.
        at: When the worker heard of the first event, in seconds since 1970.
        echo: Print the output on the client's console.
    """

    queue: str
    client: str
    worker: str
    label: str
    events: tuple[Event, ...]
    attempt: int = 1
    at: float = 0.0
    echo: bool = True


@dataclass(frozen=True, slots=True)
class ControlFrame:
    """A word to all workers of a key, or an answer to one.

    Verbs: ``cancel`` (client, counters, spare_running), ``expire`` (client, counters, reply)
    answered by ``running`` (client, counters: those that have started at a worker, which keeps
    silent if none has), ``hello`` (reply) answered by ``here`` (facts of a worker), ``class`` (a
    resource class that exists in a pool), ``drain`` (worker).

    Of the orchestrator that leads, each with its epoch: ``leads`` (lease_s), every two seconds;
    ``leased`` (run, granted, refused: counters), the answer to a ``Claim``; ``reclaim`` (runs that
    it has no lease for). To it: ``release`` (client, counters, run: not started after all), and
    ``beat`` (worker, runs), by which leases are renewed.
    """

    queue: str
    verb: str
    arguments: Mapping[str, Plain] = field(default_factory=dict)


Frame = CallFrame | ResultFrame | EventFrame | ControlFrame | Deposit | Claim


def call_id(client: str, counter: int) -> str:
    """The id that users see.

    >>> call_id("k3j9", 17)
    'k3j9-17'
    """
    return f"{client}-{counter}"


def parse_call_id(text: str) -> tuple[str, int]:
    """Split an id into client and counter.

    Raises:
        ValueError: Not of the form ``<client>-<counter>``.

    >>> parse_call_id("k3j9-17")
    ('k3j9', 17)
    """
    client, dash, counter = text.rpartition("-")
    if not dash or not client or not counter.isdecimal():
        raise ValueError(f"{text!r} is not a call id; expected <client>-<number>, as 'k3j9-17'")
    return client, int(counter)


def is_plain(text: str) -> bool:
    """Whether every database and terminal takes a text: no zeros, no halves of characters."""
    return "\0" not in text and not any("\ud800" <= char <= "\udfff" for char in text)
