"""The ledger: what is known of every call, written in batches.

What arrives may come in any order and more than once; the same rows come out. A frame is known
again by its signature, and a call has ended as soon as any outcome of it is known.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from time import time
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine, Table, and_, bindparam, delete, select, update
from sqlalchemy.dialects import postgresql, sqlite

from flame_broker.errors import MalformedMessage
from flame_broker.frames import identity, reread
from flame_broker.logs import get_logger
from flame_broker.messages import CallFrame, ControlFrame, Result, ResultFrame, Status
from flame_orchestrator.choice import choose, disowned_row, doubtful
from flame_orchestrator.schema import batches, clients, disowned, failures, outcomes
from flame_orchestrator.spans import Span, near_runs, overlapping
from flame_orchestrator.states import Ending, ending_of

__all__ = ["Arrival", "Ledger", "written_at"]

_log = get_logger("flame.orchestrator")


class Arrival(NamedTuple):
    """A frame that was verified, and the bytes it came as."""

    frame: CallFrame | ResultFrame | ControlFrame
    body: bytes


@dataclass(slots=True)
class _Ended:
    """The calls of one client that ended, as one transaction hears it."""

    counters: set[int] = field(default_factory=set)
    failures: dict[int, dict[str, Any]] = field(default_factory=dict)

    def drop_late(self, known: set[int]) -> None:
        """Forget failures of calls that had another outcome before: the first one counts."""
        self.failures = {n: row for n, row in self.failures.items() if n not in known}


class Ledger:
    """Writes what arrives. Its methods block: call them in a thread.

    Args:
        engine: The database.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._dialect = postgresql if engine.dialect.name == "postgresql" else sqlite
        self._latest = 0.0

    def record(self, arrivals: Sequence[Arrival]) -> Mapping[str, set[int]]:
        """Write frames down, all or none.

        Returns:
            The counters of the calls that ended, by client.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: Nothing was written; try again.
        """
        with self._engine.begin() as connection:
            return self.write(connection, arrivals)

    def write(self, connection: Connection, arrivals: Sequence[Arrival]) -> Mapping[str, set[int]]:
        """The same, as a part of a transaction."""
        now = self._now()
        calls = [(a.frame, a.body) for a in arrivals if isinstance(a.frame, CallFrame)]
        results = [(a.frame, a.body) for a in arrivals if isinstance(a.frame, ResultFrame)]
        ended = _ended((frame for frame, _ in results), now)
        for client, fresh in ended.items():
            fresh.drop_late(_ended_among(connection, client, [*fresh.failures]))
        words = [(a.frame, a.body) for a in arrivals if isinstance(a.frame, ControlFrame)]
        refusals = (disowned_row(word, body, now) for word, body in words)
        rows = {
            batches: [_batch_row(frame, body, now) for frame, body in calls],
            outcomes: [_outcome_row(frame, body, now) for frame, body in results],
            disowned: [row for row in refusals if row is not None],
        }
        for table, new in rows.items():
            self._insert(connection, table, new)
        self._widen(connection, _widths(chain.from_iterable(rows.values())))
        for fresh in ended.values():
            self._insert(connection, failures, [*fresh.failures.values()])
        self._choose_again(connection, ended, rows[disowned])
        self._tick_off(connection, [frame for frame, _ in calls], ended)
        return {client: fresh.counters for client, fresh in ended.items()}

    def forget(self, *, before: float, keep_calls: int) -> int:
        """Delete the stories of ended calls that are old, or the oldest where there are too many.

        Calls that have not ended stay, however old.

        Args:
            before: In seconds since 1970: what was written earlier is old.
            keep_calls: About how many calls stay.

        Returns:
            How many rows were deleted.
        """
        with self._engine.begin() as connection:
            oldest = max(before, written_at(connection, keep_calls))
            ended = and_(batches.c.unended == 0, batches.c.queued_at < oldest)
            gone = connection.execute(delete(batches).where(ended)).rowcount
            # What ended before it, ended before everything that stays was queued.
            for table in (outcomes, failures):
                gone += connection.execute(delete(table).where(table.c.ended_at < oldest)).rowcount
            connection.execute(delete(disowned).where(disowned.c.at < oldest))
            return gone

    def _now(self) -> float:
        """The time of day; it stands still where the clock is set back.

        So no call ends before it was queued, and rows stand in the order of their times.
        """
        self._latest = max(self._latest, time())
        return self._latest

    def _widen(self, connection: Connection, widest: Mapping[str, int]) -> None:
        for client, width in widest.items():
            new = self._dialect.insert(clients).values(client=client, widest=width)
            changed = {"widest": new.excluded.widest}
            smaller = clients.c.widest < new.excluded.widest
            connection.execute(
                new.on_conflict_do_update(index_elements=["client"], set_=changed, where=smaller)
            )

    def _insert(self, connection: Connection, table: Table, rows: list[dict[str, Any]]) -> None:
        if rows:
            connection.execute(self._dialect.insert(table).on_conflict_do_nothing(), rows)

    def _choose_again(
        self,
        connection: Connection,
        ended: Mapping[str, _Ended],
        refusals: Iterable[dict[str, Any]],
    ) -> None:
        """Of calls with several outcomes, let that one be told of which their client took."""
        calls = defaultdict(set, {client: {*fresh.counters} for client, fresh in ended.items()})
        for row in refusals:
            span = Span.load(row["first"], row["last"], row["counters"])
            calls[row["client"]] |= {*span.counters}
        for client, counters in doubtful(connection, calls).items():
            told = and_(failures.c.client == client, failures.c.counter.in_(counters))
            connection.execute(delete(failures).where(told))
            chosen = choose(connection, client, counters).values()
            endings = ((one, ending_of(one.final)) for one in chosen)
            self._insert(
                connection,
                failures,
                [
                    _failure_row(one.frame, one.final, ending, one.row.ended_at)
                    for one, ending in endings
                    if ending is not None and ending.error
                ],
            )

    def _tick_off(
        self,
        connection: Connection,
        queued: Iterable[CallFrame],
        ended: Mapping[str, _Ended],
    ) -> None:
        """Set the bits of ended calls in their batches, whichever of the two came first."""
        known: dict[str, set[int]] = defaultdict(set)
        for client, fresh in ended.items():
            known[client] |= fresh.counters
        fresh_calls: dict[str, list[int]] = defaultdict(list)
        for frame in queued:
            fresh_calls[frame.client] += [call.counter for call in frame.calls]
        for client, counters in fresh_calls.items():
            known[client] |= _ended_among(connection, client, counters)
        changes = [
            change
            for client, counters in known.items()
            if counters
            for change in _changes(connection, client, sorted(counters))
        ]
        if changes:
            statement = update(batches).where(batches.c.id == bindparam("batch"))
            connection.execute(
                statement.values(done=bindparam("bits"), unended=bindparam("left")), changes
            )


def _widths(rows: Iterable[dict[str, Any]]) -> dict[str, int]:
    """How wide the widest of these frames is, by client."""
    widest: dict[str, int] = {}
    for row in rows:
        width = row["last"] - row["first"]
        widest[row["client"]] = max(width, widest.get(row["client"], 0))
    return widest


def written_at(connection: Connection, keep_calls: int) -> float:
    """When the oldest of the newest batches was written that together hold so many calls."""
    held = 0
    rows = connection.execute(
        select(batches.c.queued_at, batches.c.calls).order_by(batches.c.id.desc())
    )
    for queued_at, calls in rows:
        held += calls
        if held > keep_calls:
            return float(queued_at)
    return 0.0


def _ended(frames: Iterable[ResultFrame], now: float) -> dict[str, _Ended]:
    found: dict[str, _Ended] = defaultdict(_Ended)
    for frame in frames:
        for result in frame.results:
            try:
                ending = ending_of(result)
            except MalformedMessage as problem:
                _log.warning("outcome.unreadable", client=frame.client, reason=str(problem))
                ending = None
            if ending is None:
                continue
            fresh = found[frame.client]
            if ending.error and result.counter not in fresh.counters:
                fresh.failures[result.counter] = _failure_row(frame, result, ending, now)
            fresh.counters.add(result.counter)
    return found


def _ended_among(connection: Connection, client: str, counters: list[int]) -> set[int]:
    """Those of these calls whose outcome is known: it may have arrived before them."""
    frames = [
        reread(body)
        for first, last in near_runs(sorted(counters))
        for body in connection.scalars(
            select(outcomes.c.body).where(overlapping(outcomes, client, first, last))
        )
    ]
    return {
        result.counter
        for frame in frames
        if isinstance(frame, ResultFrame)
        for result in frame.results
        if result.status not in (Status.ITEM, Status.AGAIN)
    }


def _changes(connection: Connection, client: str, ordered: list[int]) -> Iterable[dict[str, Any]]:
    rows = connection.execute(
        select(
            batches.c.id,
            batches.c.first,
            batches.c.last,
            batches.c.counters,
            batches.c.calls,
            batches.c.done,
        ).where(overlapping(batches, client, ordered[0], ordered[-1]), batches.c.unended > 0)
    )
    for row in rows:
        before = int.from_bytes(row.done, "little")
        after = before | Span.load(row.first, row.last, row.counters).bits(ordered)
        if after != before:
            yield {
                "batch": row.id,
                "bits": after.to_bytes(len(row.done), "little"),
                "left": row.calls - after.bit_count(),
            }


def _batch_row(frame: CallFrame, body: bytes, now: float) -> dict[str, Any]:
    span = Span.of(call.counter for call in frame.calls)
    return {
        "mark": identity(body),
        "client": _clean(frame.client),
        "first": span.first,
        "last": span.last,
        "calls": len(span),
        "counters": span.pack(),
        "label": _clean(frame.spec.label),
        "target": _clean(frame.spec.target.name),
        "queue": _clean(frame.queue),
        "attempt": frame.attempt,
        "queued_at": now,
        "expires_at": frame.expires_at,
        "body": body,
        "done": bytes(-(-len(span) // 8)),
        "unended": len(span),
    }


def _outcome_row(frame: ResultFrame, body: bytes, now: float) -> dict[str, Any]:
    counters = [r.counter for r in frame.results]
    return {
        "mark": identity(body),
        "client": _clean(frame.client),
        "first": min(counters),
        "last": max(counters),
        "worker": _clean(frame.worker),
        "ended_at": now,
        "seconds": frame.seconds,
        "body": body,
    }


def _failure_row(frame: ResultFrame, result: Result, ending: Ending, now: float) -> dict[str, Any]:
    return {
        "client": _clean(frame.client),
        "counter": result.counter,
        "state": ending.state.value,
        "error": _clean(ending.error),
        "reason": _clean(ending.reason),
        "worker": _clean(frame.worker),
        "ended_at": now,
    }


def _clean(text: str) -> str:
    """Text that any database takes: no halves of characters, no zeros."""
    return text.encode("utf-8", "replace").decode().replace("\0", "")
