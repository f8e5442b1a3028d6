"""What becomes of logs later: large ones move into the object store, old ones are forgotten."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Final

import msgpack
from sqlalchemy import ColumnElement, Connection, Engine, Row, and_, delete, func, insert, select

from flame_broker.errors import MalformedMessage, StoreError
from flame_broker.logs import get_logger
from flame_broker.messages import call_id
from flame_broker.objects import ObjectRef
from flame_broker.store import Store
from flame_orchestrator.chunks import compress
from flame_orchestrator.history import History
from flame_orchestrator.ledger import written_at
from flame_orchestrator.logs import OBJECT_BYTES, Call
from flame_orchestrator.schema import log_chunks

__all__ = ["LogUpkeep"]

_log = get_logger("flame.orchestrator")

_LEAST_BYTES: Final = OBJECT_BYTES // 2


class LogUpkeep:
    """Moves and forgets. Its methods block: call them in a thread, one for a call at a time.

    Args:
        engine: The database.
        store: Where large logs go; None to keep all in the database.
    """

    def __init__(self, engine: Engine, store: Store | None) -> None:
        self._engine = engine
        self._store = store
        self._history = History(engine)

    def move(self, call: Call) -> int:
        """Move the full chunks of a log into the object store, joined.

        Returns:
            How many chunks were moved; none without a store.

        Raises:
            StoreError: The store refused; what was not moved is still in the database.
            sqlalchemy.exc.SQLAlchemyError: The same, of the database.
        """
        if self._store is None:
            return 0
        moved = 0
        for chunks in _joinable(self._closed(call)):
            client, counter = call
            data = compress(zlib.decompress(chunk.body) for chunk in chunks)
            # The same lines whoever moves them, so nobody overwrites what another has moved.
            key = f"logs/{call_id(client, counter)}/{chunks[0].start}-{_end(chunks[-1])}"
            digest = hashlib.sha256(data).hexdigest()
            self._store.put(key, data, sha256=digest)
            with self._engine.begin() as connection:
                moved += _replace(connection, call, chunks, ObjectRef(key, len(data), digest))
        return moved

    def forget(self, *, before: float, keep_calls: int) -> int:
        """Forget the logs of calls that the history has forgotten.

        Args:
            before: As the history was told: what was written later stays in any case.
            keep_calls: Likewise.

        Returns:
            How many calls had one.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: The database refused; try again later.
        """
        forgotten = 0
        for call in self._older_than(before, keep_calls):
            if self._history.story(*call) is None:
                forgotten += self._delete(call)
        return forgotten

    def _older_than(self, before: float, keep_calls: int) -> list[Call]:
        columns = log_chunks.c
        with self._engine.connect() as connection:
            oldest = max(before, written_at(connection, keep_calls))
            wanted = select(columns.client, columns.counter).where(columns.at < oldest).distinct()
            return [(row.client, row.counter) for row in connection.execute(wanted)]

    def _delete(self, call: Call) -> bool:
        """Delete a log, its objects first: what is left of it is tried again."""
        with self._engine.connect() as connection:
            refs = connection.scalars(select(log_chunks.c.ref).where(_of(call))).all()
        try:
            for ref in filter(None, refs):
                if self._store is not None:
                    self._store.delete(ObjectRef.from_wire(msgpack.unpackb(ref)).key)
        except (StoreError, MalformedMessage) as problem:
            _log.warning("logs.not_deleted", call=call_id(*call), reason=str(problem))
            return False
        with self._engine.begin() as connection:
            return connection.execute(delete(log_chunks).where(_of(call))).rowcount > 0

    def _closed(self, call: Call) -> list[Row[Any]]:
        """The chunks in the database but for the last, which may become longer."""
        columns = log_chunks.c
        last = select(func.max(columns.start)).where(_of(call)).scalar_subquery()
        wanted = select(log_chunks).where(_of(call), columns.start < last, columns.ref.is_(None))
        with self._engine.connect() as connection:
            return [*connection.execute(wanted.order_by(columns.start))]


def _of(call: Call) -> ColumnElement[bool]:
    return and_(log_chunks.c.client == call[0], log_chunks.c.counter == call[1])


def _end(chunk: Row[Any]) -> int:
    return int(chunk.start + chunk.lines)


def _joinable(chunks: list[Row[Any]]) -> Iterator[list[Row[Any]]]:
    """Chunks of one run that follow one another, as many as make an object."""
    for _, run in groupby(chunks, lambda chunk: (chunk.worker, chunk.run, chunk.attempt)):
        together: list[Row[Any]] = []
        size = 0
        for chunk in run:
            if together and _end(together[-1]) != chunk.start:
                together, size = [], 0
            together.append(chunk)
            size += chunk.size
            if size >= _LEAST_BYTES:
                yield together
                together, size = [], 0


def _replace(connection: Connection, call: Call, chunks: Sequence[Row[Any]], ref: ObjectRef) -> int:
    """One row in place of several, unless they were forgotten meanwhile."""
    first, last = chunks[0], chunks[-1]
    these = log_chunks.c.start.between(first.start, last.start)
    if connection.execute(delete(log_chunks).where(_of(call), these)).rowcount != len(chunks):
        connection.rollback()
        return 0
    joined = {
        "client": call[0],
        "counter": call[1],
        "start": first.start,
        "worker": first.worker,
        "run": first.run,
        "attempt": first.attempt,
        "at": last.at,
        "lines": sum(chunk.lines for chunk in chunks),
        "size": sum(chunk.size for chunk in chunks),
        "upto": last.upto,
        "cut": last.cut,
        "ref": msgpack.packb(ref.to_wire()),
    }
    connection.execute(insert(log_chunks).values(joined))
    return len(chunks)
