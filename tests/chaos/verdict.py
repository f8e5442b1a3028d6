"""The judgement: what a call may come to, given what was done to whom and when."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import groupby

from chaos.calls import CANCELLED, VALUE, Seen
from chaos.faults import BROKER, Disturbance
from chaos.plan import CallKind, FaultKind, PlannedCall
from chaos.stage import CLIENT
from chaos.told import SUCCEEDED, Told
from chaos.traces import Run
from flame.errors import WorkerLost

__all__ = ["Breach", "Record", "Rule", "Trouble", "Verdict", "judge"]

_IN_HAND_S = 5.0
"""How long a worker may have had a call before it starts it."""

_AFTERMATH_S = 1.0
_STRIKES = 3
_EARLY_S = 0.05  # clocks are read in two processes
_STOPS_IN_S = 10.0

_OWN_ERROR = ConnectionResetError.__name__
_LOST = WorkerLost.__name__


class Rule(StrEnum):
    """What must hold."""

    RESOLVED = "every future resolves, once"
    RIGHT = "with the right value or error"
    TOLD = "the history agrees"
    RAN = "what has an outcome has run"
    ONCE = "once only, while its worker is connected, or at most once"
    TIME = "not before its time"
    STOPPED = "not after its cancel"
    ORDERLY = "processes live, queues empty, no traceback"


@dataclass(frozen=True, slots=True)
class Record:
    """All that is known of a call."""

    call: PlannedCall
    seen: Seen
    runs: tuple[Run, ...]
    told: Told


@dataclass(frozen=True, slots=True)
class Breach:
    """A rule that does not hold.

    Args:
        rule: Which.
        number: For which call of the plan; None where it is about none.
        text: What is there instead.
    """

    rule: Rule
    number: int | None
    text: str


@dataclass(slots=True)
class Verdict:
    """What the judgement comes to.

    Attributes:
        breaches: What is wrong.
        checked: For how many calls each rule was looked at.
        again: Why calls ran again, in calls.
        calm: Calls in whose life nobody lost a connection.
    """

    breaches: list[Breach] = field(default_factory=list)
    checked: Counter[Rule] = field(default_factory=Counter)
    again: Counter[str] = field(default_factory=Counter)
    calm: int = 0


class Trouble:
    """Who was parted from the broker, and when.

    Args:
        disturbances: The faults that were made.
        losses: When each party lost a connection, whatever the cause, in seconds since 1970.
    """

    def __init__(
        self, disturbances: Iterable[Disturbance], losses: Mapping[str, Sequence[float]]
    ) -> None:
        self._windows = [(party, at, at) for party, times in losses.items() for at in times]
        self._killed: dict[int, float] = {}
        for one in disturbances:
            if one.loses_connections:
                self._windows.append((one.party, one.began, one.ended))
            elif one.kind is FaultKind.KILL_CHILD:
                self._killed[one.pid] = one.began
        self._alarms = [
            (one.began, one.ended) for one in disturbances if one.kind is FaultKind.FILL_DISK
        ]

    def count(self, since: float, until: float, *parties: str) -> int:
        """How often one of these lost the broker in this time; everybody, if none is named.

        A party is named by how its name begins; whoever has no broker is parted from it too.
        """
        wanted = (*parties, BROKER) if parties else ("",)
        return sum(
            party.startswith(wanted) and began <= until + _AFTERMATH_S and ended >= since
            for party, began, ended in self._windows
        )

    def blocked(self, since: float, until: float) -> bool:
        """Whether the broker took nothing for some of this time."""
        return any(began <= until and ended >= since for began, ended in self._alarms)

    def killed(self, runs: Iterable[Run]) -> bool:
        """Whether one of these was ended with its child."""
        return any(run.ended is None and run.pid in self._killed for run in runs)

    def killed_between(self, since: float, until: float) -> bool:
        """Whether any child was killed in this time."""
        return any(since <= at <= until for at in self._killed.values())


def judge(records: Iterable[Record], trouble: Trouble) -> Verdict:
    """Look at every call by every rule."""
    verdict = Verdict()
    for record in records:
        for rule, complaints in _RULES:
            verdict.checked[rule] += 1
            verdict.breaches += [
                Breach(rule, record.call.number, text) for text in complaints(record, trouble)
            ]
        for reason in _reasons_to_run_again(record, trouble):
            verdict.again[reason] += 1
        verdict.calm += not trouble.count(record.seen.made, _last(record))
    return verdict


def _resolved(record: Record, trouble: Trouble) -> Iterator[str]:
    seen = record.seen
    if not seen.times or not seen.end:
        yield f"{seen.id} was never resolved"
    elif seen.times > 1:
        yield f"{seen.id} was resolved {seen.times} times"


def _right(record: Record, trouble: Trouble) -> Iterator[str]:
    call, seen = record.call, record.seen
    if not seen.end:
        return
    if not seen.right:
        yield f"{seen.id} ended with a wrong {seen.end}: {seen.detail or 'not what it computes'}"
    elif not _may_end_so(record, trouble):
        yield f"{seen.id}, a {call.kind} call, ended as {seen.end}: {seen.detail}"
    elif seen.end == VALUE and seen.run not in {run.name for run in record.runs if run.ended}:
        yield f"{seen.id} has the value of a run that never ended"


def _may_end_so(record: Record, trouble: Trouble) -> bool:
    call, seen = record.call, record.seen
    life = seen.made, seen.resolved
    succeeds = call.failures < max(1, call.attempts)
    causes: dict[str, Callable[[], bool]] = {
        VALUE: lambda: succeeds,
        _OWN_ERROR: lambda: not succeeds,
        CANCELLED: lambda: seen.cancelled > 0,
        # One that was about to start leaves no trace.
        _LOST: lambda: (
            trouble.killed(record.runs)
            or trouble.killed_between(*life)
            or (call.kind is CallKind.AT_MOST_ONCE and trouble.count(*life, "worker") > 0)
        ),
        "Quarantined": lambda: trouble.count(*life, "worker") >= _STRIKES,
        "BrokerUnavailable": lambda: trouble.count(*life, CLIENT) > 0 or trouble.blocked(*life),
    }
    return seen.end in causes and causes[seen.end]()


def _told(record: Record, trouble: Trouble) -> Iterator[str]:
    seen, told = record.seen, record.told
    if not _differs(record):
        return
    story = f"{told.state or 'nothing'} {told.error or told.run}".strip()
    yield f"{seen.id} ended as {seen.end or 'nothing'} {seen.run}, and the history tells of {story}"


def _differs(record: Record) -> bool:
    told = record.told
    return not _agree(record) or bool(told.run and told.run != record.seen.run)


def _agree(record: Record) -> bool:
    seen, told = record.seen, record.told
    if seen.end == VALUE:
        return told.state == SUCCEEDED
    if seen.end == CANCELLED:  # at once here; it may have ended before its worker heard of it
        unknown = not record.runs  # it may have gone before it was sent
        return told.state in ("cancelled", SUCCEEDED, "failed") or (not told.state and unknown)
    if seen.end == "Quarantined":
        return told.state == "quarantined"
    if seen.end == "BrokerUnavailable":
        return True  # nobody knows whether the broker had it
    return (told.state, told.error) == ("failed", seen.end)


def _ran(record: Record, trouble: Trouble) -> Iterator[str]:
    ended = [run for run in record.runs if run.ended]
    if record.seen.end in (VALUE, _OWN_ERROR) and not ended:
        yield f"{record.seen.id} has an outcome, and never ran"


def _once(record: Record, trouble: Trouble) -> Iterator[str]:
    for since, runs in _by_attempt(record):
        if len(runs) == 1:
            continue
        if record.call.kind is CallKind.AT_MOST_ONCE:
            where = ", ".join(map(_place, record.runs))
            yield f"{record.seen.id} was to run at most once, and ran {len(runs)} times: {where}"
            continue
        where = ", ".join(map(_place, record.runs))
        if not _excuse(record, since, runs, trouble):
            yield f"{record.seen.id} ran {len(runs)} times, and nobody was parted: {where}"
        elif len(runs) > 1 + trouble.count(since, runs[-1].began):
            yield f"{record.seen.id} ran {len(runs)} times, more often than was lost: {where}"


def _place(run: Run) -> str:
    end = "" if run.ended is None else f" to {run.ended:.2f}"
    return f"attempt {run.attempt} on {run.seat} ({run.pid}) from {run.began:.2f}{end}"


def _reasons_to_run_again(record: Record, trouble: Trouble) -> set[str]:
    groups = [(since, runs) for since, runs in _by_attempt(record) if len(runs) > 1]
    return {_excuse(record, since, runs, trouble) or "no reason" for since, runs in groups}


def _by_attempt(record: Record) -> Iterator[tuple[float, list[Run]]]:
    """The runs of each attempt, and when that may have been sent first."""
    since = record.seen.made
    ordered = sorted(record.runs, key=lambda run: (run.attempt, run.began))
    for _, group in groupby(ordered, key=lambda run: run.attempt):
        runs = list(group)
        yield since, runs
        since = max(since, runs[0].began)  # a late run of it may begin after the next attempt


def _excuse(record: Record, since: float, runs: Sequence[Run], trouble: Trouble) -> str:
    """Why an attempt may have run more than once; nothing if it may not."""
    first, last = runs[0].began, runs[-1].began
    if trouble.count(first - _IN_HAND_S, last, *{run.seat for run in runs}):
        return "its worker was parted from the broker"
    if trouble.count(since, first, "worker"):
        return "a worker that had it before was parted"
    if trouble.count(since, first, CLIENT):
        return "the client was parted, and sent it again"
    if record.call.kept and trouble.count(since, last, "orchestrator"):
        return "the orchestrator was parted, and sent it again"
    return ""


def _in_time(record: Record, trouble: Trouble) -> Iterator[str]:
    due = record.seen.made + record.call.delay_s
    if record.runs and record.runs[0].began < due - _EARLY_S:
        yield f"{record.seen.id} started {due - record.runs[0].began:.2f} s too early"


def _stopped(record: Record, trouble: Trouble) -> Iterator[str]:
    since = record.seen.cancelled
    for run in record.runs if since else ():
        # Nobody could say it, hear of it or remember it.
        away = trouble.count(since - _AFTERMATH_S, run.began, CLIENT, run.seat, "orchestrator")
        if run.began > since + _STOPS_IN_S and not (away or trouble.blocked(since, run.began)):
            yield f"{record.seen.id} started {run.began - since:.1f} s after it was cancelled"


def _last(record: Record) -> float:
    return max([record.seen.resolved, *(run.began for run in record.runs)])


_RULES = (
    (Rule.RESOLVED, _resolved),
    (Rule.RIGHT, _right),
    (Rule.TOLD, _told),
    (Rule.RAN, _ran),
    (Rule.ONCE, _once),
    (Rule.TIME, _in_time),
    (Rule.STOPPED, _stopped),
)
