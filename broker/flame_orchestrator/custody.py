"""Calls in the orchestrator's custody: what is decided about them, in one transaction each.

A kept call waits until it is due, is queued for a worker, and ends; a failed attempt may have it
wait again. Whoever writes proves that he leads: an epoch that is not the latest is refused
(PROTOCOL.md, rule 11).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from time import time
from typing import Any, Final, NamedTuple, cast

from sqlalchemy import (
    Connection,
    Engine,
    and_,
    bindparam,
    delete,
    func,
    literal_column,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from flame_broker.frames import reread
from flame_broker.keys import Key
from flame_broker.messages import CallFrame, Deposit
from flame_orchestrator.bars import Lifted, awaits, give_places, keys_that_want, lift
from flame_orchestrator.ledger import Ledger
from flame_orchestrator.letters import Letter
from flame_orchestrator.schema import kept, leaders, tombstones
from flame_orchestrator.session import News, Session
from flame_orchestrator.states import CallState

__all__ = ["Custody", "Due", "Fenced", "Run"]

_EPOCHS_SINCE: Final = 1_577_836_800
"""2020 began then. A first epoch is the time since: workers who have heard an orchestrator with
another database must not take the one with a new database for its predecessor (rule 11)."""

_KEYS_AT_ONCE: Final = 200
"""Limits looked at in one transaction: others want to write, too."""


class Fenced(Exception):  # it says what happened to whoever gets it
    """Another orchestrator leads since; nothing was written."""


class Due(NamedTuple):
    """A call whose time has come.

    Attributes:
        id: Of its row.
        attempt: Which attempt this is.
        due_at: In seconds since 1970.
        frame: As it was deposited: for its worker's queue, with the reply address of its client.
        queue_timeout_s: How long it may wait there; 0 for ever.
    """

    id: int
    attempt: int
    due_at: float
    frame: CallFrame
    queue_timeout_s: float


class Run(NamedTuple):
    """One start of calls of a client, which has the lease on them.

    Attributes:
        run: Its name.
        client: Whose calls.
        counters: Which.
        limit_s: How long its worker lets them run; 0 for ever.
    """

    run: str
    client: str
    counters: frozenset[int]
    limit_s: float = 0.0


class Late(NamedTuple):
    """A call that has waited in its queue for longer than it was to."""

    client: str
    counter: int
    attempt: int


class Custody:
    """Keeps the calls of one cluster key. Its methods block: call them in a thread.

    Args:
        engine: The database.
        ledger: Takes the stories of kept calls.
        key: Signs what is stored.
    """

    def __init__(self, engine: Engine, ledger: Ledger, key: Key) -> None:
        self._engine = engine
        self._ledger = ledger
        self._key = key
        self._dialect = postgresql if engine.dialect.name == "postgresql" else sqlite
        self._full: set[str] = set()  # limits without a place, until something changes under them

    def lead(self, holder: str) -> int:
        """Become the leader; the epoch, which every later one exceeds.

        Args:
            holder: Who leads from now on, for people.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: Nothing was written; try again.
        """
        first = int(time()) - _EPOCHS_SINCE
        new = self._dialect.insert(leaders).values(
            key_id=self._key.hex_id, epoch=first, holder=holder, since=time()
        )
        taken = new.on_conflict_do_update(
            index_elements=["key_id"],
            set_={"epoch": leaders.c.epoch + 1, "holder": holder, "since": time()},
        ).returning(leaders.c.epoch)
        self._full.clear()
        with self._engine.begin() as connection:
            return int(connection.execute(taken).scalar_one())

    def record(self, epoch: int, letters: Sequence[Letter]) -> News:
        """Take what has arrived, all or none. A letter that comes twice changes nothing more.

        Raises:
            Fenced: Another one leads.
            sqlalchemy.exc.SQLAlchemyError: Nothing was written; try again.
        """
        with self._engine.begin() as connection:
            self._fence(connection, epoch)
            session = Session(connection, self._ledger, self._key, self._dialect, epoch)
            news = session.take(letters)
        self._full -= news.limits
        return news

    def keep(
        self, find: Callable[[Connection], Iterable[Deposit]], *, epoch: int | None = None
    ) -> None:
        """Keep the calls that ``find`` gives, in the transaction that it reads and writes in.

        Args:
            find: What is to be done; it may run again if this one was not written.
            epoch: Ours, for what only the leader may do.

        Raises:
            Fenced: Another one leads.
            sqlalchemy.exc.SQLAlchemyError: Nothing was written; try again.
        """
        with self._engine.begin() as connection:
            if epoch is not None:
                self._fence(connection, epoch)
            letters = [Letter(deposit, b"") for deposit in find(connection)]
            session = Session(connection, self._ledger, self._key, self._dialect, epoch or 0)
            news = session.take(letters)
        self._full -= news.limits

    def due(self, before: float, limit: int) -> list[Due]:
        """The calls that wait and whose time comes by then, the longest overdue first."""
        wanted = (
            select(kept.c.id, kept.c.attempt, kept.c.due_at, kept.c.body, kept.c.queue_timeout_s)
            .where(self._waits(), kept.c.due_at <= before)
            .order_by(kept.c.due_at)
            .limit(limit)
        )
        with self._engine.connect() as connection:
            return [
                Due(row.id, row.attempt, row.due_at, _call_frame(row.body), row.queue_timeout_s)
                for row in connection.execute(wanted)
            ]

    def runs(self) -> list[Run]:
        """The runs that have leases."""
        running = and_(kept.c.key_id == self._key.hex_id, kept.c.state == CallState.RUNNING.value)
        wanted = select(kept.c.run, kept.c.client, kept.c.counter, kept.c.body).where(running)
        found: dict[str, Run] = {}
        with self._engine.connect() as connection:
            for row in connection.execute(wanted):
                run = found.get(row.run)
                if run is None:
                    limit_s = _call_frame(row.body).spec.limit_s
                    run = Run(row.run, row.client, frozenset(), limit_s)
                found[row.run] = run._replace(counters=run.counters | {row.counter})
        return [*found.values()]

    def lift_bars(self, epoch: int, before: float, among: Mapping[str, set[int]] | None) -> Lifted:
        """Let calls go on whose awaited calls have succeeded, or for which there is a place now.

        Args:
            epoch: Ours.
            before: For places: calls whose time comes by then, in seconds since 1970.
            among: What may have ended, by client; None for anything.

        Raises:
            Fenced: Another one leads.
            sqlalchemy.exc.SQLAlchemyError: Nothing was written; try again.
        """
        with self._engine.connect() as connection:
            awaited = awaits(connection)
            news = awaited and among != {}
            wanting = keys_that_want(connection, self._key.hex_id, before)
            keys = [key for key in wanting if key not in self._full]
            if not news and not keys:
                return Lifted([], more=awaited)
        with self._engine.begin() as connection:
            self._fence(connection, epoch)
            lifted = lift(connection, self._key.hex_id, among)
            full = give_places(connection, self._key.hex_id, before, keys[:_KEYS_AT_ONCE])
        self._full |= full
        return lifted._replace(places=len(keys) > _KEYS_AT_ONCE or news)

    def check(self, epoch: int) -> None:
        """Prove that we lead, without writing anything.

        Raises:
            Fenced: Another one leads.
        """
        latest = select(leaders.c.epoch).where(leaders.c.key_id == self._key.hex_id)
        with self._engine.connect() as connection:
            if connection.scalar(latest) != epoch:
                raise Fenced(f"epoch {epoch} is over")

    def next_due(self, after: float) -> float | None:
        """When the next call is due that is not due by then, in seconds since 1970."""
        with self._engine.connect() as connection:
            due = select(func.min(kept.c.due_at)).where(self._waits(), kept.c.due_at > after)
            limited = and_(kept.c.key_id == self._key.hex_id, kept.c.place == literal_column("0"))
            soon = select(func.min(kept.c.not_before)).where(limited, kept.c.not_before > after)
            found = [connection.scalar(earliest) for earliest in (due, soon)]
            return min((float(at) for at in found if at is not None), default=None)

    def queued(self, epoch: int, calls: Iterable[Due]) -> None:
        """Note that attempts are in their queues.

        Raises:
            Fenced: Another one leads.
            sqlalchemy.exc.SQLAlchemyError: Nothing was written; try again.
        """
        # The attempt may be over by now, or given back by its worker, and the call wait anew: then
        # it is due at another time.
        statement = update(kept).where(
            kept.c.id == bindparam("row"),
            kept.c.attempt == bindparam("at"),
            kept.c.due_at == bindparam("due"),
            kept.c.state == CallState.WAITING.value,
        )
        now = time()
        rows = [
            {
                "row": call.id,
                "at": call.attempt,
                "due": call.due_at,
                "late": now + call.queue_timeout_s if call.queue_timeout_s else None,
            }
            for call in calls
        ]
        with self._engine.begin() as connection:
            self._fence(connection, epoch)
            if rows:
                queued = {"state": CallState.QUEUED.value, "late_at": bindparam("late")}
                connection.execute(statement.values(queued), rows)

    def late(self, before: float, limit: int) -> list[Late]:
        """Calls in their queues that were to start earlier, in seconds since 1970; some of them."""
        waits = and_(kept.c.key_id == self._key.hex_id, kept.c.state == CallState.QUEUED.value)
        wanted = (
            select(kept.c.client, kept.c.counter, kept.c.attempt)
            .where(waits, kept.c.late_at < before)
            .limit(limit)
        )
        with self._engine.connect() as connection:
            return [Late(*row) for row in connection.execute(wanted)]

    def forget(self, *, before: float) -> int:
        """Delete what ended earlier, in seconds since 1970; how many rows that were."""
        with self._engine.begin() as connection:
            connection.execute(delete(tombstones).where(tombstones.c.until < time()))
            # Of any key: one that was changed since, or that was an embedded cluster's, has nobody.
            return connection.execute(delete(kept).where(kept.c.ended_at < before)).rowcount

    def _waits(self) -> Any:
        return and_(kept.c.key_id == self._key.hex_id, kept.c.state == CallState.WAITING.value)

    def _fence(self, connection: Connection, epoch: int) -> None:
        # An update first: it takes the lock that a later one would have to wait for.
        ours = and_(leaders.c.key_id == self._key.hex_id, leaders.c.epoch == epoch)
        if not connection.execute(update(leaders).where(ours).values(epoch=epoch)).rowcount:
            raise Fenced(f"epoch {epoch} is over")


def _call_frame(body: bytes) -> CallFrame:
    return cast(CallFrame, reread(body))
