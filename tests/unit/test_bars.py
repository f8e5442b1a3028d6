"""Calls that wait for others, or for a place under a limit: they start when nothing bars them."""

from __future__ import annotations

from pathlib import Path
from time import time

import pytest

from flame_broker.errors import MalformedMessage, WorkerLost
from flame_broker.frames import decode, encode
from flame_broker.messages import (
    Call,
    CallFrame,
    CallSpec,
    ControlFrame,
    Deposit,
    Limitation,
    ResultFrame,
    Target,
)
from flame_broker.outcomes import describe
from flame_orchestrator.bars import Hopeless
from flame_orchestrator.ledger import Arrival, Ledger
from flame_orchestrator.states import CallState
from lab.bench import KEYRING, frame_of
from lab.desk import (
    AT_ONCE,
    CALLS,
    CUSTODY,
    Desk,
    again,
    cancel,
    claim,
    deposit,
    failed,
    good,
    letter,
    lost,
    outcome,
)

KEY = KEYRING.signer
TWO = Limitation("license", 2)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def started(desk: Desk) -> list[int]:
    """The calls that start now."""
    desk.custody.lift_bars(desk.epoch, time(), None)
    return sorted(call.frame.calls[0].counter for call in desk.start_due())


def hopeless(desk: Desk) -> list[Hopeless]:
    return desk.custody.lift_bars(desk.epoch, time(), None).hopeless


def limited(*counters: int, limit: Limitation = TWO, **changes: object) -> object:
    return deposit(*counters, limits=(limit,) * len(counters), **changes)


def test_a_call_starts_when_the_last_of_those_that_it_waits_for_has_succeeded(desk: Desk) -> None:
    desk.take(
        deposit(1, 2), deposit(3, after=(("c-1", "c-2", "c-1"),)), deposit(4, after=(("c-3",),))
    )
    assert started(desk) == [1, 2]
    story = desk.history.story("c", 3)
    assert story is not None
    assert (story["state"], story["reason"]) == (
        "waiting", "it waits for c-1, c-2 to succeed"
    )  # fmt: skip
    desk.take(outcome(good(1)))
    assert started(desk) == []
    desk.take(outcome(good(2)))
    assert started(desk) == [3]
    desk.take(outcome(good(3)))
    assert started(desk) == [4]


def test_what_a_call_waits_for_is_named_and_whether_anybody_knows_it(desk: Desk) -> None:
    desk.take(deposit(1), deposit(2, after=(("c-1", *(f"nobody-{n}" for n in range(6))),)))
    story = desk.history.story("c", 2)
    assert story is not None
    unknown = ", ".join(f"nobody-{n} (not in the history)" for n in range(4))
    assert story["reason"] == f"it waits for c-1, {unknown}, 2 more to succeed"
    (listed,) = [facts for facts in desk.history.calls(limit=9) if facts["id"] == "c-2"]
    assert listed["reason"] == "it waits for 7 calls to succeed"


def test_what_has_ended_before_is_waited_for_no_more(desk: Desk) -> None:
    desk.take(deposit(1), outcome(good(1)))
    news = desk.take(deposit(2, after=(("c-1",),)))
    assert news.awaited == {"c": {1}}
    assert desk.custody.lift_bars(desk.epoch, time(), {}).more
    assert desk.custody.lift_bars(desk.epoch, time(), {"d": {1}}).more
    assert not desk.custody.lift_bars(desk.epoch, time(), {"c": {1}}).more
    assert started(desk) == [2]


def test_a_call_of_the_brokers_custody_can_be_waited_for(desk: Desk) -> None:
    desk.take(deposit(2, after=(("d-1",),)))
    frame = CallFrame(CALLS, "reply.d", "d", CallSpec(Target("m:f")), (Call(1, b""),))
    ended = ResultFrame("reply.d", "d", "w", (good(1),))
    arrivals = [Arrival(one, encode(one, KEY)) for one in (frame, ended)]
    Ledger(desk.engine).record(arrivals)
    assert started(desk) == [2]


def test_a_call_that_waits_in_vain_ends_and_says_for_what(desk: Desk) -> None:
    desk.take(deposit(1), deposit(2, after=(("c-1",),)), deposit(3, after=(("c-2",),)))
    desk.take(outcome(failed(1, WorkerLost)))
    (found,) = hopeless(desk)
    assert (found.client, found.counter) == ("c", 2)
    about = {"client": "c", "counters": (2,), "reason": found.reason}
    unmet = letter(ControlFrame(CUSTODY, "unmet", about))
    desk.take(unmet)
    desk.take(unmet)
    assert desk.state(2) == "cancelled"
    assert {describe(result) for result in desk.told["c-2"]} == {
        ("CallCancelled", "it was to start after c-1, which failed: WorkerLost: it is so")
    }
    assert [one.counter for one in hopeless(desk)] == [3]


def test_a_call_that_waits_keeps_its_time_and_can_be_cancelled(desk: Desk) -> None:
    later = time() + 1000
    desk.take(deposit(1), deposit(2, due=later, after=(("c-1",),)), deposit(3, after=(("c-1",),)))
    desk.take(cancel(3), outcome(good(1)))
    assert started(desk) == []
    assert desk.custody.next_due(time()) == pytest.approx(later, abs=1)
    assert desk.state(3) == "cancelled"


def test_a_limit_lets_so_many_calls_go_at_a_time_in_their_order(desk: Desk) -> None:
    desk.take(limited(1, 2, 3, 4), limited(5, limit=Limitation("another", 1)), deposit(6))
    assert started(desk) == [1, 2, 5, 6]
    story = desk.history.story("c", 3)
    assert story is not None
    assert "at most 2 calls with the limit 'license'" in story["reason"]
    assert started(desk) == []
    desk.take(outcome(good(2)))
    assert started(desk) == [3]
    desk.take(outcome(failed(1)), cancel(3))
    assert started(desk) == [4]


def test_a_pause_before_the_next_attempt_gives_the_place_to_others(desk: Desk) -> None:
    desk.take(limited(1, retry=AT_ONCE), limited(2, 3))
    assert started(desk) == [1, 2]
    desk.take(outcome(again(1)))
    assert len(started(desk)) == 1
    desk.take(outcome(good(2)))
    assert len(started(desk)) == 1


def test_a_lost_run_keeps_its_place(desk: Desk) -> None:
    desk.take(limited(1, 2, 3))
    assert started(desk) == [1, 2]
    desk.take(claim(1), lost(1, epoch=desk.epoch))
    assert started(desk) == [1]


def test_limits_and_other_calls_bar_together(desk: Desk) -> None:
    one = Limitation("license", 1)
    desk.take(limited(1, limit=one), limited(2, limit=one, after=(("c-3",),)), deposit(3))
    assert started(desk) == [1, 3]
    desk.take(outcome(good(3)))
    assert started(desk) == []
    desk.take(outcome(good(1)))
    assert started(desk) == [2]


def test_the_time_of_a_limited_call_is_not_slept_through(desk: Desk) -> None:
    at = time() + 3
    desk.take(limited(1, due=at), deposit(2, due=at + 60))
    assert started(desk) == []
    assert desk.custody.next_due(time()) == pytest.approx(at)


def test_many_limits_are_looked_at_in_turns_so_that_others_can_write(desk: Desk) -> None:
    desk.take(deposit(*range(500), limits=tuple(Limitation(f"{n % 250}", 1) for n in range(500))))
    turns = [desk.custody.lift_bars(desk.epoch, time(), {}) for _ in range(3)]
    assert [turn.places for turn in turns] == [True, False, False]
    assert [due.frame.calls[0].counter for due in desk.custody.due(time(), 500)] == [*range(250)]
    desk.take(outcome(good(7)))
    desk.custody.lift_bars(desk.epoch, time(), {})
    assert len(desk.custody.due(time(), 500)) == 250
    assert desk.state(257) == "waiting"


def test_those_that_wait_do_not_hide_those_that_are_queued(desk: Desk) -> None:
    Ledger(desk.engine).record([Arrival(frame_of([7]), b"7")])
    for counter in range(1, 6):
        desk.take(limited(counter, limit=Limitation("one", 1)))
    started(desk)
    listed = desk.history.calls(state=CallState.QUEUED, limit=2)
    assert [(facts["id"], facts["state"]) for facts in listed] == [
        ("c-1", "queued"), ("c0-7", "queued")
    ]  # fmt: skip


@pytest.mark.parametrize(
    "terms",
    [{"after": (("nonsense",),)}, {"after": (("c-1",), ("c-2",))}, {"limits": (("k", 0),)}],
)
def test_terms_that_make_no_sense_are_refused_at_the_door(terms: dict[str, object]) -> None:
    calls = CallFrame(CALLS, "reply.c", "c", CallSpec(Target("m:f")), (Call(1, b""),))
    body = encode(Deposit(CUSTODY, calls, (0.0,), ("",), **terms), KEY)  # type: ignore[arg-type]
    with pytest.raises(MalformedMessage):
        decode(body, KEYRING)


def test_terms_travel(desk: Desk) -> None:
    sent = deposit(1, 2, after=(("c-1",), ()), limits=(TWO, None)).frame
    assert decode(encode(sent, KEY), KEYRING) == sent
