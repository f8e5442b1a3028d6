"""The ledger on PostgreSQL: the same story as on SQLite."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from sqlalchemy.exc import SQLAlchemyError

from flame_broker.codec import encode_value
from flame_broker.errors import WorkerLost
from flame_broker.frames import encode
from flame_broker.messages import (
    Call,
    CallFrame,
    CallSpec,
    Event,
    EventFrame,
    EventKind,
    Result,
    ResultFrame,
    Status,
    Target,
)
from flame_broker.outcomes import encode_failure
from flame_broker.store import open_store
from flame_orchestrator.database import open_database
from flame_orchestrator.history import History
from flame_orchestrator.ledger import Arrival, Ledger
from flame_orchestrator.log_reader import LogReader
from flame_orchestrator.log_upkeep import LogUpkeep
from flame_orchestrator.logs import Logs
from flame_orchestrator.states import CallState
from lab.bench import KEYRING
from lab.postgres import PostgresServer

QUEUE = "flame.v1.0a0b0c0d.default.c1.normal"


def queued(counters: Iterable[int]) -> Arrival:
    calls = tuple(Call(counter, b"\x00") for counter in counters)
    frame = CallFrame(QUEUE, "r", "c", CallSpec(Target("m:f"), label="work"), calls)
    return Arrival(frame, encode(frame, KEYRING.signer))


def ended(*results: Result) -> Arrival:
    frame = ResultFrame("r", "c", "w", results)
    return Arrival(frame, encode(frame, KEYRING.signer))


def good(counter: int) -> Result:
    return Result(counter, Status.OK, encode_value(counter).join())


def test_the_ledger_tells_the_same_story_on_postgresql(postgres: PostgresServer) -> None:
    engine = open_database(postgres.database("story"))
    ledger, history = Ledger(engine), History(engine)
    lost = Result(2, Status.FAILED, encode_failure(WorkerLost, "gone"))
    ledger.record([ended(good(1))])  # before its call
    story = [queued([1, 2, 3]), ended(lost), queued([5, 9]), ended(good(9))]
    ledger.record(story)
    ledger.record(story)  # twice
    found = {call["id"]: call["state"] for call in history.calls(limit=10)}
    assert found == {
        "c-1": "succeeded", "c-2": "failed", "c-3": "queued", "c-5": "queued", "c-9": "succeeded",
    }  # fmt: skip
    assert [call["id"] for call in history.calls(state=CallState.FAILED, limit=5)] == ["c-2"]
    outcome = history.outcome("c", 9)
    assert outcome is not None
    assert outcome.final.payload == good(9).payload
    assert ledger.forget(before=float("inf"), keep_calls=100) > 0
    engine.dispose()


def said(texts: list[str], first: int = 0) -> EventFrame:
    events = [Event(1, EventKind.STDOUT, text, 0.0, 1, n) for n, text in enumerate(texts, first)]
    return EventFrame("logs", "c", "w", "work", tuple(events))


def test_logs_are_the_same_on_postgresql(postgres: PostgresServer, tmp_path: Path) -> None:
    engine = open_database(postgres.database("logs"))
    store = open_store(f"file://{tmp_path}")
    upkeep, reader = LogUpkeep(engine, store), LogReader(engine, store)
    logs, other = Logs(engine, limit_bytes=10**7), Logs(engine, limit_bytes=10**7)
    logs.write([said(["a zero \0 in it"])])
    other.write([said(["b"], 1)])
    with pytest.raises(SQLAlchemyError):
        logs.write([said(["b", "c"], 1)])
    assert logs.write([said(["b", "c"], 1)]).calls == {("c", 1)}
    long = ["x" * 1000] * 2000
    assert logs.write([said(long, 3)]).large == {("c", 1)}
    assert upkeep.move(("c", 1)) > 1
    (part, *more) = reader.read("c", 1, 0, most_bytes=10**7).parts
    every = [line.text for each in (part, *more) for line in each.lines]
    assert every == ["a zero \0 in it", "b", "c", *long]
    assert upkeep.forget(before=float("inf"), keep_calls=100) == 1
    assert not reader.read("c", 1, 0, most_bytes=1).parts
    engine.dispose()


def test_a_database_is_migrated_once_and_opened_again(postgres: PostgresServer) -> None:
    url = postgres.database("again")
    for _ in range(2):
        engine = open_database(url)
        Ledger(engine).record([queued([1])])
        assert len(History(engine).calls(limit=5)) == 1
        engine.dispose()
