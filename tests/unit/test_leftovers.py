"""Calls of a cluster that has gone with its program: they end, and say why."""

from __future__ import annotations

from pathlib import Path
from time import time

import pytest
from sqlalchemy import select

from flame_broker.errors import ConfigError, FlameError
from flame_broker.frames import encode
from flame_broker.keys import Key, generate_key
from flame_broker.messages import Call, CallFrame, CallSpec, ResultFrame, Target
from flame_broker.topology import calls_queue
from flame_orchestrator.database import open_database
from flame_orchestrator.ledger import Arrival, Ledger
from flame_orchestrator.leftovers import end_calls
from flame_orchestrator.schema import kept, leaders
from flame_orchestrator.states import CallState
from lab.desk import AT_ONCE, KEY, Desk, deposit, good, outcome

REASON = "its program is gone"
OTHER = Key.parse(generate_key())


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def sent(desk: Desk, *counters: int, client: str, key: Key = KEY) -> None:
    """Calls that nobody keeps, as the ledger hears of them."""
    calls = tuple(Call(counter, b"") for counter in counters)
    queue = calls_queue(key.hex_id, "default", "c1").name
    frame = CallFrame(queue, "r", client, CallSpec(Target("m:f")), calls)
    Ledger(desk.engine).record([Arrival(frame, encode(frame, key))])


def end(desk: Desk) -> int:
    """By a cluster that has another key."""
    return end_calls(desk.engine, KEY.hex_id, REASON, OTHER)


def test_what_has_not_ended_is_cancelled_with_the_reason(desk: Desk) -> None:
    sent(desk, *range(1, 301), client="a")  # of more than one frame of results
    frame = ResultFrame("r", "a", "w", (good(7),))
    Ledger(desk.engine).record([Arrival(frame, encode(frame, KEY))])
    assert end(desk) == 299
    cancelled = desk.history.calls(state=CallState.CANCELLED, limit=1000)
    assert len(cancelled) == 299
    assert desk.state(7, "a") == "succeeded"
    story = desk.history.story("a", 300)
    assert story is not None
    assert story["reason"] == REASON


def test_kept_calls_end_too_and_nobody_leads_them_any_more(desk: Desk) -> None:
    desk.take(deposit(1, retry=AT_ONCE), deposit(2, due=time() + 1000, after=(("c-1",),)))
    desk.take(deposit(3, key="once"), deposit(4, key="once"))
    assert end(desk) == 4
    assert [desk.state(n) for n in (1, 2, 3, 4)] == ["cancelled"] * 4
    assert desk.custody.due(time() + 2000, 10) == []
    with desk.engine.connect() as connection:
        assert connection.execute(select(leaders)).all() == []
        assert set(connection.scalars(select(kept.c.ended_at.is_(None)))) == {False}


def test_calls_of_other_clusters_go_on(desk: Desk) -> None:
    sent(desk, 1, client="theirs", key=OTHER)
    sent(desk, 1, client="ours")
    assert end(desk) == 1
    assert (desk.state(1, "theirs"), desk.state(1, "ours")) == ("queued", "cancelled")


def test_what_had_ended_stays_as_it_was_and_a_second_time_changes_nothing(desk: Desk) -> None:
    desk.take(deposit(1), deposit(2))
    desk.start_due()
    desk.take(outcome(good(1)))
    assert [end(desk), end(desk)] == [1, 0]
    assert (desk.state(1), desk.state(2)) == ("succeeded", "cancelled")


def test_kept_calls_of_a_cluster_that_is_gone_are_forgotten_with_their_age(desk: Desk) -> None:
    desk.take(deposit(1))
    end(desk)
    assert desk.custody.forget(before=time() - 60) == 0
    assert desk.custody.forget(before=time() + 60) == 1


def test_a_database_that_refuses_is_a_reason_to_try_again(desk: Desk) -> None:
    sent(desk, 1, client="a")
    with desk.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE outcomes")
    with pytest.raises(FlameError, match=f"{KEY.hex_id} cannot be ended: no such table"):
        end(desk)


def test_a_database_of_a_newer_version_is_refused_with_a_remedy(desk: Desk, tmp_path: Path) -> None:
    with desk.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(ConfigError, match="upgrade Flame here"):
        open_database(f"sqlite:///{tmp_path}/ledger.sqlite")
