"""The custodian of one cluster key: takes what needs time, and has it run when it is due.

Every orchestrator consumes the custody queue, and the broker lets one of them have its messages
(single active consumer). That one leads: it takes the next epoch in the database, which fences
whoever led before. Each sends a tick every two seconds, so that a new leader hears of it at once.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from functools import partial
from time import time
from typing import Final, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from flame_broker.backoff import Backoff
from flame_broker.errors import FlameError
from flame_broker.frames import encode, identity, open_frame
from flame_broker.keys import Key, Keyring
from flame_broker.logs import get_logger
from flame_broker.messages import CallFrame, ControlFrame, Plain, ResultFrame
from flame_broker.topology import (
    REASON_HEADER,
    SET_ASIDE_HEADER,
    calls_exchange,
    control_exchange,
    control_queue,
    custody_queue,
    dead_beside,
    work_queue,
)
from flame_broker.transport import Delivery, Transport, Unroutable
from flame_orchestrator.custody import Custody, Fenced
from flame_orchestrator.database import in_words
from flame_orchestrator.leases import LEASE_S, Leases
from flame_orchestrator.letters import Letter, Writing
from flame_orchestrator.orders import LOOK
from flame_orchestrator.roll import Roll
from flame_orchestrator.scheduler import Scheduler
from flame_orchestrator.schedules import Schedules
from flame_orchestrator.session import Answer, News
from flame_orchestrator.timekeeper import InThread, Timekeeper

__all__ = ["Custodian"]

_log = get_logger("flame.orchestrator")

T = TypeVar("T")

_AHEAD: Final = 500
_MOST: Final = 500
_REMEDY: Final = "see to the database or the broker; it is tried again, and nothing is lost"
_TICK_EVERY_S: Final = 2.0
_WORDS: Final = ("tick", LOOK)  # among orchestrators; no letters
_SILENT_S: Final = 10.0


class Custodian:
    """Keeps the calls of one cluster key while it leads. ``start``, then ``stop``; in one loop.

    A letter is acked when what it means is in the database, and its client is told.

    Args:
        transport: Where letters come from and calls go to.
        keyring: Whose signatures count.
        key: The cluster key.
        custody: What is decided.
        in_thread: Where that blocks.
        tell: Hears which calls have ended, by client.
        schedules: Make calls, too.
        lease_s: How long a worker may be silent that runs calls in our custody.
    """

    def __init__(
        self,
        transport: Transport,
        keyring: Keyring,
        key: Key,
        custody: Custody,
        in_thread: InThread,
        tell: Callable[[Mapping[str, set[int]]], None],
        *,
        schedules: Schedules,
        lease_s: float = LEASE_S,
    ) -> None:
        self._transport = transport
        self._keyring = keyring
        self._key = key
        self._custody = custody
        self._in_thread = in_thread
        self._tell = tell
        self._queue = custody_queue(key.hex_id)
        self._holder = f"{socket.gethostname()}:{os.getpid()}"
        self._epoch: int | None = None
        self._heard_at = self._stepped_down_at = 0.0
        self._inbox: deque[Delivery] = deque()
        self._arrived = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._time = Timekeeper(
            transport, key, custody, in_thread, lambda: self._epoch, self._step_down
        )
        self._scheduler = Scheduler(
            schedules, in_thread, lambda: self._epoch, self._step_down, self._time.look
        )
        self._leases = Leases(
            transport,
            keyring,
            key,
            custody,
            in_thread=in_thread,
            epoch=lambda: self._epoch,
            holder=f"{self._holder}.{secrets.token_hex(3)}",
            lease_s=lease_s,
        )
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def roll(self) -> Roll:
        """The workers of this key that were heard."""
        return self._leases.roll

    async def start(self) -> None:
        """Begin to listen.

        Raises:
            BrokerUnavailable: No broker answered in time.
        """
        await self._transport.declare(self._queue)
        await self._leases.listen()
        self._spawn(self._take_letters())
        self._spawn(self._tick())
        self._spawn(self._leases.watch())
        self._spawn(self._time.load())
        self._spawn(self._time.start())
        self._spawn(self._time.give_up_late())
        self._spawn(self._scheduler.run())
        await self._transport.consume(self._queue.name, self._on_letter, prefetch=_AHEAD)

    def note(self, ended: Mapping[str, set[int]]) -> None:
        """Calls have ended that were never in our custody."""
        self._time.note(ended)

    async def settle(self) -> None:
        """Wait until what has arrived is decided."""
        await self._idle.wait()

    async def stop(self) -> None:
        """Leave; what is not acked comes again, here or to the next leader."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (fault := task.exception()) is not None:
            asyncio.get_running_loop().call_exception_handler(
                {"message": "the custodian has stopped", "exception": fault}
            )

    # ── who leads ────────────────────────────────────────────────────────────

    async def _tick(self) -> None:
        """Let whoever leads know it; notice that nobody lets us any more."""
        name = self._queue.name
        while True:
            body = encode(ControlFrame(name, "tick", {"holder": self._holder}), self._key)
            try:
                await self._transport.publish(name, body, deadline_s=_TICK_EVERY_S)
            except Unroutable:
                await self._declare_again()
            except FlameError as problem:
                _log.debug("custody.no_tick", reason=str(problem))
            await asyncio.sleep(_TICK_EVERY_S)
            silent_s = asyncio.get_running_loop().time() - self._heard_at
            if self._epoch is not None and silent_s > _SILENT_S:
                self._step_down(f"nothing was heard for {silent_s:.0f} s")

    async def _declare_again(self) -> None:
        try:
            await self._transport.declare(self._queue)
        except FlameError as problem:
            _log.warning("custody.not_declared", reason=str(problem))

    async def _lead(self) -> int:
        """Our epoch; we are the one whom the broker gives letters."""
        if self._epoch is None:
            self._epoch = await self._in_thread(partial(self._custody.lead, self._holder))
            _log.info("custody.leads", key=self._key.hex_id, epoch=self._epoch)
            self._look()
        return self._epoch

    def _look(self) -> None:
        """Something was written down that is not known here yet."""
        self._time.look()
        self._scheduler.look()

    def _step_down(self, reason: str) -> None:
        """Act no more until a letter arrives: then the broker has chosen us again."""
        _log.warning("custody.steps_down", key=self._key.hex_id, reason=reason)
        self._epoch = None
        self._time.forget_all()
        self._leases.forget_all()
        self._stepped_down_at = asyncio.get_running_loop().time()

    @property
    def _chosen(self) -> bool:
        """Whether the broker gives us letters: the rest of an old connection proves nothing."""
        return self._epoch is not None or self._heard_at > self._stepped_down_at

    # ── letters ──────────────────────────────────────────────────────────────

    def _on_letter(self, delivery: Delivery) -> None:
        self._heard_at = asyncio.get_running_loop().time()
        self._inbox.append(delivery)
        self._arrived.set()
        self._idle.clear()

    async def _take_letters(self) -> None:
        backoff = Backoff()
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self._inbox and self._chosen:
                taken = [self._inbox.popleft() for _ in range(min(_MOST, len(self._inbox)))]
                try:
                    await self._take(taken)
                except Fenced as news:
                    self._inbox.extendleft(reversed(taken))
                    self._step_down(str(news))
                except (SQLAlchemyError, FlameError) as problem:
                    _log.warning("custody.not_taken", reason=in_words(problem), remedy=_REMEDY)
                    self._inbox.extendleft(reversed(taken))
                    self._leases.can_answer = False
                    await asyncio.sleep(backoff.next_s())
                else:
                    self._leases.can_answer = True
                    backoff.reset()
            if not self._inbox:
                self._idle.set()

    async def _take(self, taken: list[Delivery]) -> None:
        epoch = await self._lead()
        letters = [letter for d in taken if (letter := self._read(d)) is not None]
        if letters:
            news = await self._in_thread(partial(self._custody.record, epoch, letters))
            _log.debug("custody.took", letters=len(letters), results=len(news.results))
            self._tell(news.ended)
            self._time.expect(news.awaited)
            self._time.look(news.ended)
            await self._pass_on(news, epoch)
            await asyncio.gather(*(self._say_again(letter, epoch) for letter in letters))
        for delivery in taken:
            delivery.ack()

    def _read(self, delivery: Delivery) -> Letter | None:
        """What the letter says; None for a tick, and for what is no letter."""
        try:
            frame, _ = open_frame(delivery.body, self._keyring, queue=delivery.queue)
        except FlameError as problem:
            _log.warning("custody.refused", reason=str(problem))
            return None
        if isinstance(frame, ControlFrame) and frame.verb in _WORDS:
            if frame.verb == LOOK:
                self._look()
            return None
        if isinstance(frame, Writing):
            letter = Letter(frame, identity(delivery.body))
            if letter.can_be_kept:
                return letter
        _log.warning("custody.refused", reason="no letter, or with what no database can hold")
        return None

    async def _say_again(self, letter: Letter, epoch: int) -> None:
        """Tell the workers of a cancel, now that it is written down.

        One that was connected only after its client said it has asked us before, or hears it now.
        """
        frame = letter.frame
        if not isinstance(frame, ControlFrame):
            return
        if frame.verb == "cancel":
            exchange = control_exchange(self._key.hex_id)
            body = encode(ControlFrame(exchange, frame.verb, frame.arguments), self._key)
            await self._transport.publish("", body, exchange=exchange, mandatory=False)
        elif frame.verb == "overdue" and frame.arguments.get("epoch") == epoch:
            await self._take_away(str(frame.arguments.get("run")), sorted(letter.counters), epoch)

    async def _take_away(self, run: str, counters: Sequence[int], epoch: int) -> None:
        """Have one worker stop its run. A cancel would reach the next attempt too, elsewhere."""
        ear = control_queue(self._key.hex_id, run.rpartition("/")[0]).name
        await self._tell_run(ear, run, (), tuple(counters), epoch)

    async def _pass_on(self, news: News, epoch: int) -> None:
        """Say what was decided to whom it concerns."""
        await asyncio.gather(
            *(self._answer(answer, epoch) for answer in news.answers),
            *(self._set_aside(frame, reason) for frame, reason in news.dead),
            *map(self._send, news.results),
        )

    async def _answer(self, answer: Answer, epoch: int) -> None:
        self._leases.granted(answer)
        claim = answer.claim
        await self._tell_run(claim.reply, claim.run, answer.granted, answer.refused, epoch)

    async def _tell_run(
        self, ear: str, run: str, granted: tuple[int, ...], refused: tuple[int, ...], epoch: int
    ) -> None:
        told: dict[str, Plain] = {
            "run": run, "granted": granted, "refused": refused, "epoch": epoch
        }  # fmt: skip
        body = encode(ControlFrame(ear, "leased", told), self._key)
        # To a worker that is gone: what it runs is given up when its lease has ended.
        await self._transport.publish(ear, body, mandatory=False, persistent=False)

    async def _set_aside(self, frame: CallFrame, reason: str) -> None:
        """To the dead ones of its pool, as a worker does it."""
        queue = work_queue(dead_beside(frame.queue))
        headers: dict[str, str | int] = {
            REASON_HEADER: f"Quarantined: {reason}"[:1000],
            SET_ASIDE_HEADER: int(time()),
        }
        body = encode(replace(frame, queue=queue.name), self._key)
        await self._transport.declare(queue)
        await self._transport.publish(queue.name, body, headers=headers)

    async def _send(self, frame: ResultFrame) -> None:
        body = encode(frame, self._key)
        try:
            await self._transport.publish(frame.queue, body)
        except Unroutable:
            # A queue that took the place of a lost one is bound by its name. If there is none, the
            # client is gone, or asks for the result when it is back: the ledger has it.
            exchange = calls_exchange(self._key.hex_id)
            await self._transport.publish(frame.queue, body, exchange=exchange, mandatory=False)
