"""The logs of calls: what they print, written in chunks as it comes.

Lines are numbered where they are printed, so what is written does not change when a frame comes
twice, and what was dropped on its way shows.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from time import time
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, Engine, Row, and_, bindparam, insert, select, update
from sqlalchemy.exc import SQLAlchemyError

from flame_broker.messages import Event, EventFrame, EventKind
from flame_orchestrator.open_log import CHUNK_BYTES, OpenLog
from flame_orchestrator.schema import HIGHEST, log_chunks

__all__ = ["OBJECT_BYTES", "Call", "Logs", "Overtaken", "Written"]

OBJECT_BYTES: Final = 1024 * 1024
"""Full chunks of one log that hold so much are moved into the object store."""

_OPEN: Final = 500  # logs whose ends are in memory, some 32 KiB each at most
_AT_ONCE: Final = 500

_WHICH: Final = ("client", "counter", "start")
_CHANGING: Final = ("lines", "size", "upto", "cut", "at", "body")
_LENGTHEN: Final = (
    update(log_chunks)
    .where(*(log_chunks.c[name] == bindparam(f"new_{name}") for name in _WHICH))
    .where(log_chunks.c.lines == bindparam("old_lines"))
    .values({name: bindparam(f"new_{name}") for name in _CHANGING})
)

Call = tuple[str, int]
"""A client and a counter."""


class Overtaken(SQLAlchemyError):
    """Another orchestrator has written to the same log meanwhile: look again, then write."""

    def __str__(self) -> str:
        return "another orchestrator has written to the same log meanwhile"


class Written(NamedTuple):
    """What a transaction has done.

    Attributes:
        calls: Whose logs are longer now.
        large: Those of which full chunks may be moved into the object store.
    """

    calls: set[Call]
    large: set[Call]


class Logs:
    """Writes lines down. Its methods block: call them in one thread.

    Args:
        engine: The database.
        limit_bytes: What the log of one call may hold.
    """

    def __init__(self, engine: Engine, *, limit_bytes: int) -> None:
        self._engine = engine
        self._limit = limit_bytes
        self._open: OrderedDict[Call, OpenLog] = OrderedDict()

    def write(self, frames: Sequence[EventFrame]) -> Written:
        """Write the output of frames down, all or nothing.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: Nothing was written; try again.
        """
        by_call: dict[Call, list[tuple[EventFrame, Event]]] = defaultdict(list)
        for frame in frames:
            for event in _output(frame):
                by_call[frame.client, event.counter].append((frame, event))
        try:
            with self._engine.begin() as connection:
                self._recall(connection, by_call)
                changed = self._take(by_call)
                self._store(connection, changed)
        except BaseException:  # it goes on; what is held in memory is not what is stored
            self._open.clear()
            raise
        return Written({*changed}, self._large(changed))

    def _recall(self, connection: Connection, calls: Mapping[Call, object]) -> None:
        """Find the ends of logs that are not in memory."""
        unknown: dict[str, list[int]] = defaultdict(list)
        for client, counter in calls:
            if (client, counter) in self._open:
                self._open.move_to_end((client, counter))
            else:
                self._open[client, counter] = OpenLog(self._limit)
                unknown[client].append(counter)
        for client, counters in unknown.items():
            for counter, rows in _stored(connection, client, counters):
                self._open[client, counter].recall(rows)
                if rows[-1].size < CHUNK_BYTES and not rows[-1].moved:
                    packed = _packed_of(connection, client, counter, rows[-1].start)
                    self._open[client, counter].reopen(rows[-1], packed)

    def _take(
        self, by_call: Mapping[Call, Sequence[tuple[EventFrame, Event]]]
    ) -> dict[Call, OpenLog]:
        for call, said in by_call.items():
            for frame, event in said:
                self._open[call].add(frame, event)
        return {call: self._open[call] for call in by_call if self._open[call].changed}

    def _store(self, connection: Connection, changed: Mapping[Call, OpenLog]) -> None:
        now = time()
        fresh: list[dict[str, Any]] = []
        longer: list[dict[str, Any]] = []
        for (client, counter), log in changed.items():
            for chunk in log.changed:
                row = {"client": client, "counter": counter, **chunk.row(now)}
                if chunk.stored:
                    longer.append({**_changes(row), "old_lines": chunk.stored})
                else:
                    fresh.append(row)
                chunk.stored = chunk.lines
            log.changed = []
        if fresh:
            connection.execute(insert(log_chunks), fresh)
        if longer and connection.execute(_LENGTHEN, longer).rowcount != len(longer):
            raise Overtaken

    def _large(self, changed: Mapping[Call, OpenLog]) -> set[Call]:
        large = {call for call, log in changed.items() if log.closed_bytes >= OBJECT_BYTES}
        for call in large:
            self._open[call].closed_bytes = 0
        while len(self._open) > _OPEN:
            self._open.popitem(last=False)
        return large


def _output(frame: EventFrame) -> Iterator[Event]:
    """The lines of a frame whose numbers a database can hold; no worker of ours sends others."""
    if not 0 <= frame.attempt <= HIGHEST:
        return
    for event in frame.events:
        numbers = event.counter, event.run, event.index
        if event.kind is not EventKind.PROGRESS and all(0 <= n < HIGHEST for n in numbers):
            yield event


def _stored(
    connection: Connection, client: str, counters: Sequence[int]
) -> Iterator[tuple[int, list[Row[Any]]]]:
    """The chunks of these calls in their order, without their lines."""
    columns = log_chunks.c
    wanted = select(
        columns.counter, columns.start, columns.lines, columns.size, columns.worker, columns.run,
        columns.attempt, columns.upto, columns.cut, columns.body.is_(None).label("moved"),
    ).where(columns.client == client).order_by(columns.counter, columns.start)  # fmt: skip
    for at in range(0, len(counters), _AT_ONCE):
        found: dict[int, list[Row[Any]]] = defaultdict(list)
        some = columns.counter.in_(counters[at : at + _AT_ONCE])
        for row in connection.execute(wanted.where(some)):
            found[row.counter].append(row)
        yield from found.items()


def _packed_of(connection: Connection, client: str, counter: int, start: int) -> bytes:
    columns = log_chunks.c
    this = and_(columns.client == client, columns.counter == counter, columns.start == start)
    return zlib.decompress(connection.execute(select(columns.body).where(this)).scalar_one())


def _changes(row: Mapping[str, Any]) -> dict[str, Any]:
    return {f"new_{name}": row[name] for name in (*_WHICH, *_CHANGING)}
