"""Calls in the orchestrator's custody: one end each, whatever comes twice, late or in between."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from time import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from flame_broker.errors import CallCancelled, CallTimeout, FlameError, WorkerLost
from flame_broker.messages import Result, RetryPolicy, Status
from flame_broker.outcomes import describe
from flame_orchestrator.custody import Fenced
from flame_orchestrator.letters import Letter
from flame_orchestrator.schema import kept
from flame_orchestrator.states import CallState
from lab.desk import ANY, AT_ONCE, Desk, again, cancel, deposit, failed, good, outcome


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def statuses(results: Iterable[Result]) -> list[Status]:
    return [result.status for result in results]


def test_a_call_waits_until_it_is_due_and_is_queued_once(desk: Desk) -> None:
    desk.take(deposit(1, due=time() + 1000), deposit(2))
    assert (desk.state(1), desk.state(2)) == ("waiting", "waiting")
    assert [call.frame.calls[0].counter for call in desk.start_due()] == [2]
    assert desk.start_due() == []
    assert (desk.state(1), desk.state(2)) == ("waiting", "queued")
    assert desk.custody.next_due(time()) == pytest.approx(time() + 1000, abs=60)
    waiting = desk.history.calls(state=CallState.WAITING, limit=10)
    assert [facts["id"] for facts in waiting] == ["c-1"]


def test_a_failed_attempt_is_tried_again_and_the_client_hears_of_the_end_only(desk: Desk) -> None:
    desk.take(deposit(1, retry=AT_ONCE))
    for attempt in (1, 2):
        assert [call.attempt for call in desk.start_due()] == [attempt]
        desk.take(outcome(again(1), attempt=attempt))
        assert desk.state(1) == "waiting"
        assert not desk.told
    story = desk.history.story("c", 1)
    assert story is not None
    assert (story["attempt"], story["reason"]) == (3, "OSError: not yet")
    desk.start_due()
    desk.take(outcome(good(1), attempt=3))
    assert statuses(desk.told["c-1"]) == [Status.OK]
    assert desk.state(1) == "succeeded"


def test_the_last_attempt_ends_as_the_error_that_it_raised(desk: Desk) -> None:
    desk.take(deposit(1, retry=AT_ONCE))
    for attempt in (1, 2, 3):
        desk.start_due()
        desk.take(outcome(again(1), attempt=attempt))
    assert desk.start_due() == []
    assert statuses(desk.told["c-1"]) == [Status.ERROR]
    assert desk.state(1) == "failed"


@pytest.mark.parametrize(
    ("on", "kind", "tried_again"),
    [
        (ANY, WorkerLost, True),
        (("flame_broker.errors.WorkerLost",), WorkerLost, True),
        (("flame_broker.errors.CallTimeout",), WorkerLost, False),
        (("builtins.OSError",), CallTimeout, False),
        (ANY, CallCancelled, False),
    ],
)
def test_what_the_cluster_did_to_a_call_is_judged_here(
    desk: Desk, on: tuple[str, ...], kind: type[FlameError], tried_again: bool
) -> None:
    desk.take(deposit(1, retry=AT_ONCE, on=on))
    desk.start_due()
    desk.take(outcome(failed(1, kind)))
    assert bool(desk.start_due()) is tried_again
    assert bool(desk.told) is not tried_again


def test_a_pause_grows_up_to_a_day_and_jitter_takes_a_part_of_it(desk: Desk) -> None:
    desk.take(deposit(1, retry=RetryPolicy(9, 100.0, 1e200, jitter=False)))
    desk.take(deposit(2, retry=RetryPolicy(9, 100.0, 2.0, jitter=True)))
    for expected_s in (100, 24 * 3600, 24 * 3600):
        calls = {call.frame.calls[0].counter: call for call in desk.custody.due(1e12, 10)}
        desk.custody.queued(desk.epoch, calls.values())
        desk.take(outcome(again(1), attempt=calls[1].attempt))
        desk.take(outcome(again(2), attempt=calls[2].attempt))
        with desk.engine.connect() as connection:
            due = connection.execute(select(kept.c.counter, kept.c.due_at)).all()
        pauses = {counter: due_at - time() for counter, due_at in due}
        assert pauses[1] == pytest.approx(expected_s, abs=60)
        assert pauses[2] < 100 * 2 ** (calls[2].attempt - 1)


def test_a_late_failure_of_an_earlier_attempt_counts_no_more(desk: Desk) -> None:
    desk.take(deposit(1, retry=AT_ONCE))
    desk.start_due()
    desk.take(outcome(again(1)))
    desk.start_due()
    desk.take(outcome(again(1), worker="another"))
    assert desk.state(1) == "queued"
    desk.take(outcome(good(1), worker="a third"))
    assert statuses(desk.told["c-1"]) == [Status.OK]


def test_an_attempt_that_ends_before_it_is_noted_as_queued_is_not_forgotten(desk: Desk) -> None:
    desk.take(deposit(1, retry=AT_ONCE))
    calls = desk.custody.due(time(), 10)
    desk.take(outcome(again(1)))
    desk.custody.queued(desk.epoch, calls)
    assert [call.attempt for call in desk.start_due()] == [2]


def test_items_of_a_stream_pass_at_once(desk: Desk) -> None:
    desk.take(deposit(1, retry=AT_ONCE))
    item = Result(1, Status.ITEM, b"x", None, 0)
    desk.take(outcome(item))
    assert desk.told["c-1"] == [item]
    assert desk.state(1) == "waiting"


def test_a_second_call_with_a_key_gets_the_outcome_of_the_first(desk: Desk) -> None:
    desk.take(deposit(1, key="nightly"), deposit(2, key="nightly"))
    desk.take(deposit(1, client="d", key="nightly"), deposit(3, key="another"))
    started = {call.frame.calls[0].counter for call in desk.start_due()}
    assert started == {1, 3}
    desk.take(outcome(good(1)))
    desk.take(deposit(4, key="nightly"))
    for call in ("c-1", "c-2", "d-1", "c-4"):
        assert [result.payload for result in desk.told[call]] == [good(1).payload]
    assert (desk.state(2), desk.state(4), desk.state(1, "d")) == ("succeeded",) * 3


def test_a_key_is_free_again_when_its_call_is_forgotten(desk: Desk) -> None:
    desk.take(deposit(1, key="nightly"))
    desk.take(outcome(good(1)))
    assert desk.custody.forget(before=time() + 1) == 1
    desk.take(deposit(2, key="nightly"))
    assert len(desk.start_due()) == 1


def test_a_cancel_ends_what_waits_and_spares_what_runs_if_told_to(desk: Desk) -> None:
    desk.take(deposit(1, 2, due=time() + 1000), deposit(3, 4))
    desk.start_due()
    desk.take(cancel(1, 3, spare_running=True), cancel(4), cancel(77), cancel(1, client="d"))
    assert [desk.state(counter) for counter in (1, 2, 3, 4)] == [
        "cancelled", "waiting", "queued", "cancelled"
    ]  # fmt: skip
    assert describe(desk.told["c-1"][0])[0] == "CallCancelled"
    desk.take(outcome(good(4)))
    assert len(desk.told["c-4"]) == 1


def test_a_letter_that_comes_again_tells_the_same_and_changes_nothing(desk: Desk) -> None:
    for result in (good(1), again(1)):
        desk.take(deposit(1))
        ending = outcome(result)
        desk.take(ending)
        desk.take(ending)
        desk.take(deposit(1))
        assert desk.start_due() == []
        assert len({*desk.told["c-1"]}) == 1
    assert desk.told["c-1"][0] == good(1)


def test_a_follower_is_told_once_although_the_end_comes_twice(desk: Desk) -> None:
    second = deposit(2, key="k")
    desk.take(deposit(1, key="k"), second)
    ending = outcome(good(1))
    desk.take(ending)
    desk.take(ending, second)
    assert {result.payload for result in desk.told["c-2"]} == {good(1).payload}


def test_a_cancel_of_a_whole_map_is_taken_at_once(desk: Desk) -> None:
    desk.take(deposit(1, 65_000, due=time() + 1000))
    desk.take(cancel(*range(70_000)))
    assert (desk.state(1), desk.state(65_000)) == ("cancelled", "cancelled")


@pytest.mark.parametrize(
    "strange",
    [
        deposit(2**31),
        deposit(-1),
        deposit(1, key="\0"),
        deposit(1, client="\ud800"),
        outcome(good(2**40)),
        cancel(2**63),
        cancel(1, client="c\0"),
    ],
)
def test_what_no_database_can_hold_is_known_before_it_stops_all_others(strange: Letter) -> None:
    assert not strange.can_be_kept
    assert deposit(1, key="nightly").can_be_kept


def test_whoever_does_not_lead_any_more_writes_nothing(desk: Desk) -> None:
    desk.take(deposit(1))
    calls = desk.custody.due(time(), 10)
    assert desk.custody.lead("another") > desk.epoch
    with pytest.raises(Fenced):
        desk.take(outcome(good(1)))
    with pytest.raises(Fenced):
        desk.custody.queued(desk.epoch, calls)
    assert desk.state(1) == "waiting"


def _happens(desk: Desk, chance: random.Random, letters: list[Letter]) -> list[Letter]:
    """One thing of those that may happen next; the letters that it has brought."""
    fresh: list[Letter] = []
    match chance.randrange(6):
        case 0:
            desk.take(chance.choice(letters))
        case 1:
            desk.epoch = desk.custody.lead("another")
        case 2:
            fresh = [cancel(chance.randrange(6), spare_running=chance.random() < 0.8)]
            desk.take(*fresh)
        case _:
            for call in desk.start_due():
                number = call.frame.calls[0].counter
                result = chance.choice([good, again, again, failed])(number)
                worker = f"w{len(letters)}-{len(fresh)}"
                fresh.append(outcome(result, attempt=call.attempt, worker=worker))
            desk.take(*chance.sample([*letters, *fresh], 3))
    return fresh


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 1_000_000))
def test_every_call_ends_once_whatever_comes_twice_late_or_with_a_new_leader(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    chance = random.Random(seed)
    desk = Desk(tmp_path_factory.mktemp("desk"))
    letters = [deposit(n, key=chance.choice(["", "k"]), retry=AT_ONCE) for n in range(6)]
    desk.take(*letters)
    for _ in range(60):
        letters += _happens(desk, chance, letters)
    for waiting in letters:
        desk.take(waiting)
    while calls := desk.start_due():
        desk.take(*(outcome(good(c.frame.calls[0].counter), attempt=c.attempt) for c in calls))
    for number in range(6):
        told = desk.told[f"c-{number}"]
        assert told, f"call {number} was never told of its end"
        assert len(set(told)) == 1, f"call {number} ended in two ways"
        assert desk.state(number) in {"succeeded", "failed", "cancelled"}
        found = desk.history.outcome("c", number)
        assert found is not None
        assert found.final == told[0]
