"""Questions to the ledger: what became of a call, and which calls there are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

import msgpack
from sqlalchemy import Connection, Engine, Row, and_, select

from flame_broker.frames import reread
from flame_broker.messages import (
    CallFrame,
    Result,
    ResultFrame,
    Status,
    call_id,
    parse_call_id,
)
from flame_orchestrator.choice import choose, result_frames
from flame_orchestrator.schema import (
    NEVER,
    batches,
    dependencies,
    failures,
    kept,
    schedules,
    tombstones,
)
from flame_orchestrator.spans import Span, merged, near_runs, overlapping
from flame_orchestrator.states import TERMINAL, CallState

__all__ = ["Facts", "History", "Outcome", "outcome_of", "perhaps_ended"]

Facts = dict[str, Any]
"""A call as people see it: plain values by name."""

_NAMED = 5
_AT_ONCE = 256
_OF_CUSTODY = (
    kept.c.counter, kept.c.state, kept.c.attempt, kept.c.due_at, kept.c.reason,
    kept.c.worker, kept.c.started_at, kept.c.unmet, kept.c.limit_key, kept.c.limit_calls,
)  # fmt: skip
_FAILED = TERMINAL - {CallState.SUCCEEDED}


class Outcome(NamedTuple):
    """How a call ended.

    Attributes:
        items: The items of its stream, as far as they are known.
        final: Its end.
    """

    items: list[Result]
    final: Result


class History:
    """Reads. Its methods block: call them in a thread.

    Args:
        engine: The database.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def calls(self, *, state: CallState | None = None, label: str = "", limit: int) -> list[Facts]:
        """The newest calls, or those in one state."""
        with self._engine.connect() as connection:
            if state in _FAILED:
                return [*_failed(connection, state, label, limit)]
            if state in (CallState.WAITING, CallState.RUNNING):
                return [*islice(_in_custody(connection, state, label), limit)]
            found = [*islice(_listed(connection, state, label, limit), limit)]
            _add_ends(connection, found)
            return found

    def story(self, client: str, counter: int) -> Facts | None:
        """All that is known of one call; None if nothing is."""
        with self._engine.connect() as connection:
            batch = _batch_of(connection, client, counter)
            outcome = _ending_of(connection, client, counter)
            if batch is None and outcome is None:
                return None
            facts: Facts = {"id": call_id(client, counter), "state": CallState.QUEUED.value}
            facts |= _schedule_of(connection, client)
            if batch is not None:
                facts |= {"key_id": ".".join(batch.queue.split(".")[2:3])} | _circumstances(batch)
                if _has_ended(batch, counter):
                    facts["state"] = CallState.SUCCEEDED.value
            if outcome is not None:
                row, final = outcome
                facts |= {"state": CallState.SUCCEEDED.value, **_end(row, final)}
                facts |= _failure_of(connection, client, counter)
            facts |= _kept_in(connection, client, counter, counter).get(counter, {})
            return facts | _awaited_by(connection, client, counter)

    def outcome(self, client: str, counter: int) -> Outcome | None:
        """The outcome itself; None while the call has not ended."""
        with self._engine.connect() as connection:
            return outcome_of(connection, client, counter)

    def frame(self, client: str, counter: int) -> CallFrame | None:
        """What a call was made with, by itself in a frame; None if that is not known."""
        with self._engine.connect() as connection:
            batch = _batch_of(connection, client, counter)
        frame = None if batch is None else reread(batch.body)
        if not isinstance(frame, CallFrame):
            return None
        return replace(frame, calls=tuple(c for c in frame.calls if c.counter == counter))

    def cancelled(self) -> dict[str, set[int]]:
        """The counters of cancelled calls that a worker may still come upon, by client."""
        found: dict[str, set[int]] = defaultdict(set)
        with self._engine.connect() as connection:
            for row in connection.execute(select(tombstones)):
                found[row.client] |= {*msgpack.unpackb(row.counters)}
            left = {c: numbers - _ended_of(connection, c, numbers) for c, numbers in found.items()}
        return {client: counters for client, counters in left.items() if counters}

    def frames_about(self, client: str, counters: Iterable[int]) -> list[ResultFrame]:
        """The results of these calls of a client, in the frames that brought them."""
        found: dict[int, ResultFrame] = {}
        with self._engine.connect() as connection:
            for row, frame in result_frames(connection, client, counters):
                found[row.id] = frame
        return [found[row] for row in sorted(found)]


def outcome_of(connection: Connection, client: str, counter: int) -> Outcome | None:
    """The outcome of a call, as a transaction sees it; None while it has not ended."""
    found = _ending_of(connection, client, counter)
    if found is None:
        return None
    _, final = found
    if not final.index:
        return Outcome([], final)
    frames = (frame for _, frame in result_frames(connection, client, [counter]))
    every = (r for frame in frames for r in frame.results if r.counter == counter)
    items = {r.index: r for r in every if r.status is Status.ITEM}
    return Outcome([items[n] for n in sorted(items)], final)


def perhaps_ended(connection: Connection, client: str, counters: Iterable[int]) -> set[int]:
    """Those of a client's calls that have ended, and those whose frame is not known.

    The bits of frames say so, which is far cheaper than to look for outcomes that are not there.
    """
    wanted, going = set(counters), set[int]()
    columns = batches.c.first, batches.c.last, batches.c.counters, batches.c.done
    for first, last in near_runs(sorted(wanted)):
        near = overlapping(batches, client, first, last)
        for row in connection.execute(select(*columns).where(near)):
            span = Span.load(row.first, row.last, row.counters)
            every = span.bits(span.counters)
            going.update(span.picked(every & ~int.from_bytes(row.done, "little")))
    return wanted - going


def _listed(
    connection: Connection, state: CallState | None, label: str, limit: int
) -> Iterator[Facts]:
    """Calls by batch, the newest first, without decoding what they carry."""
    wanted = select(
        batches.c.client, batches.c.first, batches.c.last, batches.c.counters,
        batches.c.label, batches.c.target, batches.c.queue, batches.c.queued_at,
        batches.c.attempt, batches.c.expires_at, batches.c.done,
    ).order_by(batches.c.id.desc())  # fmt: skip
    if label:
        wanted = wanted.where(batches.c.label == label)
    if state is CallState.QUEUED:
        wanted = wanted.where(batches.c.unended > 0)
    else:
        wanted = wanted.limit(limit)
    found = connection.execute(wanted.execution_options(yield_per=_AT_ONCE))
    portions: Iterable[Sequence[Any]] = found.partitions(_AT_ONCE)
    for rows in portions:
        known = _known_of(connection, rows)
        for row in rows:
            span = Span.load(row.first, row.last, row.counters)
            done = int.from_bytes(row.done, "little")
            for at in range(len(span) - 1, -1, -1):
                counter = span.counters[at]
                ours = known[row.client].get(counter, {})
                facts = _summary(row, counter, ended=bool(done >> at & 1), known=ours)
                if state is None or facts["state"] == state.value:
                    yield facts


def _known_of(connection: Connection, rows: Iterable[Row[Any]]) -> dict[str, dict[int, Facts]]:
    """What is known of single calls in some batches, by client."""
    spans: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for row in rows:
        spans[row.client].append((row.first, row.last))
    known: dict[str, dict[int, Facts]] = {}
    for client, intervals in spans.items():
        ours: dict[int, Facts] = {}
        known[client] = ours
        for first, last in merged(sorted(intervals)):
            ours |= _failures_in(connection, client, first, last)
            for counter, facts in _kept_in(connection, client, first, last).items():
                ours[counter] = ours.get(counter, {}) | facts
    return known


def _add_ends(connection: Connection, calls: list[Facts]) -> None:
    """Say where and when calls ended that went well; failures say so themselves."""
    well: dict[str, dict[int, Facts]] = defaultdict(dict)
    for facts in calls:
        if facts["state"] == CallState.SUCCEEDED.value:
            client, counter = parse_call_id(facts["id"])
            well[client][counter] = facts
    for client, by_counter in well.items():
        for counter, chosen in choose(connection, client, by_counter).items():
            by_counter[counter].update(_end(chosen.row, chosen.final))


def _summary(row: Row[Any], counter: int, *, ended: bool, known: Facts) -> Facts:
    return {
        "id": call_id(row.client, counter),
        "state": (CallState.SUCCEEDED if ended else CallState.QUEUED).value,
        **_circumstances(row),
        **known,
    }


def _circumstances(row: Row[Any]) -> Facts:
    pool, resources, priority = [*row.queue.split(".")[3:], "", "", ""][:3]
    return {
        "label": row.label,
        "target": row.target,
        "pool": pool,
        "resources": resources,
        "priority": priority,
        "queued_at": row.queued_at,
        "attempt": row.attempt,
        "expires_at": row.expires_at or None,
    }


def _failed(
    connection: Connection, state: CallState | None, label: str, limit: int
) -> Iterator[Facts]:
    wanted = select(failures).where(failures.c.state == (state.value if state else ""))
    found = 0
    for row in connection.execute(wanted.order_by(failures.c.id.desc())):
        batch = _batch_of(connection, row.client, row.counter)
        if label and (batch is None or batch.label != label):
            continue
        around = _circumstances(batch) if batch is not None else {}
        yield {"id": call_id(row.client, row.counter), **around, **_failure(row)}
        found += 1
        if found == limit:
            return


def _in_custody(connection: Connection, state: CallState, label: str) -> Iterator[Facts]:
    """Calls that the orchestrator keeps until they are due, or that have leases; newest first."""
    wanted = select(kept).where(kept.c.state == state.value).order_by(kept.c.id.desc())
    for row in connection.execute(wanted):
        batch = _batch_of(connection, row.client, row.counter)
        if not label or (batch is not None and batch.label == label):
            around = _circumstances(batch) if batch is not None else {}
            yield {"id": call_id(row.client, row.counter), **around, **_custody(row)}


def _kept_in(connection: Connection, client: str, first: int, last: int) -> dict[int, Facts]:
    """What the orchestrator's custody adds to the stories of calls."""
    rows = connection.execute(
        select(*_OF_CUSTODY).where(kept.c.client == client, kept.c.counter.between(first, last))
    )
    return {row.counter: _custody(row) for row in rows}


def _awaited_by(connection: Connection, client: str, counter: int) -> Facts:
    """Which calls it waits for; one that the history does not know may never have been made."""
    ours = and_(kept.c.client == client, kept.c.counter == counter, kept.c.unmet > 0)
    on = dependencies.c.client, dependencies.c.counter
    of = select(*on).join(kept, kept.c.id == dependencies.c.call).where(ours).order_by(*on)
    rows = connection.execute(of).all()
    names = [call_id(row.client, row.counter) for row in rows[:_NAMED]]
    for at, row in enumerate(rows[:_NAMED]):
        if _batch_of(connection, row.client, row.counter) is None:
            names[at] += " (not in the history)"
    if len(rows) > _NAMED:
        names.append(f"{len(rows) - _NAMED} more")
    return {"reason": f"it waits for {', '.join(names)} to succeed"} if names else {}


def _schedule_of(connection: Connection, client: str) -> Facts:
    """Whose call it is, if a schedule makes the calls of that client."""
    name = connection.scalar(select(schedules.c.name).where(schedules.c.client == client))
    return {} if name is None else {"schedule": name}


def _custody(row: Any) -> Facts:
    facts: Facts = {"attempt": row.attempt}
    if row.started_at is not None:
        facts["started_at"] = row.started_at
    if row.state == CallState.RUNNING.value:
        facts |= {"state": row.state, "worker": row.worker}
    if row.state == CallState.WAITING.value:
        facts |= {"state": row.state}
        if row.due_at < NEVER:
            facts["due_at"] = row.due_at
        elif row.unmet:
            calls = "1 call" if row.unmet == 1 else f"{row.unmet} calls"
            facts["reason"] = f"it waits for {calls} to succeed"
        else:
            facts["reason"] = (
                f"it waits for a place: at most {row.limit_calls} calls with the limit "
                f"{row.limit_key!r} are under way at a time"
            )
        if row.reason:
            facts["reason"] = row.reason
    return facts


def _failures_in(connection: Connection, client: str, first: int, last: int) -> dict[int, Facts]:
    rows = connection.execute(
        select(failures).where(failures.c.client == client, failures.c.counter.between(first, last))
    )
    return {row.counter: _failure(row) for row in rows}


def _failure_of(connection: Connection, client: str, counter: int) -> Facts:
    return _failures_in(connection, client, counter, counter).get(counter, {})


def _failure(row: Row[Any]) -> Facts:
    return {
        "state": row.state,
        "error": row.error,
        "reason": row.reason,
        "worker": row.worker,
        "ended_at": row.ended_at,
    }


def _batch_of(connection: Connection, client: str, counter: int) -> Row[Any] | None:
    wanted = select(batches).where(overlapping(batches, client, counter, counter))
    for row in connection.execute(wanted.order_by(batches.c.id)):
        if Span.load(row.first, row.last, row.counters).bits([counter]):
            return row
    return None


def _ended_of(connection: Connection, client: str, counters: set[int]) -> set[int]:
    """Those of a client's calls whose end is known from a worker.

    One in our custody ends with its cancel, and what was queued of it is in its queue still.
    """
    ended: set[int] = set()
    near = overlapping(batches, client, min(counters, default=0), max(counters, default=0))
    for row in connection.execute(select(batches).where(near)):
        span = Span.load(row.first, row.last, row.counters)
        ended.update(span.picked(int.from_bytes(row.done, "little")))
    ours = and_(kept.c.client == client, kept.c.state == CallState.CANCELLED.value)
    return (ended & counters).difference(connection.scalars(select(kept.c.counter).where(ours)))


def _has_ended(batch: Row[Any], counter: int) -> bool:
    span = Span.load(batch.first, batch.last, batch.counters)
    return bool(span.bits([counter]) & int.from_bytes(batch.done, "little"))


def _ending_of(connection: Connection, client: str, counter: int) -> tuple[Row[Any], Result] | None:
    """The outcome of a call that counts, and where it stands."""
    chosen = choose(connection, client, [counter]).get(counter)
    return None if chosen is None else (chosen.row, chosen.final)


def _end(row: Row[Any], final: Result) -> Facts:
    size = final.ref.size if final.ref is not None else len(final.payload)
    return {
        "worker": row.worker,
        "ended_at": row.ended_at,
        "result_bytes": size,
        "result_key": final.ref.key if final.ref is not None else None,
    }
