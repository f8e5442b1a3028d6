"""The chaos program's plan: its seed decides it, and it has some of everything."""

from __future__ import annotations

from collections import Counter

from chaos.plan import CallKind, FaultKind, Plan, make_plan


def plan(seed: int, *, faults: int = 40, kinds: tuple[FaultKind, ...] = tuple(FaultKind)) -> Plan:
    return make_plan(seed, calls=1000, duration_s=60, longest_s=20, faults=faults, kinds=kinds)


def test_the_same_seed_makes_the_same_plan_and_another_one_another() -> None:
    assert plan(7) == plan(7)
    assert plan(7).calls != plan(8).calls
    assert plan(7).faults != plan(8).faults


def test_which_faults_come_does_not_change_the_calls() -> None:
    assert plan(7, kinds=(FaultKind.CUT_CLIENT,)).calls == plan(7).calls


def test_calls_are_of_every_kind_in_order_and_within_their_time() -> None:
    calls = plan(1).calls
    assert [call.number for call in calls] == list(range(1000))
    assert [call.at_s for call in calls] == sorted(call.at_s for call in calls)
    assert {call.kind for call in calls} == set(CallKind)
    assert all(0 <= call.at_s <= 60 and 0.001 <= call.seconds <= 20 for call in calls)
    assert all(call.kept for call in calls if call.kind in (CallKind.RETRIED, CallKind.DELAYED))
    assert all(call.size_bytes > 65_536 for call in calls if call.kind is CallKind.LARGE)


def test_every_fault_comes_once_before_one_comes_again() -> None:
    faults = plan(1).faults
    assert len(faults) == 40
    assert {fault.kind for fault in faults[: len(FaultKind)]} == set(FaultKind)
    assert [fault.at_s for fault in faults] == sorted(fault.at_s for fault in faults)
    assert Counter(fault.kind for fault in plan(2, faults=5000).faults).most_common(1)[0][0] is (
        FaultKind.KILL_CHILD
    )


def test_a_plan_without_faults_is_calm() -> None:
    assert plan(1, kinds=()).faults == ()
