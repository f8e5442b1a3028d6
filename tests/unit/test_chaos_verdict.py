"""The chaos program's verdict: it lets pass what may happen, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from chaos.calls import Seen
from chaos.faults import Disturbance
from chaos.plan import ATTEMPTS, NEVER_GOOD, CallKind, FaultKind, PlannedCall
from chaos.told import Told
from chaos.traces import Run
from chaos.verdict import Record, Rule, Trouble, judge

CALM = Trouble([], {})


def run(name: str = "a", began: float = 101.0, **facts: Any) -> Run:
    known: dict[str, Any] = {"seat": "worker-0", "pid": 7, "attempt": 1, "ended": began + 1}
    return Run(name=name, began=began, **{**known, **facts})


PLAIN = Record(
    PlannedCall(0, 0.0, CallKind.PLAIN, 1.0),
    Seen("c-1", 100.0, resolved=102.1, times=1, end="value", run="a"),
    (run(),),
    Told("succeeded", run="a"),
)
FAILING = Record(
    PlannedCall(1, 0.0, CallKind.FAILING, 1.0, failures=NEVER_GOOD),
    Seen("c-2", 100.0, resolved=102.1, times=1, end="ConnectionResetError"),
    (run(),),
    Told("failed", "ConnectionResetError"),
)
RETRIED = Record(
    PlannedCall(2, 0.0, CallKind.RETRIED, 1.0, failures=1, attempts=ATTEMPTS),
    Seen("c-3", 100.0, resolved=104.1, times=1, end="value", run="b"),
    (run(), run("b", 103.0, attempt=2)),
    Told("succeeded", run="b"),
)
DELAYED = Record(
    PlannedCall(3, 0.0, CallKind.DELAYED, 1.0, delay_s=1.0), PLAIN.seen, PLAIN.runs, PLAIN.told
)
CANCELLED = Record(
    PlannedCall(4, 0.0, CallKind.CANCELLED, 1.0, cancel_after_s=1.0),
    Seen("c-5", 100.0, resolved=101.0, times=1, end="cancelled", cancelled=101.0),
    (),
    Told("cancelled"),
)
ONCE = replace(PLAIN, call=PlannedCall(5, 0.0, CallKind.AT_MOST_ONCE, 1.0))
DOUBLED = replace(PLAIN, runs=(run(), run("b", 103.0, seat="worker-1")))


def seen(record: Record, **changes: Any) -> Record:
    return replace(record, seen=replace(record.seen, **changes))


def broken(record: Record, trouble: Trouble = CALM) -> list[Rule]:
    return [breach.rule for breach in judge([record], trouble).breaches]


def after(kind: FaultKind, party: str, at: float, until: float = 0.0, pid: int = 0) -> Trouble:
    return Trouble([Disturbance(kind, party, at, until or at, pid)], {})


@pytest.mark.parametrize("record", [PLAIN, FAILING, RETRIED, DELAYED, CANCELLED, ONCE])
def test_calls_that_come_to_what_they_should_pass(record: Record) -> None:
    verdict = judge([record], CALM)
    assert verdict.breaches == []
    assert verdict.calm == 1
    assert set(verdict.checked.values()) == {1}


def test_a_lost_call_is_reported() -> None:
    lost = replace(PLAIN, seen=Seen("c-1", 100.0), runs=(), told=Told("queued"))
    assert broken(lost) == [Rule.RESOLVED, Rule.TOLD]


def test_a_future_that_resolves_twice_is_reported() -> None:
    assert broken(seen(PLAIN, times=2)) == [Rule.RESOLVED]


def test_a_wrong_value_is_reported() -> None:
    assert broken(seen(PLAIN, right=False)) == [Rule.RIGHT]


def test_a_value_of_a_run_that_nobody_saw_is_reported() -> None:
    assert broken(replace(seen(PLAIN, run="x"), told=Told("succeeded"))) == [Rule.RIGHT]
    assert Rule.RAN in broken(replace(PLAIN, runs=()))


@pytest.mark.parametrize(
    "error", ["WorkerLost", "Quarantined", "BrokerUnavailable", "NoOrchestrator", "CallExpired"]
)
def test_an_error_without_a_cause_is_reported(error: str) -> None:
    state = "quarantined" if error == "Quarantined" else "failed"
    record = replace(seen(PLAIN, end=error, run=""), told=Told(state, error))
    assert broken(record) == [Rule.RIGHT]


def test_an_error_with_its_cause_passes() -> None:
    lost = replace(
        seen(PLAIN, end="WorkerLost", run=""),
        runs=(run(ended=None),),
        told=Told("failed", "WorkerLost"),
    )
    assert broken(lost, after(FaultKind.KILL_CHILD, "worker-0", 101.5, pid=7)) == []
    away = replace(seen(PLAIN, end="BrokerUnavailable", run=""), told=Told(), runs=())
    assert broken(away, after(FaultKind.CUT_CLIENT, "client", 100.5)) == []
    assert broken(away, after(FaultKind.FILL_DISK, "broker", 99.0, 140.0)) == []


def test_success_of_a_call_that_must_fail_is_reported() -> None:
    assert broken(replace(FAILING, seen=PLAIN.seen, told=PLAIN.told)) == [Rule.RIGHT]


@pytest.mark.parametrize(
    "told",
    [Told(), Told("queued"), Told("failed", "WorkerLost"), Told("succeeded", run="b")],
)
def test_a_story_that_disagrees_is_reported(told: Told) -> None:
    assert broken(replace(PLAIN, told=told)) == [Rule.TOLD]


def test_a_story_of_another_run_of_the_same_call_is_reported() -> None:
    parted = after(FaultKind.CUT_WORKER, "worker-0", 101.5)
    assert broken(DOUBLED, parted) == []
    for told in (Told("succeeded", run="b"), Told("failed", "WorkerLost"), Told("queued")):
        assert broken(replace(DOUBLED, told=told), parted) == [Rule.TOLD]


def test_a_cancelled_call_may_have_ended_otherwise_but_must_have_ended() -> None:
    assert broken(replace(CANCELLED, told=Told("succeeded"))) == []
    assert broken(replace(CANCELLED, told=Told("queued"))) == [Rule.TOLD]


def test_a_doubled_run_is_reported() -> None:
    assert broken(DOUBLED) == [Rule.ONCE]
    assert broken(DOUBLED, after(FaultKind.KILL_CHILD, "worker-0", 101.5, pid=7)) == [Rule.ONCE]
    assert broken(DOUBLED, after(FaultKind.KILL_ORCHESTRATOR, "orchestrator-0", 101.5)) == [
        Rule.ONCE
    ]
    assert broken(DOUBLED, after(FaultKind.CUT_WORKER, "worker-2", 102.5)) == [Rule.ONCE]


@pytest.mark.parametrize(
    ("kind", "party", "at"),
    [
        (FaultKind.CUT_WORKER, "worker-0", 101.5),
        (FaultKind.KILL_BROKER, "broker", 101.5),
        (FaultKind.CUT_WORKER, "worker-2", 100.5),  # it had it first, and handed it back
        (FaultKind.CUT_CLIENT, "client", 100.5),
    ],
)
def test_a_doubled_run_of_a_call_whose_holder_was_parted_passes(
    kind: FaultKind, party: str, at: float
) -> None:
    verdict = judge([DOUBLED], after(kind, party, at))
    assert verdict.breaches == []
    assert verdict.calm == 0
    assert sum(verdict.again.values()) == 1


def test_a_second_run_of_what_must_run_at_most_once_is_reported_whoever_was_parted() -> None:
    twice = replace(DOUBLED, call=ONCE.call)
    assert broken(twice, after(FaultKind.KILL_BROKER, "broker", 101.5)) == [Rule.ONCE]


def test_what_must_run_at_most_once_may_be_lost_with_its_worker() -> None:
    lost = replace(
        seen(ONCE, end="WorkerLost", run=""),
        runs=(run(ended=None),),
        told=Told("failed", "WorkerLost"),
    )
    assert broken(lost, after(FaultKind.KILL_WORKER, "worker-0", 101.5)) == []
    assert broken(lost) == [Rule.RIGHT]
    plain = replace(lost, call=PLAIN.call)
    assert Rule.RIGHT in broken(plain, after(FaultKind.KILL_WORKER, "worker-0", 101.5))


def test_a_connection_that_was_lost_without_a_fault_counts_too() -> None:
    assert broken(DOUBLED, Trouble([], {"worker-0": [101.5]})) == []


def test_more_runs_than_there_were_losses_are_reported() -> None:
    thrice = replace(DOUBLED, runs=(*DOUBLED.runs, run("c", 105.0)))
    assert broken(thrice, after(FaultKind.CUT_WORKER, "worker-0", 101.5)) == [Rule.ONCE]


def test_a_call_that_starts_before_its_time_or_long_after_its_cancel_is_reported() -> None:
    assert broken(replace(DELAYED, runs=(run(began=100.5),))) == [Rule.TIME]
    late = replace(CANCELLED, runs=(run(began=120.0),))
    assert broken(late) == [Rule.STOPPED]
    assert broken(late, after(FaultKind.CUT_WORKER, "worker-2", 110.0)) == [Rule.STOPPED]
    assert broken(late, after(FaultKind.KILL_ORCHESTRATOR, "orchestrator-0", 101.0)) == []
    assert broken(late, after(FaultKind.FILL_DISK, "broker", 99.0, 119.0)) == []
