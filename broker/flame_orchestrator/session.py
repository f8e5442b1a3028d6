"""One transaction of the custodian: letters in, rows and results out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import zip_longest
from time import time
from typing import Any, Final, NamedTuple, cast

import msgpack
from sqlalchemy import Connection, and_, bindparam, delete, select, update

from flame_broker.errors import CallCancelled, CallError, CallExpired
from flame_broker.frames import encode
from flame_broker.keys import Key
from flame_broker.messages import (
    Call,
    CallFrame,
    Claim,
    ControlFrame,
    Deposit,
    Limitation,
    Result,
    ResultFrame,
    RetryPolicy,
    Status,
    parse_call_id,
)
from flame_broker.outcomes import encode_failure
from flame_orchestrator.attempts import Kept, decide
from flame_orchestrator.claims import grant, lose, overrun, release
from flame_orchestrator.history import outcome_of
from flame_orchestrator.ledger import Arrival, Ledger
from flame_orchestrator.letters import Letter
from flame_orchestrator.schema import NEVER, dependencies, followers, kept, tombstones
from flame_orchestrator.states import CallState

__all__ = ["Answer", "News", "Session"]

_TOMBSTONE_S: Final = 7 * 24 * 3600.0  # as long as the ledger queue keeps what it has
_MOST_AT_ONCE: Final = 10_000  # SQLite takes 32,766 values (sqlite.org/limits.html)
_OUR_NAME: Final = "orchestrator"
_LATE: Final = "no worker has started it within its queue timeout"
_CHANGEABLE: Final = (
    "state", "attempt", "due_at", "reason", "ended_at", "ended_by", "run", "worker", "started_at",
    "not_before", "unmet", "place",
)  # fmt: skip


class Answer(NamedTuple):
    """What a claim has come to.

    Attributes:
        claim: The question.
        granted: Counters of the calls that this run has the lease for.
        refused: Of those that are over, or another run's.
    """

    claim: Claim
    granted: tuple[int, ...]
    refused: tuple[int, ...]


@dataclass(slots=True)
class News:
    """What a transaction has decided.

    Attributes:
        results: For clients, each frame addressed to its reply queue.
        ended: The counters of the calls that ended, by client.
        answers: For workers that have claimed calls.
        dead: Calls that are quarantined, with the reason.
        awaited: Calls that others wait for from now on, by client.
        limits: The keys of limits under which something has changed.
    """

    results: list[ResultFrame] = field(default_factory=list)
    ended: Mapping[str, set[int]] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    dead: list[tuple[CallFrame, str]] = field(default_factory=list)
    awaited: dict[str, set[int]] = field(default_factory=dict)
    limits: set[str] = field(default_factory=set)


class _Follower(NamedTuple):
    """A call that is about to get the outcome of another one."""

    client: str
    counter: int
    reply: str
    of_client: str
    of_counter: int


class Session:
    """One transaction: letters in, rows and results out.

    A call's row is read once and written once, however many letters are about it: a statement
    for each of them would take most of the time.
    """

    def __init__(
        self, connection: Connection, ledger: Ledger, key: Key, dialect: Any, epoch: int
    ) -> None:
        self._connection = connection
        self._epoch = epoch
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
        wanted: dict[str, set[int]] = defaultdict(set)
        for letter in others:
            wanted[letter.client] |= letter.counters
        self._load(wanted)
        for letter in others:
            if isinstance(letter.frame, ResultFrame):
                self._settle(letter.frame, letter.mark)
            elif isinstance(letter.frame, Claim):
                self._claim(letter.frame)
            elif isinstance(letter.frame, ControlFrame):
                self._obey(letter, letter.frame)
        self._save()
        return self._write_stories()

    # ── rows ─────────────────────────────────────────────────────────────────

    def _load(self, wanted: Mapping[str, set[int]]) -> None:
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
        self._news.limits.update(r.limit_key for r in changed if r.limit_key is not None)
        self._update(_CHANGEABLE, changed)
        self._update(("body",), [row for row in changed if row.moved])
        over = [r.id for r in changed if r.ended_at is not None and r.unmet]
        if over:
            self._connection.execute(delete(dependencies).where(dependencies.c.call.in_(over)))
        ended = {r.id: r for r in changed if r.ended_at is not None and r.once is not None}
        if ended:
            gone = delete(followers).where(followers.c.of.in_(ended)).returning(followers)
            for row in self._connection.execute(gone):
                first = ended[row.of]
                self._followed.append(
                    _Follower(row.client, row.counter, row.reply, first.client, first.counter)
                )

    def _update(self, names: Sequence[str], rows: Sequence[Kept]) -> None:
        if rows:
            statement = update(kept).where(kept.c.id == bindparam("row"))
            self._connection.execute(
                statement.values({name: bindparam(f"new_{name}") for name in names}),
                [{"row": r.id, **{f"new_{n}": getattr(r, n) for n in names}} for r in rows],
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
        self._news.limits.update(limit.key for limit in deposit.limits if limit is not None)
        single = [row for row in rows if row["once"] is None]
        if single:
            self._connection.execute(self._dialect.insert(kept).on_conflict_do_nothing(), single)
        for row in rows:
            if row["once"] is not None:
                insert = self._dialect.insert(kept).values(row).on_conflict_do_nothing()
                if not self._connection.execute(insert).rowcount:
                    self._follow(frame, row["counter"], row["once"])
        for call, after in zip(frame.calls, deposit.after, strict=False):
            if after:
                self._wait_for(frame.client, call.counter, after)

    def _wait_for(self, client: str, counter: int, after: Iterable[str]) -> None:
        """Note what a call waits for, if it is kept and this is not said a second time."""
        ours = and_(kept.c.client == client, kept.c.counter == counter, kept.c.unmet > 0)
        call = self._connection.scalar(select(kept.c.id).where(ours))
        if call is None:
            return
        for other in after:
            on, number = parse_call_id(other)
            self._news.awaited.setdefault(on, set()).add(number)
            row = {"call": call, "client": on, "counter": number}
            insert = self._dialect.insert(dependencies).values(row)
            self._connection.execute(insert.on_conflict_do_nothing())

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
            told = decide(row, result, frame, mark)
            if told is not None:
                by_reply.setdefault(row.reply, []).append(told)
        for reply, results in by_reply.items():
            self._stories.append(self._tell(replace(frame, queue=reply, results=tuple(results))))

    # ── leases ───────────────────────────────────────────────────────────────

    def _claim(self, claim: Claim) -> None:
        granted: list[int] = []
        for call in claim.frame.calls:
            row = self._known.get((claim.frame.client, call.counter))
            if self._take_over(claim, call) if row is None else grant(row, claim, call, self._key):
                granted.append(call.counter)
        refused = {call.counter for call in claim.frame.calls}.difference(granted)
        self._news.answers.append(Answer(claim, tuple(granted), tuple(sorted(refused))))

    def _take_over(self, claim: Claim, call: Call) -> bool:
        """A call of the broker's custody: from now on it is in ours, unless it has ended."""
        frame = claim.frame
        if frame.reply == claim.queue or frame.spec.at_most_once:
            return False  # we had it, and have forgotten it since
        if outcome_of(self._connection, frame.client, call.counter) is not None:
            return False
        if not claim.look:
            row = _row(replace(frame, calls=(call,)), self._key) | {
                "attempt": frame.attempt,
                "state": CallState.RUNNING.value,
                "run": claim.run,
                "worker": claim.worker,
                "started_at": time(),
            }
            self._connection.execute(self._dialect.insert(kept).values(row))
            self._load({frame.client: {call.counter}})
        return True

    def _obey(self, letter: Letter, frame: ControlFrame) -> None:
        rows = [self._known.get((letter.client, counter)) for counter in sorted(letter.counters)]
        found = [row for row in rows if row is not None]
        if frame.verb == "cancel":
            self._bury(letter)
            self._cancel(found, letter.mark, spare=bool(frame.arguments.get("spare_running")))
        for row in found:
            self._change(row, frame, letter.mark)

    def _change(self, row: Kept, frame: ControlFrame, mark: bytes) -> None:
        match frame.verb:
            case "unmet":
                self._forgo(row, mark, str(frame.arguments.get("reason")))
            case "late":
                self._expire(row, mark, frame.arguments.get("attempt"))
            case "release":
                release(row, frame.arguments.get("run"), self._key)
            case "lost" | "overdue" if frame.arguments.get("epoch") == self._epoch:
                self._take_from(row, frame, mark)

    def _take_from(self, row: Kept, frame: ControlFrame, mark: bytes) -> None:
        """A run is silent, or goes on for too long: it has this call no more."""
        run = frame.arguments.get("run")
        late = frame.verb == "overdue"
        final = overrun(row, run, mark) if late else lose(row, run, mark, self._key)
        self._end(row, final)
        if final is not None and row.state == CallState.QUARANTINED.value:
            self._news.dead.append((row.frame, row.reason))

    def _end(self, row: Kept, final: Result | None) -> None:
        if final is not None:
            told = ResultFrame(row.reply, row.client, _OUR_NAME, (final,), row.attempt)
            self._stories.append(self._tell(told))

    # ── cancels ──────────────────────────────────────────────────────────────

    def _cancel(self, rows: Iterable[Kept], mark: bytes, *, spare: bool) -> None:
        started = (CallState.QUEUED.value, CallState.RUNNING.value)
        for row in rows:
            if spare and row.state in started:
                continue
            if row.ended_at is not None and row.ended_by != mark:
                continue
            self._fail(row, mark, CallCancelled, "cancelled in the orchestrator's custody")

    def _forgo(self, row: Kept, mark: bytes, reason: str) -> None:
        """What a call waits for did not come about."""
        if row.unmet and (row.ended_at is None or row.ended_by == mark):
            self._fail(row, mark, CallCancelled, reason)

    def _expire(self, row: Kept, mark: bytes, attempt: object) -> None:
        """No worker has taken a call in its time."""
        waits = row.state == CallState.QUEUED.value and row.attempt == attempt
        if waits or row.ended_by == mark:
            self._fail(row, mark, CallExpired, _LATE)

    def _fail(self, row: Kept, mark: bytes, kind: type[CallError], reason: str) -> None:
        """End a call, unless this letter has done so before, and tell its client."""
        final = Result(row.counter, Status.FAILED, encode_failure(kind, reason))
        if row.ended_at is None:
            row.end(final, mark)
        self._end(row, final)

    def _bury(self, letter: Letter) -> None:
        """Remember them for workers that are not there to hear of it."""
        row = {
            "mark": letter.mark,
            "client": letter.client,
            "counters": msgpack.packb(sorted(letter.counters)),
            "until": time() + _TOMBSTONE_S,
        }
        insert = self._dialect.insert(tombstones).values(row)
        self._connection.execute(insert.on_conflict_do_nothing())

    def _tell(self, frame: ResultFrame) -> Arrival:
        if frame.queue:  # nobody waits for a call that a schedule has made
            self._news.results.append(frame)
        return Arrival(frame, encode(frame, self._key))


def _kept_rows(deposit: Deposit, key: Key) -> list[dict[str, Any]]:
    frame, policy = deposit.frame, deposit.retry
    shared = {
        "state": CallState.WAITING.value,
        "retry": None if policy is None else _pack(policy),
        "queue_timeout_s": deposit.queue_timeout_s,
    }
    rows = [_row(replace(frame, calls=(call,)), key) | shared for call in frame.calls]
    for row, due_at, once in zip(rows, deposit.due, deposit.keys, strict=True):
        row |= {"once": once or None, "due_at": due_at or row["due_at"]}
    terms = zip_longest(rows, deposit.after, deposit.limits)
    return [row | _bars(row, frozenset(after or ()), limit) for row, after, limit in terms]


def _bars(row: dict[str, Any], after: frozenset[str], limit: Limitation | None) -> dict[str, Any]:
    """What keeps a call from its start, besides its time."""
    key, calls = (None, None) if limit is None else limit
    barred = bool(after) or limit is not None
    return {
        "not_before": row["due_at"],
        "due_at": NEVER if barred else row["due_at"],
        "unmet": len(after),
        "limit_key": key,
        "limit_calls": calls,
        "place": 0 if limit is not None and not after else None,
    }


def _row(frame: CallFrame, key: Key) -> dict[str, Any]:
    """What is written of a frame of one call."""
    return {
        "key_id": key.hex_id,
        "client": frame.client,
        "counter": frame.calls[0].counter,
        "once": None,
        "state": CallState.WAITING.value,
        "attempt": 1,
        "due_at": time(),
        "reason": "",
        "retry": None,
        "queue_timeout_s": 0.0,
        "reply": frame.reply,
        "body": encode(frame, key),
        "worker": "",
    }


def _pack(policy: RetryPolicy) -> bytes:
    fields = (policy.attempts, policy.backoff_s, policy.factor, policy.jitter)
    return cast(bytes, msgpack.packb(fields))
