"""What is called and what is broken, and when: the same seed gives the same plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from random import Random

__all__ = [
    "ATTEMPTS",
    "NEVER_GOOD",
    "CallKind",
    "FaultKind",
    "Plan",
    "PlannedCall",
    "PlannedFault",
    "make_plan",
]

NEVER_GOOD = 1_000_000
ATTEMPTS = 6

_FIRST_FAULT_S = 1.0
_LONGEST_DELAY_S = 6.0
_LARGE_BYTES = (100_000, 1_000_000)


class CallKind(StrEnum):
    """What is special about a call."""

    PLAIN = "plain"
    LARGE = "large result"
    FAILING = "failing"
    RETRIED = "retried"
    DELAYED = "delayed"
    CANCELLED = "cancelled"
    AT_MOST_ONCE = "at most once"


class FaultKind(StrEnum):
    """What is done, and to whom."""

    KILL_CHILD = "kill-child"
    KILL_WORKER = "kill-worker"
    KILL_ORCHESTRATOR = "kill-orchestrator"
    KILL_BROKER = "kill-broker"
    PAUSE_WORKER = "pause-worker"
    PAUSE_ORCHESTRATOR = "pause-orchestrator"
    PAUSE_BROKER = "pause-broker"
    CUT_WORKER = "cut-worker"
    CUT_ORCHESTRATOR = "cut-orchestrator"
    CUT_CLIENT = "cut-client"
    STALL_WORKER = "stall-worker"
    STALL_CLIENT = "stall-client"
    SLOW_WORKER = "slow-worker"
    SLOW_CLIENT = "slow-client"
    FILL_DISK = "fill-disk"


# How often each comes in a long run, beside the others.
_WEIGHTS = {
    FaultKind.KILL_CHILD: 8,
    FaultKind.KILL_WORKER: 4,
    FaultKind.KILL_ORCHESTRATOR: 3,
    FaultKind.KILL_BROKER: 1,
    FaultKind.PAUSE_WORKER: 2,
    FaultKind.PAUSE_ORCHESTRATOR: 2,
    FaultKind.PAUSE_BROKER: 1,
    FaultKind.CUT_WORKER: 4,
    FaultKind.CUT_ORCHESTRATOR: 2,
    FaultKind.CUT_CLIENT: 3,
    FaultKind.STALL_WORKER: 1,
    FaultKind.STALL_CLIENT: 1,
    FaultKind.SLOW_WORKER: 2,
    FaultKind.SLOW_CLIENT: 2,
    FaultKind.FILL_DISK: 2,
}

_KINDS = (
    (CallKind.PLAIN, 54),
    (CallKind.LARGE, 4),
    (CallKind.FAILING, 6),
    (CallKind.RETRIED, 12),
    (CallKind.DELAYED, 8),
    (CallKind.CANCELLED, 10),
    (CallKind.AT_MOST_ONCE, 6),
)


@dataclass(frozen=True, slots=True)
class PlannedCall:
    """One call.

    Args:
        number: Its number in the plan.
        at_s: When it is made, in seconds from the start.
        kind: What is special about it.
        seconds: How long it runs.
        size_bytes: Of its result.
        failures: The attempts that fail.
        attempts: How many its policy allows; 0 for a call without one.
        delay_s: For a delayed call: how much later it may start.
        cancel_after_s: For a cancelled call: how long it is wanted.
    """

    number: int
    at_s: float
    kind: CallKind
    seconds: float
    size_bytes: int = 0
    failures: int = 0
    attempts: int = 0
    delay_s: float = 0.0
    cancel_after_s: float = 0.0

    @property
    def kept(self) -> bool:
        """Whether the orchestrator keeps it."""
        return bool(self.attempts or self.delay_s) or self.kind is CallKind.AT_MOST_ONCE


@dataclass(frozen=True, slots=True)
class PlannedFault:
    """One fault.

    Args:
        at_s: When, in seconds from the start.
        kind: What is done.
        victim: To which of its kind, as a number; whoever carries it out takes it modulo.
        hold_s: How long a pause, a stall, a slow connection or an alarm lasts.
    """

    at_s: float
    kind: FaultKind
    victim: int
    hold_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What happens in a run.

    Args:
        seed: What it was made of.
        calls: In the order in which they are made.
        faults: In the order in which they come.
    """

    seed: int
    calls: tuple[PlannedCall, ...]
    faults: tuple[PlannedFault, ...]


def make_plan(
    seed: int,
    *,
    calls: int,
    duration_s: float,
    longest_s: float,
    faults: int,
    kinds: Sequence[FaultKind] = tuple(FaultKind),
    pause_s: float = 8.0,
) -> Plan:
    """Make the plan of a seed.

    Args:
        seed: Any number.
        calls: How many.
        duration_s: The time in which they are made and in which faults come.
        longest_s: How long the longest call runs.
        faults: How many; each kind comes once before one comes again.
        kinds: Which.
        pause_s: How long a pause or a stall lasts at least; half as long again at most.
    """
    return Plan(
        seed,
        tuple(_calls(Random(f"calls {seed}"), calls, duration_s, longest_s)),
        tuple(_faults(Random(f"faults {seed}"), faults, duration_s, kinds, pause_s)),
    )


def _calls(dice: Random, count: int, duration_s: float, longest_s: float) -> list[PlannedCall]:
    times = sorted(dice.uniform(0, duration_s) for _ in range(count))
    kinds = [kind for kind, _ in _KINDS]
    weights = [weight for _, weight in _KINDS]
    return [
        _call(dice, number, at_s, dice.choices(kinds, weights)[0], longest_s)
        for number, at_s in enumerate(times)
    ]


def _call(dice: Random, number: int, at_s: float, kind: CallKind, longest_s: float) -> PlannedCall:
    seconds = _length(dice, longest_s)
    match kind:
        case CallKind.LARGE:
            size = dice.randint(*_LARGE_BYTES)
            return PlannedCall(number, at_s, kind, seconds, size_bytes=size)
        case CallKind.FAILING:
            return PlannedCall(number, at_s, kind, seconds, failures=NEVER_GOOD)
        case CallKind.RETRIED:
            failures = dice.choice((1, 1, 2, 3, NEVER_GOOD))
            short = min(seconds, 1.0)
            return PlannedCall(number, at_s, kind, short, failures=failures, attempts=ATTEMPTS)
        case CallKind.DELAYED:
            return PlannedCall(
                number, at_s, kind, seconds, delay_s=dice.uniform(0.2, _LONGEST_DELAY_S)
            )
        case CallKind.CANCELLED:
            wanted = dice.uniform(0, 1.2 * seconds + 0.1)
            return PlannedCall(number, at_s, kind, seconds, cancel_after_s=wanted)
    return PlannedCall(number, at_s, kind, seconds)


def _length(dice: Random, longest_s: float) -> float:
    """Mostly below a second, a few up to the longest: the logarithm is spread evenly in each."""
    shortest, middle = (0.001, 1.0), (1.0, 10.0)
    low, high = dice.choices((shortest, middle, (10.0, 90.0)), (85, 12, 3))[0]
    return float(min(low * (high / low) ** dice.random(), longest_s))


def _faults(
    dice: Random, count: int, duration_s: float, kinds: Sequence[FaultKind], pause_s: float
) -> list[PlannedFault]:
    if not kinds:
        return []
    first = dice.sample([*kinds], len(kinds))
    more = dice.choices([*kinds], [_WEIGHTS[kind] for kind in kinds], k=max(0, count - len(first)))
    dice.shuffle(more)
    room_s = max(0.0, duration_s - _FIRST_FAULT_S) / max(1, count)
    return [
        PlannedFault(
            _FIRST_FAULT_S + room_s * (number + dice.random()),
            kind,
            dice.randrange(60),
            _hold(dice, kind, pause_s),
        )
        for number, kind in enumerate(islice((*first, *more), count))
    ]


def _hold(dice: Random, kind: FaultKind, pause_s: float) -> float:
    if kind in (FaultKind.SLOW_CLIENT, FaultKind.SLOW_WORKER, FaultKind.FILL_DISK):
        return dice.uniform(2, 5)
    return dice.uniform(pause_s, 1.5 * pause_s)
