"""The orchestrator: takes what the ledger queue brings, and answers questions."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Final, TypeVar

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from flame_broker.backoff import Backoff
from flame_broker.clock import Clock
from flame_broker.connect import open_transport
from flame_broker.errors import FlameError
from flame_broker.frames import encode, open_frame
from flame_broker.keys import Key, Keyring
from flame_broker.logs import get_logger
from flame_broker.messages import CallFrame, ControlFrame, Plain, ResultFrame
from flame_broker.store import open_store
from flame_broker.topology import (
    bound_ledger_queue,
    calls_exchange,
    ledger_queue,
    questions_queue,
)
from flame_broker.transport import Delivery, Transport
from flame_orchestrator.answers import Answers
from flame_orchestrator.custodian import Custodian
from flame_orchestrator.custody import Custody
from flame_orchestrator.database import in_words, open_database
from flame_orchestrator.history import History
from flame_orchestrator.leases import LEASE_S
from flame_orchestrator.ledger import Arrival, Ledger
from flame_orchestrator.leftovers import end_calls
from flame_orchestrator.log_keeper import LogKeeper
from flame_orchestrator.orders import Orders
from flame_orchestrator.roll import Roll
from flame_orchestrator.schedules import Schedules
from flame_orchestrator.schema import HIGHEST
from flame_orchestrator.threads import in_thread

__all__ = ["Orchestrator", "OrchestratorSettings"]

_log = get_logger("flame.orchestrator")

T = TypeVar("T")

_LULL_S: Final = 0.1
_MOST_FRAMES: Final = 500
_LAST_WRITE_S: Final = 5.0
_FORGET_EVERY_S: Final = 600.0
_AHEAD: Final = 2000
_QUESTIONS_AHEAD: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class OrchestratorSettings:
    """What an orchestrator is told.

    Args:
        broker_url: The broker.
        keyring: Keys whose calls it follows.
        database_url: Where it keeps them.
        keep: How long ended calls are kept.
        keep_calls: How many calls are kept, roughly.
        lease_s: How long a worker may be silent before what it runs is given to others.
        keep_log_bytes: How much is kept of what one call prints.
        store_url: The object store, for large logs; None to keep them in the database.
        gather_s: How long to let frames pile up at most, while they come: to read a burst of calls
            before it is over would take the time from its workers.
        look_every_s: How soon to see an outcome that somebody else has written.
    """

    broker_url: str
    keyring: Keyring
    database_url: str
    keep: timedelta = timedelta(days=30)
    keep_calls: int = 10_000_000
    lease_s: float = LEASE_S
    keep_log_bytes: int = 10 * 2**20
    store_url: str | None = None
    gather_s: float = 0.1
    look_every_s: float = 60.0


class Orchestrator:
    """Keeps the story of every tracked call. ``start``, then ``stop``; lives in one loop.

    A frame is acked when it is in the database. While the database refuses, frames wait in the
    broker.
    """

    def __init__(self, settings: OrchestratorSettings) -> None:
        self.settings = settings
        self._transport: Transport = open_transport(settings.broker_url, name="flame-orchestrator")
        # One thread: SQLite has one writer, and what is asked sees what was written before.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="flame-ledger")
        self._inbox: list[Delivery] = []
        self._writing: asyncio.Task[None] | None = None
        self._engine: Engine | None = None
        self._leaving = False
        self._clock = Clock()
        self._rolls: dict[str, Roll] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._custodies: list[Custody] = []
        self._custodians: list[Custodian] = []
        self._log_keeper: LogKeeper | None = None
        self._echo = b""
        self._echoed = asyncio.Event()
        self._hurry = asyncio.Event()

    async def start(self) -> None:
        """Open the database, connect, begin to listen.

        Raises:
            ConfigError: The database cannot be opened.
            BrokerUnavailable: No broker answered in time.
        """
        engine = await self._in_thread(partial(open_database, self.settings.database_url))
        self._engine = engine
        self._ledger, history = Ledger(engine), History(engine)
        self._answers = Answers(
            self._transport, history, self._thread, look_every_s=self.settings.look_every_s
        )
        self._orders = Orders(self._transport, engine, self._in_thread)
        for question, answer in self._orders.questions.items():
            self._answers.add(question, answer)
        self._answers.add("workers", self._call_roll)
        self._log_keeper = self._keep_logs(engine)
        await self._transport.open()
        for key in self.settings.keyring:
            custody = Custody(engine, self._ledger, key)
            self._custodies.append(custody)
            schedules = self._orders.serve(key, custody)
            await self._listen(key)
            await self._keep_calls(key, custody, schedules)
        await self._log_keeper.start()
        self._later(self._forget())
        _log.info("orchestrator.ready", database=engine.url.render_as_string())

    async def stop(self) -> None:
        """Leave; what is not written is not acked, and comes again."""
        self._leaving = True
        for custodian in self._custodians:
            await custodian.stop()
        if self._writing is not None:
            await asyncio.wait([self._writing], timeout=_LAST_WRITE_S)
        for task in [*self._tasks, *filter(None, [self._writing])]:
            task.cancel()
        if self._log_keeper is not None:
            await self._log_keeper.stop()
        await self._transport.close()
        self._thread.shutdown()
        if self._engine is not None:
            self._engine.dispose()
        _log.info("orchestrator.stopped")

    async def finish(self, reason: str) -> None:
        """Leave with the whole cluster: what has arrived is written down, what has not ended ends.

        Args:
            reason: Why calls are cancelled that nobody runs any more, one sentence.
        """
        await self._settle()
        for custodian in self._custodians:
            await custodian.stop()
        if self._engine is not None:
            try:
                await self._in_thread(partial(self._end_calls, self._engine, reason))
            except FlameError as problem:
                _log.warning("ledger.calls_not_ended", reason=str(problem))
        await self.stop()

    async def _settle(self) -> None:
        """Wait until all is written that has arrived by now, for some seconds at most."""
        key = self.settings.keyring.signer
        queue = ledger_queue(key.hex_id).name
        self._echo = encode(ControlFrame(queue, "echo", {"token": secrets.token_hex(8)}), key)
        try:
            async with asyncio.timeout(_LAST_WRITE_S):
                await self._transport.publish(queue, self._echo)
                await self._echoed.wait()  # it comes behind all else
                while self._writing is not None:
                    await asyncio.wait([self._writing])
                for custodian in self._custodians:
                    await custodian.settle()
                if self._log_keeper is not None:
                    await self._log_keeper.settle()
        except (FlameError, TimeoutError) as problem:
            _log.warning("ledger.not_complete", reason=str(problem) or "it took too long")

    def _end_calls(self, engine: Engine, reason: str) -> None:
        for key in self.settings.keyring:
            end_calls(engine, key.hex_id, reason, key)

    async def _listen(self, key: Key) -> None:
        exchange, ledger = calls_exchange(key.hex_id), bound_ledger_queue(key.hex_id)
        await self._transport.declare_exchange(exchange, "topic")
        questions = questions_queue(key.hex_id)
        await self._transport.declare(ledger, questions)
        await self._transport.consume(ledger.name, self._on_ledger, prefetch=_AHEAD)
        await self._transport.consume(questions.name, self._on_question, prefetch=_QUESTIONS_AHEAD)

    async def _keep_calls(self, key: Key, custody: Custody, schedules: Schedules) -> None:
        custodian = Custodian(
            self._transport,
            self.settings.keyring,
            key,
            custody,
            self._in_thread,
            self._answers.tell,
            schedules=schedules,
            lease_s=self.settings.lease_s,
        )
        self._custodians.append(custodian)
        self._rolls[key.hex_id] = custodian.roll
        await custodian.start()

    def _keep_logs(self, engine: Engine) -> LogKeeper:
        settings = self.settings
        store = open_store(settings.store_url) if settings.store_url else None
        limit = settings.keep_log_bytes
        keeper = LogKeeper(self._transport, settings.keyring, engine, store, limit_bytes=limit)
        self._answers.add("logs", keeper.following.answer)
        return keeper

    # ── the ledger ───────────────────────────────────────────────────────────

    def _on_ledger(self, delivery: Delivery) -> None:
        if self._leaving:
            return  # not acked: it comes again
        if delivery.body == self._echo:
            self._echoed.set()
            self._hurry.set()
        self._inbox.append(delivery)
        if self._writing is None:
            self._writing = asyncio.ensure_future(self._write())
            self._writing.add_done_callback(self._written)

    async def _write(self) -> None:
        backoff, failing = Backoff(), False
        while self._inbox:
            await self._gather()
            taken = self._inbox[:_MOST_FRAMES]
            try:
                ended = await self._in_thread(partial(self._record, taken))
            except SQLAlchemyError as problem:
                failing = True
                _log.warning(
                    "ledger.write_failed",
                    reason=in_words(problem),
                    frames=len(self._inbox),
                    remedy="see to the database; it is tried again, and the broker keeps the rest",
                )
                await asyncio.sleep(backoff.next_s())
                continue
            if failing:
                backoff.reset()
                failing = False
                _log.info("ledger.writes_again", frames=len(self._inbox))
            del self._inbox[: len(taken)]
            for delivery in taken:
                delivery.ack()
            self._answers.tell(ended)
            for custodian in self._custodians:
                custodian.note(ended)
        if not self._echoed.is_set():
            self._hurry.clear()

    async def _gather(self) -> None:
        """Let frames pile up until a moment passes without any, or somebody wants to know."""
        loop = asyncio.get_running_loop()
        until, known = loop.time() + self.settings.gather_s, 0
        while known < len(self._inbox) < _MOST_FRAMES and loop.time() < until:
            known = len(self._inbox)
            with suppress(TimeoutError):
                async with asyncio.timeout(_LULL_S):
                    await self._hurry.wait()
                    return

    def _record(self, taken: list[Delivery]) -> Mapping[str, set[int]]:
        arrivals = [Arrival(frame, d.body) for d in taken if (frame := self._read(d)) is not None]
        return self._ledger.record(arrivals)

    def _read(self, delivery: Delivery) -> CallFrame | ResultFrame | ControlFrame | None:
        """What the ledger keeps of a message; None if that is nothing."""
        try:
            # A copy: it is signed for the queue that the original went to.
            frame, _ = open_frame(delivery.body, self.settings.keyring)
        except FlameError as problem:
            _log.warning("ledger.refused", reason=str(problem))
            return None
        if isinstance(frame, (CallFrame, ResultFrame)):
            return frame if _is_countable(frame) else None
        return frame if isinstance(frame, ControlFrame) and frame.verb == "disown" else None

    def _written(self, writing: asyncio.Task[None]) -> None:
        self._writing = None
        if not writing.cancelled() and (fault := writing.exception()) is not None:
            # A fault of ours. What it concerns is not acked, and comes again after a restart.
            asyncio.get_running_loop().call_exception_handler(
                {"message": "the ledger cannot be written", "exception": fault}
            )

    async def _forget(self) -> None:
        """Forget what is too old or too much, from time to time."""
        while True:
            oldest = self._clock.earliest() - self.settings.keep.total_seconds()
            try:
                forgotten = await self._in_thread(partial(self._delete, oldest))
            except SQLAlchemyError as problem:
                _log.warning("ledger.not_forgotten", reason=in_words(problem))
            else:
                if forgotten:
                    _log.info("ledger.forgot", rows=forgotten)
            if self._log_keeper is not None:
                await self._log_keeper.forget(before=oldest, keep_calls=self.settings.keep_calls)
            await asyncio.sleep(_FORGET_EVERY_S)

    def _delete(self, oldest: float) -> int:
        keep = self.settings.keep_calls
        kept = sum(custody.forget(before=oldest) for custody in self._custodies)
        return kept + self._ledger.forget(before=oldest, keep_calls=keep)

    # ── questions ────────────────────────────────────────────────────────────

    def _on_question(self, delivery: Delivery) -> None:
        delivery.ack()
        if self._leaving:
            return  # who asked asks again
        try:
            frame, key = open_frame(delivery.body, self.settings.keyring, queue=delivery.queue)
        except FlameError as problem:
            _log.warning("question.refused", reason=str(problem))
            return
        if isinstance(frame, ControlFrame):
            if self._writing is not None:
                self._hurry.set()
            self._later(self._answers.answer(frame, key))

    async def _call_roll(self, asked: Mapping[str, Any], key: Key) -> dict[str, Plain]:
        return self._rolls[key.hex_id].answer(asked)

    def _later(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await in_thread(self._thread, work)


def _is_countable(frame: CallFrame | ResultFrame) -> bool:
    """Whether a database can hold the numbers of its calls; no client of ours counts that far."""
    items = frame.calls if isinstance(frame, CallFrame) else frame.results
    return bool(items) and all(0 <= item.counter <= HIGHEST for item in items)
