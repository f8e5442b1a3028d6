"""Schedules: each moment has one call, whoever dies, leads or sets the clock meanwhile."""

from __future__ import annotations

import random
import tempfile
from contextlib import suppress
from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import event, select, update
from sqlalchemy.exc import OperationalError

from flame_broker.codec import encode_value
from flame_broker.errors import CallError
from flame_broker.frames import encode, identity
from flame_broker.messages import (
    Call,
    CallFrame,
    CallSpec,
    Deposit,
    Limitation,
    Result,
    ResultFrame,
    RetryPolicy,
    Status,
    Target,
)
from flame_broker.schedules import CatchUp
from flame_broker.topology import calls_queue, custody_queue, suspects_queue
from flame_orchestrator.custody import Custody, Fenced, Letter
from flame_orchestrator.database import open_database
from flame_orchestrator.history import History
from flame_orchestrator.ledger import Arrival, Ledger
from flame_orchestrator.reruns import Reruns
from flame_orchestrator.schedules import Fired, Plan, Schedules
from flame_orchestrator.schema import kept, schedules
from lab.bench import KEYRING

KEY = KEYRING.signer
CUSTODY = custody_queue(KEY.hex_id).name
CALLS = calls_queue(KEY.hex_id, "default", "c1").name
NOON = 1_800_014_400.0  # 2027-01-15, 12:00 UTC
HOUR = 3600.0
HOURLY = "0 * * * *"
POLICY = RetryPolicy(3, 1.0, 2.0, jitter=False)


@cache
def _empty_database() -> bytes:
    """Migrated once for all: that takes longer than most tests."""
    with tempfile.TemporaryDirectory() as folder:
        open_database(f"sqlite:///{folder}/ledger.sqlite").dispose()
        return (Path(folder) / "ledger.sqlite").read_bytes()


class Desk:
    """Schedules, their database, and a clock that the test sets."""

    def __init__(self, folder: Path) -> None:
        (folder / "ledger.sqlite").write_bytes(_empty_database())
        self.engine = open_database(f"sqlite:///{folder}/ledger.sqlite")
        self.ledger = Ledger(self.engine)
        self.custody = Custody(self.engine, self.ledger, KEY)
        self.schedules = Schedules(self.engine, self.custody, KEY)
        self.history = History(self.engine)
        self.epoch = self.custody.lead("us")
        self.now = NOON + 1

    def put(self, name: str = "s", cron: str = HOURLY, **changes: Any) -> dict[str, Any]:
        plan = Plan(name, cron, "UTC", CatchUp.LATEST, overlap=True, deposit=deposit())
        return self.schedules.put(plan._replace(**changes))

    def fire(self, now: float | None = None) -> Fired:
        if now is not None:
            self.now = now
        return self.schedules.fire(self.epoch, self.now, self.now)

    def calls(self) -> list[tuple[int, float]]:
        """Number and due time of every call that is kept."""
        wanted = select(kept.c.counter, kept.c.due_at).order_by(kept.c.counter)
        with self.engine.connect() as connection:
            return [(row.counter, row.due_at) for row in connection.execute(wanted)]

    def moments(self) -> list[float]:
        return [due_at for _, due_at in self.calls()]

    def end(self, call: str) -> list[ResultFrame]:
        """A worker ends it; what clients are told."""
        client, _, counter = call.rpartition("-")
        result = Result(int(counter), Status.OK, encode_value(None).join())
        frame = ResultFrame(CUSTODY, client, "w", (result,))
        mark = identity(encode(frame, KEY))
        return self.custody.record(self.epoch, [Letter(frame, mark)]).results


def deposit(**changes: Any) -> Deposit:
    frame = CallFrame(CALLS, "", "", CallSpec(Target("m:f"), label="f"), (Call(0, b"arguments"),))
    return Deposit(CUSTODY, frame, (0.0,), ("",), POLICY, 9.0, **changes)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    made = Desk(tmp_path)
    monkeypatch.setattr("flame_orchestrator.schedules.time", lambda: made.now)
    return made


def test_a_moment_has_one_call_with_a_number_and_the_options_of_its_service(desk: Desk) -> None:
    assert desk.put()["next_at"] == NOON + HOUR
    assert desk.fire() == Fired(0, NOON + HOUR)
    assert desk.fire(NOON + HOUR) == Fired(1, NOON + 2 * HOUR)
    assert desk.fire(NOON + HOUR + 1) == Fired(0, NOON + 2 * HOUR)
    assert desk.calls() == [(1, NOON + HOUR)]
    (due,) = desk.custody.due(desk.now, 9)
    assert due.frame.calls == (Call(1, b"arguments"),)
    assert (due.frame.queue, due.queue_timeout_s) == (CALLS, 9.0)
    (facts,) = desk.history.calls(limit=9)
    assert (facts["label"], facts["state"]) == ("f", "waiting")
    shown = desk.schedules.show("s")
    assert shown["ahead"] == [NOON + n * HOUR for n in (2, 3, 4)]
    assert [call["id"] for call in shown["calls"]] == [facts["id"]]


def test_nobody_but_the_ledger_is_told_how_a_call_ended(desk: Desk) -> None:
    desk.put()
    desk.fire(NOON + HOUR)
    (facts,) = desk.history.calls(limit=9)
    assert desk.end(facts["id"]) == []
    story = desk.history.story(facts["id"].rpartition("-")[0], 1)
    assert story is not None
    assert (story["state"], story["schedule"]) == ("succeeded", "s")


@pytest.mark.parametrize(
    ("catch_up", "late_s", "hours", "skipped"),
    [
        (CatchUp.NONE, 59, [4], (3, "it was missed; a later one has its call")),
        (CatchUp.NONE, 61, [], (4, "it would have been 61 s late")),
        (CatchUp.LATEST, 61, [4], (3, "it was missed; a later one has its call")),
        (CatchUp.ALL, 61, [1, 2, 3, 4], None),
    ],
)
def test_what_passed_while_nobody_was_there_is_caught_up_on_by_the_policy(
    desk: Desk,
    catch_up: CatchUp,
    late_s: float,
    hours: list[int],
    skipped: tuple[int, str] | None,
) -> None:
    desk.put(catch_up=catch_up)
    desk.fire(NOON + 4 * HOUR + late_s)
    assert desk.moments() == [NOON + n * HOUR for n in hours]
    assert desk.fire(NOON + 5 * HOUR).calls == 1
    shown = desk.schedules.show("s")
    hour, why = skipped or (None, "")
    assert shown["skipped_at"] == (None if hour is None else NOON + hour * HOUR)
    assert shown["skipped_why"] == why


def test_at_most_a_hundred_missed_calls_are_made_the_latest(desk: Desk) -> None:
    desk.put(cron="* * * * *", catch_up=CatchUp.ALL)
    desk.fire(NOON + 1000 * HOUR)
    assert desk.moments() == [NOON + 1000 * HOUR - 60.0 * n for n in range(99, -1, -1)]


def test_without_overlap_a_moment_is_skipped_while_a_call_has_not_ended(desk: Desk) -> None:
    desk.put(overlap=False)
    desk.fire(NOON + HOUR)
    (facts,) = desk.history.calls(limit=9)
    assert desk.fire(NOON + 2 * HOUR) == Fired(0, NOON + 3 * HOUR)
    shown = desk.schedules.show("s")
    assert (shown["skipped_at"], shown["skipped_why"]) == (
        NOON + 2 * HOUR,
        f"{facts['id']} had not ended",
    )
    desk.end(facts["id"])
    assert desk.fire(NOON + 3 * HOUR).calls == 1
    assert desk.moments() == [NOON + HOUR, NOON + 3 * HOUR]


def test_who_says_the_same_again_changes_nothing_and_another_time_counts_from_now(
    desk: Desk,
) -> None:
    desk.put()
    desk.fire(NOON + HOUR)
    desk.now = NOON + 2 * HOUR + 1  # a moment is overdue
    assert desk.put()["next_at"] == NOON + 2 * HOUR
    assert desk.put(cron="30 * * * *")["next_at"] == NOON + 2.5 * HOUR
    assert desk.put()["next_at"] == NOON + 3 * HOUR
    desk.fire(NOON + 3 * HOUR)
    assert desk.calls() == [(1, NOON + HOUR), (2, NOON + 3 * HOUR)]
    assert len(desk.schedules.every()) == 1
    assert len({facts["id"].rpartition("-")[0] for facts in desk.history.calls(limit=9)}) == 1


def test_a_paused_one_makes_no_call_and_goes_on_from_now_when_it_is_resumed(desk: Desk) -> None:
    desk.put(catch_up=CatchUp.ALL)
    desk.schedules.pause("s")
    assert desk.fire(NOON + 3 * HOUR) == Fired(0, None)
    assert desk.put()["state"] == "paused"
    desk.schedules.resume("s")
    assert desk.fire(NOON + 3 * HOUR + 1) == Fired(0, NOON + 4 * HOUR)
    assert desk.calls() == []


def test_a_moment_that_had_its_call_early_is_not_met_again_when_it_is_resumed(desk: Desk) -> None:
    desk.put()
    desk.schedules.fire(desk.epoch, NOON + HOUR - 0.5, NOON + HOUR)
    desk.now = NOON + HOUR - 0.4
    desk.schedules.pause("s")
    desk.schedules.resume("s")
    desk.put(cron="* * * * *")
    desk.fire(NOON + HOUR)
    assert desk.moments() == [NOON + HOUR]


def test_a_call_that_is_ordered_takes_the_next_number_and_an_order_said_twice_makes_one(
    desk: Desk,
) -> None:
    desk.put()
    desk.schedules.pause("s")
    first = desk.schedules.run("s", "order 1")
    assert desk.schedules.run("s", "order 1") == first
    second = desk.schedules.run("s", "order 2")
    desk.schedules.resume("s")
    desk.fire(NOON + HOUR)
    assert (first[-2:], second[-2:]) == ("-1", "-2")
    assert desk.calls() == [(1, NOON + 1), (2, NOON + 1), (3, NOON + HOUR)]


def test_one_that_is_not_there_is_named(desk: Desk) -> None:
    orders = desk.schedules
    for order in (orders.show, orders.pause, orders.resume, orders.remove):
        with pytest.raises(LookupError, match="there is no schedule 'x'"):
            order("x")
    with pytest.raises(LookupError, match="there is no schedule 'x'"):
        orders.run("x", "order")
    desk.put("x")
    orders.remove("x")
    assert orders.every() == []


def test_whoever_does_not_lead_any_more_makes_no_call(desk: Desk) -> None:
    desk.put()
    desk.custody.lead("another")
    with pytest.raises(Fenced):
        desk.fire(NOON + HOUR)
    assert desk.calls() == []


def test_one_that_cannot_be_told_the_time_stops_no_other(desk: Desk) -> None:
    desk.put("a")
    desk.put("b")
    with desk.engine.begin() as connection:
        lost = update(schedules).where(schedules.c.name == "a")
        connection.execute(lost.values(timezone="Mars/Olympus"))
    assert desk.fire(NOON + HOUR) == Fired(1, NOON + 2 * HOUR)
    assert "knows no such zone" in desk.schedules.show("a")["problem"]
    with pytest.raises(ValueError, match="no time that ever comes"):
        desk.put("c", cron="0 0 30 2 *")


def test_wherever_it_dies_in_a_firing_all_of_it_is_written_or_nothing(desk: Desk) -> None:
    desk.put(catch_up=CatchUp.ALL)
    left = 0  # statements until the power is cut; 0: it is not

    def run(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise OperationalError("power", {}, OSError("cut"))

    event.listen(desk.engine, "before_cursor_execute", run)
    event.listen(desk.engine, "commit", run)
    whole = [(1, NOON + HOUR), (2, NOON + 2 * HOUR)]
    for cut_at in count(1):
        left = cut_at
        with suppress(OperationalError):
            desk.fire(NOON + 2 * HOUR)
        left = 0
        if desk.calls() == whole:
            break
        assert desk.calls() == []
        desk.epoch = desk.custody.lead("the next")
    assert cut_at > 6
    desk.epoch = desk.custody.lead("the next")
    assert desk.fire(NOON + 2 * HOUR).calls == 0


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 1_000_000), catch_up=st.sampled_from([CatchUp.LATEST, CatchUp.ALL]))
def test_no_moment_has_two_calls_whoever_leads_and_however_the_clock_jumps(
    tmp_path_factory: pytest.TempPathFactory, seed: int, catch_up: CatchUp
) -> None:
    chance = random.Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        desk = Desk(tmp_path_factory.mktemp("desk"))
        patch.setattr("flame_orchestrator.schedules.time", lambda: desk.now)
        desk.put(cron="*/10 * * * *", catch_up=catch_up)
        epochs = [desk.epoch]
        for _ in range(40):
            match chance.randrange(8):
                case 0:
                    epochs.append(desk.custody.lead("another"))
                case 1:
                    desk.now -= chance.choice([2.0, 700.0, 5000.0])
                case 2:
                    desk.put(cron="*/10 * * * *", catch_up=catch_up)
                case _:
                    desk.now += chance.choice([1.0, 299.0, 600.0, 7000.0])
            desk.epoch = chance.choice(epochs[-2:])
            try:
                desk.fire()
            except Fenced:
                assert desk.epoch != epochs[-1]
        desk.epoch = epochs[-1]
        desk.fire(NOON + 1000 * HOUR)
    numbers, moments = [n for n, _ in desk.calls()], desk.moments()
    assert numbers == [*range(1, len(numbers) + 1)]
    assert moments == sorted({*moments})
    assert desk.schedules.show("s")["fired"] == len(moments)
    if catch_up is CatchUp.ALL:
        early = [moment for moment in moments if moment < NOON + 900 * HOUR]
        assert early == [NOON + 600.0 * n for n in range(1, len(early) + 1)]


# ── calls that run again ─────────────────────────────────────────────────────


def reruns(desk: Desk) -> Reruns:
    return Reruns(desk.engine, desk.custody, KEY)


def queued(*counters: int, queue: str = CALLS) -> Arrival:
    spec = CallSpec(Target("m:f"), resources="c2", timeout_s=7.0)
    calls = tuple(Call(counter, b"%d" % counter) for counter in counters)
    frame = CallFrame(queue, "reply", "c", spec, calls, attempt=2, strikes=1, expires_at=1.0)
    return Arrival(frame, encode(frame, KEY))


def ended(counter: int) -> Arrival:
    result = Result(counter, Status.OK, encode_value(None).join())
    frame = ResultFrame("reply", "c", "w", (result,))
    return Arrival(frame, encode(frame, KEY))


def test_an_ended_call_runs_again_afresh_as_a_new_one_once_an_order(desk: Desk) -> None:
    other = calls_queue("00000000", "gpu", "c2").name.replace(".normal", ".high")
    desk.ledger.record([queued(4, 5, 6, queue=other), ended(5)])
    assert [reruns(desk).again("c", 5, "new") for _ in range(2)] == ["new-1"] * 2
    (due,) = desk.custody.due(1e12, 9)
    frame = due.frame
    assert frame.queue == other.replace("00000000", KEY.hex_id)
    assert (frame.client, frame.calls, frame.reply) == ("new", (Call(1, b"5"),), "")
    assert (frame.attempt, frame.strikes, frame.expires_at) == (1, 0, 0.0)
    assert (frame.spec.timeout_s, frame.spec.resources) == (7.0, "c2")
    assert desk.history.story("new", 1) is not None


def test_the_policy_of_a_kept_call_holds_when_it_runs_again(desk: Desk) -> None:
    desk.put()
    desk.fire(NOON + HOUR)
    (facts,) = desk.history.calls(limit=9)
    client = facts["id"].rpartition("-")[0]
    desk.end(facts["id"])
    reruns(desk).again(client, 1, "new")
    (due,) = desk.custody.due(1e12, 9)
    assert due.queue_timeout_s == 9.0
    with desk.engine.connect() as connection:
        policies = connection.scalars(select(kept.c.retry)).all()
    assert policies[0] is not None
    assert policies[0] == policies[1]


def test_a_call_under_a_limit_runs_again_under_it(desk: Desk) -> None:
    limited = replace(deposit(), limits=(Limitation("tape", 2),))
    first = replace(limited, frame=replace(limited.frame, client="c"))
    desk.custody.keep(lambda _: [first])
    desk.end("c-0")
    reruns(desk).again("c", 0, "new")
    with desk.engine.connect() as connection:
        keys = connection.scalars(select(kept.c.limit_key)).all()
    assert keys == ["tape", "tape"]


def test_a_call_that_was_only_seen_as_a_suspect_goes_to_the_calls_of_its_pool(desk: Desk) -> None:
    desk.ledger.record([queued(5, queue=suspects_queue(KEY.hex_id, "p").name), ended(5)])
    reruns(desk).again("c", 5, "new")
    (due,) = desk.custody.due(1e12, 9)
    assert due.frame.queue == calls_queue(KEY.hex_id, "p", "c2").name


def test_what_has_not_ended_or_is_not_known_does_not_run_again(desk: Desk) -> None:
    desk.ledger.record([queued(1), ended(9)])
    for number, words in (
        (1, "c-1 has not ended, it is queued"),
        (9, "not what it was called with"),
        (8, "knows no call c-8"),
    ):
        with pytest.raises(CallError, match=words):
            reruns(desk).again("c", number, "new")
    assert desk.calls() == []
