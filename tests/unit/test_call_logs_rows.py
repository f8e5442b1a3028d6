"""The rows of logs: the same lines, whatever comes twice, and a note for what never came."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import time

import pytest
from sqlalchemy import Engine, event, func, select
from sqlalchemy.exc import OperationalError, SQLAlchemyError

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
from flame_broker.store import open_store
from flame_orchestrator.database import open_database
from flame_orchestrator.ledger import Arrival, Ledger
from flame_orchestrator.log_reader import LogReader
from flame_orchestrator.log_upkeep import LogUpkeep
from flame_orchestrator.logs import Logs, Written
from flame_orchestrator.open_log import CHUNK_BYTES
from flame_orchestrator.schema import log_chunks
from lab.bench import KEYRING

KEY = KEYRING.signer
LIMIT = 10 * 2**20
OUT, ERR = EventKind.STDOUT, EventKind.STDERR
LINE = "x" * 1000


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    opened = open_database(f"sqlite:///{tmp_path}/ledger.sqlite")
    yield opened
    opened.dispose()


def said(
    texts: Sequence[str],
    *,
    first: int = 0,
    counter: int = 1,
    run: int = 1,
    attempt: int = 1,
    worker: str = "w",
    kind: EventKind = OUT,
) -> EventFrame:
    events = [Event(counter, kind, text, 0.0, run, n) for n, text in enumerate(texts, first)]
    return EventFrame("logs", "c", worker, "work", tuple(events), attempt, 1000.0)


def write(engine: Engine, *frames: EventFrame, limit: int = LIMIT) -> Written:
    return Logs(engine, limit_bytes=limit).write(frames)


def texts(
    engine: Engine, counter: int = 1, *, store: str = "", most_bytes: int = 1000
) -> list[str]:
    """The whole log, read in stretches, with notes in brackets."""
    reader = LogReader(engine, open_store(store) if store else None)
    found, since = list[str](), 0
    while True:
        reading = reader.read("c", counter, since, most_bytes=most_bytes)
        for part in reading.parts:
            found += [f"[{n.text}]" if n.stream == "note" else n.text for n in part.lines]
        assert reading.upto > since or not reading.parts
        since = reading.upto
        if not reading.more:
            return found


def rows(engine: Engine) -> int:
    with engine.connect() as connection:
        return connection.execute(select(func.count()).select_from(log_chunks)).scalar_one()


def test_lines_of_all_frames_come_out_in_their_order_and_few_rows(engine: Engine) -> None:
    logs, every = Logs(engine, limit_bytes=LIMIT), [f"line {n}" for n in range(1000)]
    for first in range(0, 1000, 10):
        logs.write([said(every[first : first + 10], first=first)])
    assert texts(engine) == every
    assert rows(engine) == 1
    long = [LINE] * 200
    assert logs.write([said(long, first=1000)]) == Written({("c", 1)}, set())
    assert logs.write([said(["the end"], first=1200)]).calls == {("c", 1)}
    assert texts(engine) == [*every, *long, "the end"]
    assert rows(engine) <= 2 + 200 * 1016 // CHUNK_BYTES


def test_the_streams_calls_and_runs_of_one_frame_are_told_apart(engine: Engine) -> None:
    logs = Logs(engine, limit_bytes=LIMIT)
    logs.write([said(["out"]), said(["err"], first=1, kind=ERR), said(["other"], counter=2)])
    logs.write([said(["again"], run=2), said(["retried"], attempt=2, worker="v")])
    parts = LogReader(engine, None).read("c", 1, 0, most_bytes=10**6).parts
    told = [
        (p.attempt, p.worker, p.run, [(n.at, n.stream, n.text) for n in p.lines]) for p in parts
    ]
    assert told == [
        (1, "w", 1, [(1000.0, "stdout", "out"), (1000.0, "stderr", "err")]),
        (1, "w", 2, [(1000.0, "stdout", "again")]),
        (2, "v", 1, [(1000.0, "stdout", "retried")]),
    ]
    assert texts(engine, 2) == ["other"]


@pytest.mark.parametrize("seed", range(5))
def test_repeated_frames_change_nothing_also_after_a_restart(engine: Engine, seed: int) -> None:
    dice = random.Random(seed)
    every = [f"line {n}" for n in range(300)]
    frames = [said(every[at : at + 20], first=at) for at in range(0, 300, 20)]
    logs, done = Logs(engine, limit_bytes=LIMIT), 0
    while done < len(frames):
        taken = dice.randrange(1, 4)
        again = dice.randrange(0, done + 1)
        logs.write([*frames[again : done + taken]])
        done += taken
        if dice.random() < 0.4:
            logs = Logs(engine, limit_bytes=LIMIT)
    assert texts(engine) == every


def test_what_was_dropped_on_its_way_is_counted(engine: Engine) -> None:
    logs = Logs(engine, limit_bytes=LIMIT)
    logs.write([said(["b"], first=2)])
    logs.write([said(["c"], first=1003), said(["d"], first=1005)])
    assert texts(engine) == [
        "[2 lines were dropped on their way]",
        "b",
        "[1,000 lines were dropped on their way]",
        "c",
        "[a line was dropped here]",
        "d",
    ]


def test_a_log_ends_with_a_note_when_it_is_full(engine: Engine) -> None:
    logs = Logs(engine, limit_bytes=10_000)
    logs.write([said([LINE] * 50), said(["of another call"], counter=2)])
    full = [*[LINE] * 9, "[the log ends here: it may hold 10,000 bytes]"]
    assert texts(engine) == full
    logs.write([said(["more"], first=50)])
    write(engine, said(["more"], first=51), said(["more"], run=2), limit=10_000)
    assert texts(engine) == full
    assert texts(engine, 2) == ["of another call"]


def test_calls_that_print_a_line_each_cost_one_row_each(engine: Engine) -> None:
    frames = [said([f"of {n}"], counter=n, run=n) for n in range(1, 2001)]
    logs = Logs(engine, limit_bytes=LIMIT)
    assert len(logs.write(frames[:1500]).calls) == 1500
    logs.write(frames)
    assert rows(engine) == 2000
    assert texts(engine, 1) == ["of 1"]
    assert texts(engine, 2000) == ["of 2000"]


def test_progress_and_numbers_that_no_database_holds_are_no_lines(engine: Engine) -> None:
    strange = said(["x"], counter=2**40), said(["x"], run=2**40), said(["x"], attempt=2**40)
    assert write(engine, said(["x"], kind=EventKind.PROGRESS), *strange).calls == set()
    assert rows(engine) == 0


def test_what_the_database_refused_is_written_when_it_is_given_again(engine: Engine) -> None:
    logs, refusing = Logs(engine, limit_bytes=LIMIT), [False]

    def refuse(*_: object) -> None:
        if refusing[0]:
            raise OperationalError("INSERT", {}, Exception("disk full"))

    event.listen(engine, "commit", refuse)
    logs.write([said(["a"])])
    refusing[0] = True
    with pytest.raises(OperationalError):
        logs.write([said(["b"], first=1)])
    refusing[0] = False
    logs.write([said(["b"], first=1), said(["c"], first=2)])
    assert texts(engine) == ["a", "b", "c"]


def test_who_was_overtaken_by_another_orchestrator_overwrites_nothing(engine: Engine) -> None:
    first, second = Logs(engine, limit_bytes=LIMIT), Logs(engine, limit_bytes=LIMIT)
    first.write([said(["a"])])
    second.write([said(["b"], first=1), said(["x"], counter=2)])
    late = said(["b", "c"], first=1), said(["x", "y"], counter=2)
    with pytest.raises(SQLAlchemyError):
        first.write([*late])
    first.write([*late])
    assert texts(engine) == ["a", "b", "c"]
    assert texts(engine, 2) == ["x", "y"]


def test_a_large_log_moves_into_the_store_and_reads_the_same(
    engine: Engine, tmp_path: Path
) -> None:
    url = f"file://{tmp_path}/store"
    logs, upkeep = Logs(engine, limit_bytes=LIMIT), LogUpkeep(engine, open_store(url))
    every = [f"{n} {LINE}" for n in range(2500)]
    for first in range(0, 2500, 100):
        for call in logs.write([said(every[first : first + 100], first=first)]).large:
            assert upkeep.move(call) > 1
    objects = [*(tmp_path / "store" / "logs" / "c-1").iterdir()]
    assert len(objects) >= 2
    assert rows(engine) < 50
    assert texts(engine, store=url, most_bytes=10**6) == every
    write(engine, said(["after a restart"], first=2500))
    assert texts(engine, store=url, most_bytes=10**5) == [*every, "after a restart"]
    without = texts(engine, most_bytes=10**6)
    assert "set FLAME_STORE_URL there" in without[0]
    assert without[-1] == "after a restart"
    objects[0].unlink()
    read = texts(engine, store=url, most_bytes=10**6)
    assert sum("lines cannot be read" in line for line in read) == 1
    assert read[-1] == "after a restart"


def test_a_log_is_forgotten_with_the_history_of_its_call(engine: Engine, tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/store")
    ledger, upkeep = Ledger(engine), LogUpkeep(engine, store)
    logs = Logs(engine, limit_bytes=LIMIT)
    for counter in (1, 2, 3):
        frame = CallFrame("q", "r", "c", CallSpec(Target("m:f")), (Call(counter, b""),))
        ledger.record([Arrival(frame, encode(frame, KEY))])
        logs.write([said([LINE] * 1500, counter=counter, run=counter)])
        assert upkeep.move(("c", counter))
    for counter in (1, 3):
        ended = ResultFrame("r", "c", "w", (Result(counter, Status.OK, b""),))
        ledger.record([Arrival(ended, encode(ended, KEY))])
    later = time() + 1
    assert upkeep.forget(before=later, keep_calls=10**6) == 0
    ledger.forget(before=later, keep_calls=10**6)
    assert upkeep.forget(before=0.0, keep_calls=10**6) == 0
    assert upkeep.forget(before=later, keep_calls=10**6) == 2
    assert texts(engine, 1) == texts(engine, 3) == []
    assert len(texts(engine, 2, store=f"file://{tmp_path}/store", most_bytes=10**6)) == 1500
    assert [path.name for path in (tmp_path / "store" / "logs").rglob("*") if path.is_file()]
    assert not [*(tmp_path / "store" / "logs").glob("c-1/*")]
