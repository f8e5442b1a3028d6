"""A call that ran twice has one outcome for its client and for the history: the client's."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

import pytest

from flame_broker.errors import WorkerLost
from flame_broker.frames import encode, identity
from flame_broker.messages import (
    Call,
    CallFrame,
    CallSpec,
    ControlFrame,
    Result,
    ResultFrame,
    Target,
)
from flame_broker.topology import ledger_queue
from flame_orchestrator.history import History
from flame_orchestrator.ledger import Arrival
from lab.desk import CALLS, KEY, Desk, failed, good

LEDGER = ledger_queue(KEY.hex_id).name


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    yield desk
    desk.engine.dispose()


def calls(*counters: int) -> Arrival:
    frame = CallFrame(
        CALLS, "reply.c", "c", CallSpec(Target("m:f")), tuple(Call(n, b"") for n in counters)
    )
    return Arrival(frame, encode(frame, KEY))


def run_by(worker: str, *results: Result) -> Arrival:
    frame = ResultFrame("reply.c", "c", worker, results)
    return Arrival(frame, encode(frame, KEY))


def refused(results: Arrival, *counters: int, client: object = "c") -> Arrival:
    """The client did not take these, since it had others."""
    word = ControlFrame(
        LEDGER,
        "disown",
        {"client": client, "mark": identity(results.body), "counters": counters},  # type: ignore[dict-item]
    )
    return Arrival(word, encode(word, KEY))


def told(desk: Desk, counter: int) -> tuple[object, object]:
    """How a call ended and where, as ``flame show`` has it; as ``flame ps`` has it is the same."""
    story = desk.history.story("c", counter)
    assert story is not None
    (listed,) = [c for c in desk.history.calls(limit=100) if c["id"] == f"c-{counter}"]
    assert {k: listed[k] for k in ("state", "worker")} == {k: story[k] for k in ("state", "worker")}
    outcome = desk.history.outcome("c", counter)
    assert outcome is not None
    assert outcome.final.status.name == ("OK" if story["state"] == "succeeded" else "FAILED")
    return story["state"], story["worker"]


LOST, DONE = run_by("w1", failed(1, WorkerLost)), run_by("w2", good(1))


@pytest.mark.parametrize("order", [*permutations(range(4))])
@pytest.mark.parametrize(
    ("dropped", "outcome"), [(DONE, ("failed", "w1")), (LOST, ("succeeded", "w2"))]
)
def test_what_the_client_took_counts_in_whatever_order_all_arrives(
    desk: Desk, order: tuple[int, ...], dropped: Arrival, outcome: tuple[str, str]
) -> None:
    arrivals = [calls(1), LOST, DONE, refused(dropped, 1)]
    for at in order:
        desk.ledger.record([arrivals[at]])
    assert told(desk, 1) == outcome


@pytest.mark.parametrize("dropped", [DONE, LOST])
def test_it_counts_when_all_arrives_together(desk: Desk, dropped: Arrival) -> None:
    desk.ledger.record([refused(dropped, 1), LOST, DONE, calls(1)])
    assert told(desk, 1) == (("failed", "w1") if dropped is DONE else ("succeeded", "w2"))


def test_the_only_outcome_counts_though_its_client_had_given_the_call_up(desk: Desk) -> None:
    desk.ledger.record([calls(1), DONE, refused(DONE, 1)])
    assert told(desk, 1) == ("succeeded", "w2")


def test_neighbours_in_a_frame_keep_their_outcome(desk: Desk) -> None:
    first = run_by("w1", good(1), failed(2), good(3))
    second = run_by("w2", failed(1), good(2))
    desk.ledger.record([calls(1, 2, 3), first, second, refused(first, 2), refused(second, 1)])
    assert [told(desk, n) for n in (1, 2, 3)] == [
        ("succeeded", "w1"), ("succeeded", "w2"), ("succeeded", "w1")
    ]  # fmt: skip


def test_a_word_that_comes_twice_or_makes_no_sense_changes_nothing(desk: Desk) -> None:
    word = refused(LOST, 1)
    desk.ledger.record([calls(1), LOST, DONE, word, word])
    desk.ledger.record([word, refused(DONE), refused(DONE, 1, client=7)])
    assert told(desk, 1) == ("succeeded", "w2")


@pytest.mark.parametrize(
    ("client", "counter"), [("c", 2**63), ("c", -1), ("nil\0", 1), ("half \ud800", 1)]
)
def test_a_word_that_no_database_takes_does_not_stop_the_ledger(
    desk: Desk, client: str, counter: int
) -> None:
    about = {"client": client, "mark": identity(LOST.body), "counters": (counter,)}
    word = Arrival(ControlFrame(LEDGER, "disown", about), refused(LOST).body)  # type: ignore[arg-type]
    desk.ledger.record([calls(1), LOST, DONE, word])
    assert told(desk, 1) == ("failed", "w1")


def test_words_are_forgotten_with_what_they_are_about(desk: Desk) -> None:
    desk.ledger.record([calls(1), LOST, DONE, refused(LOST, 1)])
    desk.ledger.forget(before=2e12, keep_calls=10)
    desk.ledger.record([LOST])
    assert History(desk.engine).story("c", 1) is not None
    assert desk.history.outcome("c", 1) is not None
