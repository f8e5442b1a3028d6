"""Schedules: calls that are made again and again, each time in one transaction.

A firing is a row of ``kept``, and the step to the next due time: both are written or neither is,
so whoever dies when, a moment has one call or, where the policy says so, none. Times only go on:
a moment that has had its call is not met again, also where the clock is set back.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from dataclasses import replace
from time import time
from typing import Any, Final, NamedTuple, cast

from sqlalchemy import Connection, Engine, Row, and_, delete, func, select, update
from sqlalchemy.dialects import postgresql, sqlite

from flame_broker.frames import encode, reread
from flame_broker.keys import Key
from flame_broker.logs import get_logger
from flame_broker.messages import Deposit, call_id
from flame_broker.schedules import CatchUp
from flame_broker.topology import custody_queue
from flame_orchestrator.cron import Cron
from flame_orchestrator.custody import Custody
from flame_orchestrator.schema import kept, schedules

__all__ = ["Facts", "Fired", "Plan", "Schedules"]

_log = get_logger("flame.orchestrator")

Facts = dict[str, Any]
"""A schedule as people see it: plain values by name."""

_MOST_MISSED: Final = 100
_LATE_S: Final = 60.0
_MOST: Final = 100
_MOST_RUNS: Final = 10
_MOST_AHEAD: Final = 3
_ID_BYTES: Final = 5


class Plan(NamedTuple):
    """What somebody wants to have made again and again.

    Attributes:
        name: By which it is known.
        cron: When, see ``Cron``.
        timezone: On whose clocks.
        catch_up: What becomes of times that were missed.
        overlap: Whether a call is made while an earlier one has not ended.
        deposit: The call, of whatever client and number.
    """

    name: str
    cron: str
    timezone: str
    catch_up: CatchUp
    overlap: bool
    deposit: Deposit


class Fired(NamedTuple):
    """What a look at the clock has brought.

    Attributes:
        calls: How many were made.
        next_at: When the next is due, in seconds since 1970; None if none is.
    """

    calls: int
    next_at: float | None


class _Step(NamedTuple):
    """What is to be done for one schedule now.

    Attributes:
        moments: Those that have a call.
        next_at: When it is due again.
        skipped: The last moment that has none, and why.
    """

    moments: list[float]
    next_at: float | None
    skipped: tuple[float, str] | None


class Schedules:
    """The schedules of one cluster key. Its methods block: call them in a thread.

    Args:
        engine: The database.
        custody: Keeps the calls.
        key: Signs what is stored.
    """

    def __init__(self, engine: Engine, custody: Custody, key: Key) -> None:
        self._engine = engine
        self._custody = custody
        self._key = key
        self._dialect = postgresql if engine.dialect.name == "postgresql" else sqlite

    # ── what people do ───────────────────────────────────────────────────────

    def put(self, plan: Plan) -> Facts:
        """Write a schedule down, or change the one of that name.

        That one goes on with its numbers and, unless others are wanted, its times. It stays paused
        if it is.

        Raises:
            ValueError: The expression names no moment that comes, or there is no such time zone.
            sqlalchemy.exc.SQLAlchemyError: Nothing was written; try again.
        """
        now = time()
        first = Cron(plan.cron, plan.timezone).after(now)
        if first is None:
            raise ValueError(f"cron {plan.cron!r}: it names no time that ever comes")
        definition = self._definition(plan)
        fresh = {**definition, **self._beginning(plan.name, now), "due_at": first}
        with self._engine.begin() as connection:
            new = self._dialect.insert(schedules).values(fresh).on_conflict_do_nothing()
            if not connection.execute(new).rowcount:
                old = self._row(connection, plan.name, lock=True)
                if (old.cron, old.timezone) != (plan.cron, plan.timezone):
                    definition["due_at"] = _next(old, Cron(plan.cron, plan.timezone))
                self._change(connection, plan.name, definition)
        return self.show(plan.name)

    def every(self) -> list[Facts]:
        """All there are, by name."""
        wanted = select(schedules).where(self._ours()).order_by(schedules.c.name)
        with self._engine.connect() as connection:
            return [_facts(row) for row in connection.execute(wanted)]

    def show(self, name: str) -> Facts:
        """All that is known of one, with its latest calls.

        Raises:
            LookupError: There is none of this name.
        """
        with self._engine.connect() as connection:
            row = self._row(connection, name)
            return {**_facts(row), **_ahead(row), "calls": [*_calls_of(connection, row.client)]}

    def pause(self, name: str) -> None:
        """Make no more calls until told.

        Raises:
            LookupError: There is none of this name.
        """
        with self._engine.begin() as connection:
            self._change(connection, name, {"paused": True})

    def resume(self, name: str) -> None:
        """Go on with the next time from now on: what was due meanwhile is not caught up on.

        Raises:
            LookupError: There is none of this name.
            ValueError: This machine does not know its time zone.
        """
        with self._engine.begin() as connection:
            self._change(connection, name, {"paused": False})
            row = self._row(connection, name)
            next_at = _next(row, Cron(row.cron, row.timezone))
            self._change(connection, name, {"due_at": next_at})

    def remove(self, name: str) -> None:
        """Forget a schedule; calls that it has made go on.

        Raises:
            LookupError: There is none of this name.
        """
        with self._engine.begin() as connection:
            found = connection.execute(delete(schedules).where(self._is(name)))
            _check(found.rowcount, name)

    def run(self, name: str, order: str) -> str:
        """Make a call now, besides those on time; its id. The same order makes one call only.

        Raises:
            LookupError: There is none of this name.
        """
        made: list[str] = []

        def fire_once(connection: Connection) -> Iterator[Deposit]:
            self._change(connection, name, {"name": name})  # takes the row's lock
            once = f"flame schedule run {order}"
            columns = kept.c.client, kept.c.counter
            mine = and_(kept.c.key_id == self._key.hex_id, kept.c.once == once)
            known = connection.execute(select(*columns).where(mine)).one_or_none()
            row = self._row(connection, name)
            made[:] = [call_id(*(known or (row.client, row.fired + 1)))]
            if known is None:
                self._change(connection, name, {"fired": row.fired + 1})
                yield _deposit(row, row.fired + 1, time(), once)

        self._custody.keep(fire_once)
        return made[0]

    # ── when it is time ──────────────────────────────────────────────────────

    def fire(self, epoch: int, now: float, until: float) -> Fired:
        """Make the calls that are due by then.

        Args:
            epoch: Ours; only the leader fires.
            now: The time of day, in seconds since 1970.
            until: Up to when; calls that are made early wait in custody until they are due.

        Raises:
            Fenced: Another one leads.
            sqlalchemy.exc.SQLAlchemyError: Nothing was written; try again.
        """
        next_at = self._next_at(0.0)
        if next_at is None or next_at > until:
            return Fired(0, next_at)
        due: list[Row[Any]] = []
        made: list[Deposit] = []

        def fire_due(connection: Connection) -> list[Deposit]:
            due[:] = self._due(connection, until)
            made[:] = [d for row in due for d in self._fire(connection, row, now, until)]
            return made

        self._custody.keep(fire_due, epoch=epoch)
        more = len(due) == _MOST and bool(made)
        return Fired(len(made), now if more else self._next_at(until))

    def _next_at(self, after: float) -> float | None:
        waits = and_(self._ours(), schedules.c.paused.is_(False), schedules.c.due_at > after)
        with self._engine.connect() as connection:
            found = connection.scalar(select(func.min(schedules.c.due_at)).where(waits))
            return None if found is None else float(found)

    def _due(self, connection: Connection, until: float) -> list[Row[Any]]:
        waits = and_(self._ours(), schedules.c.paused.is_(False), schedules.c.due_at <= until)
        wanted = select(schedules).where(waits).order_by(schedules.c.due_at).limit(_MOST)
        return [*connection.execute(wanted.with_for_update())]

    def _fire(
        self, connection: Connection, row: Row[Any], now: float, until: float
    ) -> list[Deposit]:
        try:
            step = _step(row, now, until)
        except ValueError as problem:  # this machine knows fewer zones; the others go on
            _log.error("schedule.not_fired", name=row.name, reason=str(problem))
            return []
        if step.moments and not row.overlap and (busy := _unended(connection, row.client)):
            step = step._replace(moments=[], skipped=(step.moments[-1], f"{busy} had not ended"))
        changes: Facts = {"due_at": step.next_at}
        if step.skipped is not None:
            changes["skipped_at"], changes["skipped_why"] = step.skipped
            _log.warning("schedule.skipped", name=row.name, reason=step.skipped[1])
        if step.moments:
            changes |= {"fired": row.fired + len(step.moments), "fired_at": step.moments[-1]}
            _log.info("schedule.fired", name=row.name, calls=len(step.moments))
        self._change(connection, row.name, changes)
        return [_deposit(row, row.fired + n, at) for n, at in enumerate(step.moments, 1)]

    # ── rows ─────────────────────────────────────────────────────────────────

    def _ours(self) -> Any:
        return schedules.c.key_id == self._key.hex_id

    def _is(self, name: str) -> Any:
        return and_(self._ours(), schedules.c.name == name)

    def _row(self, connection: Connection, name: str, *, lock: bool = False) -> Row[Any]:
        wanted = select(schedules).where(self._is(name))
        row = connection.execute(wanted.with_for_update() if lock else wanted).one_or_none()
        _check(row is not None, name)
        return cast(Row[Any], row)

    def _change(self, connection: Connection, name: str, changes: Mapping[str, Any]) -> None:
        found = connection.execute(update(schedules).where(self._is(name)).values(**changes))
        _check(found.rowcount, name)

    def _definition(self, plan: Plan) -> Facts:
        queue = custody_queue(self._key.hex_id).name
        return {
            "cron": plan.cron,
            "timezone": plan.timezone,
            "catch_up": plan.catch_up.value,
            "overlap": plan.overlap,
            "body": encode(replace(plan.deposit, queue=queue), self._key),
        }

    def _beginning(self, name: str, now: float) -> Facts:
        return {
            "key_id": self._key.hex_id,
            "name": name,
            "client": secrets.token_hex(_ID_BYTES),
            "paused": False,
            "fired": 0,
            "skipped_why": "",
            "created_at": now,
        }


def _check(found: object, name: str) -> None:
    if not found:
        raise LookupError(f"there is no schedule {name!r}; `flame schedule` lists those there are")


def _step(row: Row[Any], now: float, until: float) -> _Step:
    """Which moments up to then have a call, by the policy.

    Raises:
        ValueError: This machine does not know the time zone.
    """
    cron, policy = Cron(row.cron, row.timezone), CatchUp(row.catch_up)
    found = cron.between(row.due_at, until, _MOST_MISSED if policy is CatchUp.ALL else 1)
    skipped = None
    if found and found[0] > row.due_at:
        last = cron.until(found[0] - 1)
        skipped = (last or row.due_at, "it was missed; a later one has its call")
    if policy is CatchUp.NONE and found and found[-1] < now - _LATE_S:
        skipped = (found[-1], f"it would have been {now - found[-1]:.0f} s late")
        found = []
    return _Step(found, cron.after(until), skipped)


def _next(row: Row[Any], cron: Cron) -> float | None:
    """The next moment from now on; one that had its call a little early is not met again."""
    now = time()
    met = row.fired_at if row.fired_at is not None and row.fired_at < now + _LATE_S else now
    return cron.after(max(now, met))


def _deposit(row: Row[Any], counter: int, due_at: float, once: str = "") -> Deposit:
    """The call of one firing; nobody waits for it but the ledger."""
    template = cast(Deposit, reread(row.body))
    call = template.frame.calls[0]._replace(counter=counter)
    frame = replace(template.frame, client=row.client, reply="", calls=(call,))
    return replace(template, frame=frame, due=(due_at,), keys=(once,))


def _unended(connection: Connection, client: str) -> str:
    """The latest call of a schedule that has not ended; ``""`` if all have."""
    runs = and_(kept.c.client == client, kept.c.ended_at.is_(None))
    counter = connection.scalar(select(func.max(kept.c.counter)).where(runs))
    return "" if counter is None else call_id(client, counter)


def _calls_of(connection: Connection, client: str) -> Iterator[Facts]:
    columns = kept.c.counter, kept.c.state, kept.c.due_at, kept.c.ended_at
    wanted = select(*columns).where(kept.c.client == client).order_by(kept.c.counter.desc())
    for row in connection.execute(wanted.limit(_MOST_RUNS)):
        yield {
            "id": call_id(client, row.counter),
            "state": row.state,
            "due_at": row.due_at,
            "ended_at": row.ended_at,
        }


def _ahead(row: Row[Any]) -> Facts:
    """The next few times."""
    try:
        cron, at = Cron(row.cron, row.timezone), row.due_at
    except ValueError as problem:
        return {"problem": str(problem)}
    found: list[float] = []
    while at is not None and not row.paused and len(found) < _MOST_AHEAD:
        found.append(at)
        at = cron.after(at)
    return {"ahead": found}


def _facts(row: Row[Any]) -> Facts:
    frame = cast(Deposit, reread(row.body)).frame
    pool, resources, priority = [*frame.queue.split(".")[3:], "", "", ""][:3]
    return {
        "name": row.name,
        "state": "paused" if row.paused else "active",
        "cron": row.cron,
        "timezone": row.timezone,
        "next_at": None if row.paused else row.due_at,
        "last_at": row.fired_at,
        "fired": row.fired,
        "label": frame.spec.label,
        "target": frame.spec.target.name,
        "pool": pool,
        "resources": resources,
        "priority": priority,
        "catch_up": row.catch_up,
        "overlap": row.overlap,
        "skipped_at": row.skipped_at,
        "skipped_why": row.skipped_why,
        "created_at": row.created_at,
    }
