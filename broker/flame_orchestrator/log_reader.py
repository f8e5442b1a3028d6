"""The log of a call, read from where somebody has got to."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from itertools import islice
from typing import Any, Final, NamedTuple

import msgpack
from sqlalchemy import Engine, Row, select

from flame_broker.errors import MalformedMessage, StoreError
from flame_broker.objects import ObjectRef
from flame_broker.store import Store
from flame_orchestrator.chunks import NOTE, Line, Part, size_of, unpack
from flame_orchestrator.schema import log_chunks

__all__ = ["LogReader", "Reading"]

_CHUNKS: Final = 64


class Reading(NamedTuple):
    """A stretch of a log.

    Attributes:
        parts: Its lines.
        upto: Where the next stretch begins.
        more: There are lines behind it already.
    """

    parts: list[Part]
    upto: int
    more: bool


class LogReader:
    """Reads. Its methods block: call them in a thread.

    Args:
        engine: The database.
        store: Where large logs lie; None if there is none.
    """

    def __init__(self, engine: Engine, store: Store | None) -> None:
        self._engine = engine
        self._store = store
        self._latest = "", b""  # who reads an object takes several stretches of it

    def read(self, client: str, counter: int, since: int, *, most_bytes: int) -> Reading:
        """The lines of a call from number ``since`` on: one at least, if there is one.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: The database cannot be read.
        """
        parts: list[Part] = []
        room, upto = most_bytes, since
        rows = self._rows(client, counter, since)
        for row in rows:
            end = row.start + row.lines
            lines = self._lines(row, upto)
            taken = _fitting(lines, room)
            room -= sum(map(size_of, taken))
            complete = len(taken) == len(lines)
            upto = end if complete else upto + len(taken)
            parts.append(Part(row.attempt, row.worker, row.run, taken))
            if not complete or room <= 0:
                return Reading(parts, upto, more=not complete or row is not rows[-1])
        return Reading(parts, upto, more=len(rows) == _CHUNKS)

    def _rows(self, client: str, counter: int, since: int) -> Sequence[Row[Any]]:
        columns = log_chunks.c
        wanted = (
            select(log_chunks)
            .where(columns.client == client, columns.counter == counter)
            .where(columns.start + columns.lines > since)
            .order_by(columns.start)
            .limit(_CHUNKS)
        )
        with self._engine.connect() as connection:
            return connection.execute(wanted).all()

    def _lines(self, row: Row[Any], since: int) -> list[Line]:
        try:
            data = row.body if row.ref is None else self._fetch(row.ref)
        except (StoreError, MalformedMessage) as problem:
            # A note stands for them, so that the rest can be read.
            return [Line(row.at, NOTE, f"{row.lines:,} lines cannot be read: {problem}")]
        return [*islice(unpack(zlib.decompress(data)), since - row.start, None)]

    def _fetch(self, wire: bytes) -> bytes:
        ref = ObjectRef.from_wire(msgpack.unpackb(wire))
        if self._store is None:
            raise StoreError(
                f"they lie in the object store as {ref.key}, and this orchestrator has none: set "
                "FLAME_STORE_URL there"
            )
        key, data = self._latest
        if key != ref.key:
            data = self._store.get(ref.key, sha256=ref.sha256)
            self._latest = ref.key, data
        return data


def _fitting(lines: list[Line], room: int) -> list[Line]:
    """As many as fit, and one in any case."""
    for taken, line in enumerate(lines):
        room -= size_of(line)
        if room < 0 and taken:
            return lines[:taken]
    return lines
