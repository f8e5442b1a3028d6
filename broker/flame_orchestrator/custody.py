"""Calls in the orchestrator's custody: what is decided about them, in one transaction each.

A kept call waits until it is due, is queued for a worker, and ends; a failed attempt may have it
wait again. Whoever writes proves that he leads: an epoch that is not the latest is refused
(PROTOCOL.md, rule 11).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from time import time
from typing import Any, NamedTuple, cast

from sqlalchemy import Connection, Engine, and_, bindparam, delete, func, select, update
from sqlalchemy.dialects import postgresql, sqlite

from flame_broker.frames import reread
from flame_broker.keys import Key
from flame_broker.messages import CallFrame, Deposit
from flame_orchestrator.bars import Lifted, awaits, give_places, lift, wants_places
from flame_orchestrator.ledger import Ledger
from flame_orchestrator.letters import Letter
from flame_orchestrator.schema import kept, leaders, tombstones
from flame_orchestrator.session import News, Session
from flame_orchestrator.states import CallState

__all__ = ["Custody", "Due", "Fenced", "Run"]


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
    """

    run: str
    client: str
    counters: frozenset[int]


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

    def lead(self, holder: str) -> int:
        """Become the leader; the epoch, which every later one exceeds.

        Args:
            holder: Who leads from now on, for people.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: Nothing was written; try again.
        """
        new = self._dialect.insert(leaders).values(
            key_id=self._key.hex_id, epoch=1, holder=holder, since=time()
        )
        taken = new.on_conflict_do_update(
            index_elements=["key_id"],
            set_={"epoch": leaders.c.epoch + 1, "holder": holder, "since": time()},
        ).returning(leaders.c.epoch)
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
            return session.take(letters)

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
            session.take(letters)

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
        wanted = select(kept.c.run, kept.c.client, kept.c.counter).where(running)
        found: dict[tuple[str, str], set[int]] = {}
        with self._engine.connect() as connection:
            for row in connection.execute(wanted):
                found.setdefault((row.run, row.client), set()).add(row.counter)
        return [Run(run, client, frozenset(numbers)) for (run, client), numbers in found.items()]

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
            if not news and not wants_places(connection, self._key.hex_id, before):
                return Lifted([], more=awaited)
        with self._engine.begin() as connection:
            self._fence(connection, epoch)
            lifted = lift(connection, self._key.hex_id, among)
            give_places(connection, self._key.hex_id, before)
            return lifted

    def next_due(self, after: float) -> float | None:
        """When the next call is due that is not due by then, in seconds since 1970."""
        with self._engine.connect() as connection:
            found = connection.scalar(
                select(func.min(kept.c.due_at)).where(self._waits(), kept.c.due_at > after)
            )
            return None if found is None else float(found)

    def queued(self, epoch: int, calls: Iterable[Due]) -> None:
        """Note that attempts are in their queues.

        Raises:
            Fenced: Another one leads.
            sqlalchemy.exc.SQLAlchemyError: Nothing was written; try again.
        """
        # The attempt may be over by now, and another one waiting.
        statement = update(kept).where(
            kept.c.id == bindparam("row"),
            kept.c.attempt == bindparam("at"),
            kept.c.state == CallState.WAITING.value,
        )
        rows = [{"row": call.id, "at": call.attempt} for call in calls]
        with self._engine.begin() as connection:
            self._fence(connection, epoch)
            if rows:
                connection.execute(statement.values(state=CallState.QUEUED.value), rows)

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
