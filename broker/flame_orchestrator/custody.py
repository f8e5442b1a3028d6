"""Calls in the orchestrator's custody: what is decided about them, in one transaction each.

A kept call waits until it is due, is queued for a worker, and ends; a failed attempt may have it
wait again. Whoever writes proves that he leads: an epoch that is not the latest is refused
(PROTOCOL.md, rule 11).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from time import time
from typing import Any, Final, NamedTuple, cast

import msgpack
from sqlalchemy import Connection, Engine, and_, bindparam, delete, func, select, update
from sqlalchemy.dialects import postgresql, sqlite

from flame_broker.errors import CallCancelled
from flame_broker.frames import encode, reread
from flame_broker.keys import Key
from flame_broker.messages import (
    CallFrame,
    ControlFrame,
    Deposit,
    Result,
    ResultFrame,
    RetryPolicy,
    Status,
    is_plain,
)
from flame_broker.outcomes import encode_failure
from flame_orchestrator.attempts import Kept, decide
from flame_orchestrator.history import outcome_of
from flame_orchestrator.ledger import Arrival, Ledger
from flame_orchestrator.schema import followers, kept, leaders, tombstones
from flame_orchestrator.states import CallState

__all__ = ["Custody", "Due", "Fenced", "Letter", "News"]

_TOMBSTONE_S: Final = 7 * 24 * 3600.0  # as long as the ledger queue keeps what it has
_MOST_AT_ONCE: Final = 10_000  # SQLite takes 32,766 values (sqlite.org/limits.html)
_HIGHEST: Final = 2**31 - 1  # PostgreSQL's integer
_OUR_NAME: Final = "orchestrator"


class Fenced(Exception):  # it says what happened to whoever gets it
    """Another orchestrator leads since; nothing was written."""


class Letter(NamedTuple):
    """A message for the custody queue that was verified.

    Attributes:
        frame: What it says.
        mark: Its signature, by which it is known again.
    """

    frame: Deposit | ResultFrame | ControlFrame
    mark: bytes

    @property
    def can_be_kept(self) -> bool:
        """Whether any database takes its texts and numbers; no client of ours sends others."""
        client, counters = _about(self.frame)
        texts = [client]
        if isinstance(self.frame, Deposit):
            texts += [self.frame.frame.reply, *self.frame.keys]
        return all(map(is_plain, texts)) and all(0 <= n <= _HIGHEST for n in counters)


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


@dataclass(slots=True)
class News:
    """What a transaction has decided.

    Attributes:
        results: For clients, each frame addressed to its reply queue.
        ended: The counters of the calls that ended, by client.
    """

    results: list[ResultFrame] = field(default_factory=list)
    ended: Mapping[str, set[int]] = field(default_factory=dict)


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
            return _Session(connection, self._ledger, self._key, self._dialect).take(letters)

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
            old = and_(kept.c.key_id == self._key.hex_id, kept.c.ended_at < before)
            return connection.execute(delete(kept).where(old)).rowcount

    def _waits(self) -> Any:
        return and_(kept.c.key_id == self._key.hex_id, kept.c.state == CallState.WAITING.value)

    def _fence(self, connection: Connection, epoch: int) -> None:
        # An update first: it takes the lock that a later one would have to wait for.
        ours = and_(leaders.c.key_id == self._key.hex_id, leaders.c.epoch == epoch)
        if not connection.execute(update(leaders).where(ours).values(epoch=epoch)).rowcount:
            raise Fenced(f"epoch {epoch} is over")


class _Follower(NamedTuple):
    """A call that is about to get the outcome of another one."""

    client: str
    counter: int
    reply: str
    of_client: str
    of_counter: int


class _Session:
    """One transaction: letters in, rows and results out.

    A call's row is read once and written once, however many letters are about it: a statement
    for each of them would take most of the time.
    """

    def __init__(self, connection: Connection, ledger: Ledger, key: Key, dialect: Any) -> None:
        self._connection = connection
        self._ledger = ledger
        self._key = key
        self._dialect = dialect
        self._known: dict[tuple[str, int], Kept] = {}
        self._stories: list[Arrival] = []
        self._news = News()
        self._followed: list[_Follower] = []

    def take(self, letters: Sequence[Letter]) -> News:
        """Decide what letters mean. No other letter is about a call before its deposit is."""
        others = [letter for letter in letters if not isinstance(letter.frame, Deposit)]
        for letter in letters:
            if isinstance(letter.frame, Deposit):
                self._deposit(letter.frame)
        self._load(others)
        for letter in others:
            if isinstance(letter.frame, ResultFrame):
                self._settle(letter.frame, letter.mark)
            elif isinstance(letter.frame, ControlFrame) and letter.frame.verb == "cancel":
                self._cancel(letter.frame, letter.mark)
        self._save()
        return self._write_stories()

    # ── rows ─────────────────────────────────────────────────────────────────

    def _load(self, letters: Iterable[Letter]) -> None:
        wanted: dict[str, set[int]] = defaultdict(set)
        for letter in letters:
            client, counters = _about(letter.frame)
            wanted[client] |= counters
        columns = [kept.c[name.name] for name in fields(Kept) if name.name in kept.c]
        for client, counters in wanted.items():
            ordered = sorted(counters)
            for first in range(0, len(ordered), _MOST_AT_ONCE):
                some = ordered[first : first + _MOST_AT_ONCE]
                among = and_(kept.c.client == client, kept.c.counter.in_(some))
                for row in self._connection.execute(select(*columns).where(among)):
                    self._known[client, row.counter] = Kept(*row)

    def _save(self) -> None:
        changed = [row for row in self._known.values() if row.changed]
        if not changed:
            return
        names = ("state", "attempt", "due_at", "reason", "ended_at", "ended_by")
        statement = update(kept).where(kept.c.id == bindparam("row"))
        self._connection.execute(
            statement.values({name: bindparam(f"new_{name}") for name in names}),
            [{"row": r.id, **{f"new_{n}": getattr(r, n) for n in names}} for r in changed],
        )
        ended = {r.id: r for r in changed if r.ended_at is not None and r.once is not None}
        if ended:
            gone = delete(followers).where(followers.c.of.in_(ended)).returning(followers)
            for row in self._connection.execute(gone):
                first = ended[row.of]
                self._followed.append(
                    _Follower(row.client, row.counter, row.reply, first.client, first.counter)
                )

    def _write_stories(self) -> News:
        ended = dict(self._ledger.write(self._connection, self._stories))
        late: list[Arrival] = []
        for follower in self._followed:
            outcome = outcome_of(self._connection, follower.of_client, follower.of_counter)
            if outcome is not None:
                every = (*outcome.items, outcome.final)
                results = tuple(r._replace(counter=follower.counter) for r in every)
                frame = ResultFrame(follower.reply, follower.client, _OUR_NAME, results)
                late.append(self._tell(frame))
        if late:
            for client, counters in self._ledger.write(self._connection, late).items():
                ended[client] = ended.get(client, set()) | counters
        self._news.ended = ended
        return self._news

    # ── deposits ─────────────────────────────────────────────────────────────

    def _deposit(self, deposit: Deposit) -> None:
        frame = deposit.frame
        self._stories.append(Arrival(frame, encode(frame, self._key)))
        rows = _kept_rows(deposit, self._key)
        single = [row for row in rows if row["once"] is None]
        if single:
            self._connection.execute(self._dialect.insert(kept).on_conflict_do_nothing(), single)
        for row in rows:
            if row["once"] is not None:
                insert = self._dialect.insert(kept).values(row).on_conflict_do_nothing()
                if not self._connection.execute(insert).rowcount:
                    self._follow(frame, row["counter"], row["once"])

    def _follow(self, frame: CallFrame, counter: int, once: str) -> None:
        """Somebody has asked for the same before: this call gets the outcome of that one."""
        same = and_(kept.c.key_id == self._key.hex_id, kept.c.once == once)
        first = self._connection.execute(select(kept).where(same)).one_or_none()
        if first is None or (first.client, first.counter) == (frame.client, counter):
            return  # the deposit itself came twice
        if first.ended_at is not None:
            follower = _Follower(frame.client, counter, frame.reply, first.client, first.counter)
            self._followed.append(follower)
            return
        row = {"client": frame.client, "counter": counter, "reply": frame.reply, "of": first.id}
        self._connection.execute(
            self._dialect.insert(followers).values(row).on_conflict_do_nothing()
        )

    # ── results ──────────────────────────────────────────────────────────────

    def _settle(self, frame: ResultFrame, mark: bytes) -> None:
        by_reply: dict[str, list[Result]] = {}
        for result in frame.results:
            row = self._known.get((frame.client, result.counter))
            if row is None:
                continue
            told = decide(row, result, frame.attempt, mark)
            if told is not None:
                by_reply.setdefault(row.reply, []).append(told)
        for reply, results in by_reply.items():
            self._stories.append(self._tell(replace(frame, queue=reply, results=tuple(results))))

    def _cancel(self, frame: ControlFrame, mark: bytes) -> None:
        client, counters = _about(frame)
        spare = bool(frame.arguments.get("spare_running"))
        self._bury(client, counters, mark)
        for counter in sorted(counters):
            row = self._known.get((client, counter))
            if row is None or (spare and row.state == CallState.QUEUED.value):
                continue
            if row.ended_at is not None and row.ended_by != mark:
                continue
            payload = encode_failure(CallCancelled, "cancelled in the orchestrator's custody")
            final = Result(counter, Status.FAILED, payload)
            if row.ended_at is None:
                row.end(final, mark)
            told = ResultFrame(row.reply, client, _OUR_NAME, (final,), row.attempt)
            self._stories.append(self._tell(told))

    def _bury(self, client: str, counters: set[int], mark: bytes) -> None:
        """Remember them for workers that are not there to hear of it."""
        row = {
            "mark": mark,
            "client": client,
            "counters": msgpack.packb(sorted(counters)),
            "until": time() + _TOMBSTONE_S,
        }
        insert = self._dialect.insert(tombstones).values(row)
        self._connection.execute(insert.on_conflict_do_nothing())

    def _tell(self, frame: ResultFrame) -> Arrival:
        self._news.results.append(frame)
        return Arrival(frame, encode(frame, self._key))


def _about(frame: Deposit | ResultFrame | ControlFrame) -> tuple[str, set[int]]:
    """Which calls a letter is about."""
    if isinstance(frame, ResultFrame):
        return frame.client, {result.counter for result in frame.results}
    if isinstance(frame, ControlFrame):
        numbers = frame.arguments.get("counters")
        found = numbers if isinstance(numbers, tuple) else ()
        return str(frame.arguments.get("client")), {n for n in found if isinstance(n, int)}
    return frame.frame.client, {call.counter for call in frame.frame.calls}


def _kept_rows(deposit: Deposit, key: Key) -> list[dict[str, Any]]:
    frame, policy, now = deposit.frame, deposit.retry, time()
    shared = {
        "key_id": key.hex_id,
        "client": frame.client,
        "state": CallState.WAITING.value,
        "attempt": 1,
        "reason": "",
        "retry": None if policy is None else _pack(policy),
        "queue_timeout_s": deposit.queue_timeout_s,
        "reply": frame.reply,
    }
    return [
        {
            **shared,
            "counter": call.counter,
            "once": once or None,
            "due_at": due_at or now,
            "body": encode(replace(frame, calls=(call,)), key),
        }
        for call, due_at, once in zip(frame.calls, deposit.due, deposit.keys, strict=True)
    ]


def _call_frame(body: bytes) -> CallFrame:
    return cast(CallFrame, reread(body))


def _pack(policy: RetryPolicy) -> bytes:
    fields = (policy.attempts, policy.backoff_s, policy.factor, policy.jitter)
    return cast(bytes, msgpack.packb(fields))
