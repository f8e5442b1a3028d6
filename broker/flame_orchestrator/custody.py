"""Calls in the orchestrator's custody: what is decided about them, in one transaction each.

A kept call waits until it is due, is queued for a worker, and ends; a failed attempt may have it
wait again. Whoever writes proves that he leads: an epoch that is not the latest is refused
(PROTOCOL.md, rule 11).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import time
from typing import Any, Final, NamedTuple, cast

import msgpack
from sqlalchemy import Connection, Engine, Row, and_, bindparam, delete, func, select, update
from sqlalchemy.dialects import postgresql, sqlite

from flame_broker import errors
from flame_broker.errors import CallCancelled, CallExpired, FlameError, Quarantined
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
)
from flame_broker.outcomes import describe, encode_failure
from flame_orchestrator.history import outcome_of
from flame_orchestrator.ledger import Arrival, Ledger
from flame_orchestrator.schema import followers, kept, leaders
from flame_orchestrator.states import CallState, ending_of

__all__ = ["Custody", "Due", "Fenced", "Letter", "News"]

_LONGEST_PAUSE_S: Final = 24 * 3600.0
_OUR_NAME: Final = "orchestrator"
_NEVER_AGAIN: Final = (CallCancelled, CallExpired, Quarantined)


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


class Due(NamedTuple):
    """A call whose time has come.

    Attributes:
        id: Of its row.
        attempt: Which attempt this is.
        frame: As it was deposited: for its worker's queue, with the reply address of its client.
        queue_timeout_s: How long it may wait there; 0 for ever.
    """

    id: int
    attempt: int
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
            session = _Session(connection, self._ledger, self._key, self._dialect)
            for letter in letters:
                session.take(letter)
            return session.close()

    def due(self, now: float, limit: int) -> list[Due]:
        """The calls that wait and whose time has come, the longest overdue first."""
        wanted = (
            select(kept.c.id, kept.c.attempt, kept.c.body, kept.c.queue_timeout_s)
            .where(self._waits(), kept.c.due_at <= now)
            .order_by(kept.c.due_at)
            .limit(limit)
        )
        with self._engine.connect() as connection:
            return [
                Due(row.id, row.attempt, _call_frame(row.body), row.queue_timeout_s)
                for row in connection.execute(wanted)
            ]

    def next_due(self) -> float | None:
        """When the next call is due, in seconds since 1970; None if none waits."""
        with self._engine.connect() as connection:
            found = connection.scalar(select(func.min(kept.c.due_at)).where(self._waits()))
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
            old = and_(kept.c.key_id == self._key.hex_id, kept.c.ended_at < before)
            return connection.execute(delete(kept).where(old)).rowcount

    def _waits(self) -> Any:
        return and_(kept.c.key_id == self._key.hex_id, kept.c.state == CallState.WAITING.value)

    def _fence(self, connection: Connection, epoch: int) -> None:
        # An update first: it takes the lock that a later one would have to wait for.
        ours = and_(leaders.c.key_id == self._key.hex_id, leaders.c.epoch == epoch)
        if not connection.execute(update(leaders).where(ours).values(epoch=epoch)).rowcount:
            raise Fenced(f"epoch {epoch} is over")


class _Session:
    """One transaction: letters in, rows and results out."""

    def __init__(self, connection: Connection, ledger: Ledger, key: Key, dialect: Any) -> None:
        self._connection = connection
        self._ledger = ledger
        self._key = key
        self._dialect = dialect
        self._stories: list[Arrival] = []
        self._news = News()
        self._followed: list[tuple[str, int, str, str, int]] = []

    def take(self, letter: Letter) -> None:
        """Decide what one letter means."""
        frame = letter.frame
        if isinstance(frame, Deposit):
            self._deposit(frame)
        elif isinstance(frame, ResultFrame):
            self._settle(frame, letter.mark)
        elif frame.verb == "cancel":
            self._cancel(frame.arguments, letter.mark)

    def close(self) -> News:
        """Write the stories; what the followers of ended calls get is known then."""
        self._news.ended = self._ledger.write(self._connection, self._stories)
        late: list[Arrival] = []
        for client, counter, reply, original, number in self._followed:
            outcome = outcome_of(self._connection, original, number)
            if outcome is not None:
                every = [r._replace(counter=counter) for r in (*outcome.items, outcome.final)]
                late.append(self._tell(ResultFrame(reply, client, _OUR_NAME, tuple(every))))
        if late:
            more = self._ledger.write(self._connection, late)
            self._news.ended = {**self._news.ended, **more}
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
            self._followed.append((
                frame.client, counter, frame.reply, first.client, first.counter
            ))  # fmt: skip
            return
        row = {"client": frame.client, "counter": counter, "reply": frame.reply, "of": first.id}
        self._connection.execute(
            self._dialect.insert(followers).values(row).on_conflict_do_nothing()
        )

    # ── results ──────────────────────────────────────────────────────────────

    def _settle(self, frame: ResultFrame, mark: bytes) -> None:
        rows = self._rows(frame.client, {result.counter for result in frame.results})
        by_reply: dict[str, list[Result]] = {}
        for result in frame.results:
            row = rows.get(result.counter)
            if row is None:
                continue
            if result.status is not Status.ITEM:
                final = self._final(row, result, frame.attempt, mark)
                if final is None:
                    continue
                result = final  # noqa: PLW2901
            elif row.ended_at is not None:
                continue
            by_reply.setdefault(row.reply, []).append(result)
        for reply, results in by_reply.items():
            told = replace(frame, queue=reply, results=tuple(results))
            self._stories.append(self._tell(told))

    def _final(self, row: Row[Any], result: Result, attempt: int, mark: bytes) -> Result | None:
        """What the client is told of the end of an attempt; None for nothing yet, or any more."""
        if row.ended_at is not None:
            # The very letter that ended it comes again: perhaps its client was never told.
            return _as_final(result) if row.ended_by == mark else None
        reason = _why_again(row, result)
        if reason is None:
            final = _as_final(result)
            self._end(row, final, mark)
            return final
        if attempt != row.attempt:
            return None  # late: the next attempt is under way
        if row.attempt < _policy(row).attempts:
            self._wait_again(row, reason)
            return None
        final = _as_final(result)
        self._end(row, final, mark)
        return final

    def _wait_again(self, row: Row[Any], reason: str) -> None:
        changes = {
            "state": CallState.WAITING.value,
            "attempt": row.attempt + 1,
            "due_at": time() + _pause_s(_policy(row), row.attempt),
            "reason": reason,
        }
        self._connection.execute(update(kept).where(kept.c.id == row.id).values(changes))

    def _end(self, row: Row[Any], final: Result, mark: bytes) -> None:
        ending = ending_of(final)
        assert ending is not None
        self._connection.execute(
            update(kept)
            .where(kept.c.id == row.id)
            .values(state=ending.state.value, ended_at=time(), ended_by=mark)
        )
        gone = delete(followers).where(followers.c.of == row.id).returning(followers)
        for follower in self._connection.execute(gone):
            self._followed.append((
                follower.client, follower.counter, follower.reply, row.client, row.counter
            ))  # fmt: skip

    # ── cancels ──────────────────────────────────────────────────────────────

    def _cancel(self, arguments: Mapping[str, Any], mark: bytes) -> None:
        client, numbers = str(arguments.get("client")), arguments.get("counters")
        counters = {n for n in numbers if isinstance(n, int)} if isinstance(numbers, tuple) else ()
        spare = bool(arguments.get("spare_running"))
        for row in self._rows(client, set(counters)).values():
            again = row.ended_by == mark
            queued = row.state == CallState.QUEUED.value
            if not again and (row.ended_at is not None or (spare and queued)):
                continue
            payload = encode_failure(CallCancelled, "cancelled in the orchestrator's custody")
            final = Result(row.counter, Status.FAILED, payload)
            if not again:
                self._end(row, final, mark)
            told = ResultFrame(row.reply, client, _OUR_NAME, (final,), row.attempt)
            self._stories.append(self._tell(told))

    # ── both ─────────────────────────────────────────────────────────────────

    def _tell(self, frame: ResultFrame) -> Arrival:
        self._news.results.append(frame)
        return Arrival(frame, encode(frame, self._key))

    def _rows(self, client: str, counters: set[int]) -> dict[int, Row[Any]]:
        wanted = select(kept).where(kept.c.client == client, kept.c.counter.in_(counters))
        return {row.counter: row for row in self._connection.execute(wanted)}


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


def _policy(row: Row[Any]) -> RetryPolicy:
    if row.retry is None:
        return RetryPolicy(1, 0.0, 1.0, jitter=False)
    return RetryPolicy(*msgpack.unpackb(row.retry))


def _pause_s(policy: RetryPolicy, attempt: int) -> float:
    try:
        longest = min(policy.backoff_s * policy.factor ** (attempt - 1), _LONGEST_PAUSE_S)
    except OverflowError:
        longest = _LONGEST_PAUSE_S
    return random.uniform(0, longest) if policy.jitter else longest


def _why_again(row: Row[Any], result: Result) -> str | None:
    """Why the policy would try again after this; None if it would not.

    What the user's code raised was judged in the child, which has the classes.
    """
    if result.status is Status.AGAIN:
        return ": ".join(filter(None, describe(result)))
    if result.status is not Status.FAILED or row.retry is None:
        return None
    name, message = describe(result)
    kind = getattr(errors, name, None) if name in errors.__all__ else None
    if kind is None or not issubclass(kind, FlameError) or issubclass(kind, _NEVER_AGAIN):
        return None
    names = {f"{one.__module__}.{one.__qualname__}" for one in kind.__mro__}
    retried = not names.isdisjoint(_call_frame(row.body).spec.retry_on)
    return f"{name}: {message}" if retried else None


def _as_final(result: Result) -> Result:
    return result._replace(status=Status.ERROR) if result.status is Status.AGAIN else result
