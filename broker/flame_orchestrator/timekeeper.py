"""Starts calls when their time has come.

What is due within the next half second is read ahead, so that no call waits for the database when
its moment is there. It stands as waiting until the broker has confirmed it: after a crash the next
leader starts it again.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from time import time
from typing import Final, Protocol, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from flame_broker.backoff import Backoff
from flame_broker.clock import Clock
from flame_broker.errors import FlameError
from flame_broker.frames import encode
from flame_broker.keys import Key
from flame_broker.logs import get_logger
from flame_broker.messages import (
    FRAME_BYTES,
    FRAME_CALLS,
    Call,
    CallFrame,
    ControlFrame,
    Plain,
)
from flame_broker.objects import REF_BYTES
from flame_broker.topology import custody_queue, tracked, work_queue
from flame_broker.transport import Transport, Unroutable
from flame_orchestrator.custody import Custody, Due, Fenced
from flame_orchestrator.database import in_words

__all__ = ["InThread", "Timekeeper"]

_log = get_logger("flame.orchestrator")

T = TypeVar("T")

_MOST: Final = 2000
_AHEAD_S: Final = 0.5
_LOOK_SOON_S: Final = 0.05
_PACK_S: Final = 0.02
"""What is due so soon after others goes with what is due then: messages cost more than calls."""

_SWEEP_SHARE: Final = 20
"""Another orchestrator may have written of an end that calls wait for: a twentieth of the time."""

_LATE_S: Final = 15.0
"""What runs for five seconds has a lease; this leaves time to claim it and to write it down."""

_LOOK_EVERY_S: Final = 5.0
"""A clock that jumps must not leave a timer asleep: so often the database is asked anyway."""


class InThread(Protocol):
    """Runs blocking work in the one thread that writes."""

    def __call__(self, work: Callable[[], T], /) -> Awaitable[T]:
        """What it returned, or raised."""


class Timekeeper:
    """Queues the calls of one cluster key that are due, while we lead.

    Args:
        transport: Where they go.
        key: The cluster key.
        custody: Knows which are due.
        in_thread: Where that blocks.
        epoch: Ours; None while another one leads.
        fenced: Told that another one does.
    """

    def __init__(
        self,
        transport: Transport,
        key: Key,
        custody: Custody,
        in_thread: InThread,
        epoch: Callable[[], int | None],
        fenced: Callable[[str], None],
    ) -> None:
        self._transport = transport
        self._key = key
        self._reply = custody_queue(key.hex_id).name
        self._custody = custody
        self._in_thread = in_thread
        self._epoch = epoch
        self._fenced = fenced
        self._clock = Clock()
        self._taken: set[tuple[int, int]] = set()
        self._lifted_at: int | None = None
        self._sweep_at = 0.0
        self._ended: dict[str, set[int]] = {}
        self._awaits = True
        self._soon: list[Due] = []
        self._queued: list[Due] = []
        self._news = asyncio.Event()
        self._sooner = asyncio.Event()
        self._publishing: set[asyncio.Task[None]] = set()

    def look(self, ended: Mapping[str, set[int]] | None = None) -> None:
        """Something has changed; calls that have ended are not to be started."""
        if ended:
            self._soon = [due for due in self._soon if not _is_among(due, ended)]
            self.note(ended)
        self._news.set()

    def note(self, ended: Mapping[str, set[int]]) -> None:
        """Calls have ended, in our custody or not: others may wait for them."""
        if self._awaits and self._epoch() is not None:
            for client, counters in ended.items():
                self._ended.setdefault(client, set()).update(counters)
            self._news.set()

    def expect(self, awaited: Mapping[str, set[int]]) -> None:
        """Calls are awaited from now on; they may have ended already."""
        if awaited:
            self._awaits = True
            self.note(awaited)

    def forget_all(self) -> None:
        """Another one leads: what is not queued yet is for him."""
        self._soon.clear()
        self._queued.clear()
        self._taken.clear()
        self._ended.clear()
        self._lifted_at = None

    # ── from the database ────────────────────────────────────────────────────

    async def load(self) -> None:
        """Read ahead what is due, and note what is queued; for ever."""
        backoff = Backoff()
        while True:
            try:
                pause_s = await self._load()
            except Fenced as news:
                self._fenced(str(news))
                pause_s = _LOOK_EVERY_S
            except (SQLAlchemyError, FlameError) as problem:
                _log.warning("custody.not_read", reason=in_words(problem))
                pause_s = backoff.next_s()
            else:
                backoff.reset()
            await asyncio.sleep(_LOOK_SOON_S)
            await _until(self._news, pause_s)

    async def _load(self) -> float:
        """Seconds until something may have to be read again."""
        epoch = self._epoch()
        if epoch is None:
            return _LOOK_EVERY_S
        queued, self._queued = self._queued, []
        if queued:
            await self._in_thread(partial(self._custody.queued, epoch, queued))
            self._taken -= {(due.id, due.attempt) for due in queued}
            _log.debug("custody.queued", calls=len(queued))
        await self._lift_bars(epoch)
        limit = _MOST + len(self._taken)
        found = await self._in_thread(partial(self._custody.due, time() + _AHEAD_S, limit))
        fresh = [due for due in found if (due.id, due.attempt) not in self._taken]
        if fresh:  # reading them proved nothing: we may have been stopped for minutes
            await self._in_thread(partial(self._custody.check, epoch))
        if fresh and self._epoch() == epoch:
            self._taken |= {(due.id, due.attempt) for due in fresh}
            self._soon = sorted([*self._soon, *fresh], key=lambda due: due.due_at)
            self._sooner.set()
        if len(found) == limit:
            return 0.0
        next_at = await self._in_thread(partial(self._custody.next_due, time() + _AHEAD_S))
        pause_s = _LOOK_EVERY_S if next_at is None else next_at - _AHEAD_S - time()
        return min(max(pause_s, 0.0), _LOOK_EVERY_S)

    async def _lift_bars(self, epoch: int) -> None:
        """Let calls go on that were barred by other calls, or by a limit."""
        ended, self._ended = self._ended, {}
        began = asyncio.get_running_loop().time()
        swept = self._lifted_at == epoch and began < self._sweep_at
        among = ended if swept or not self._awaits else None
        work = partial(self._custody.lift_bars, epoch, time() + _AHEAD_S, among)
        try:
            lifted = await self._in_thread(work)
            for client, counter, reason in lifted.hopeless:
                await self._decide("unmet", client, counter, reason=reason)
        except (SQLAlchemyError, FlameError):
            self._lifted_at = None  # once more, and everything
            raise
        self._lifted_at, self._awaits = epoch, lifted.more or bool(self._ended)
        if lifted.places:
            self._news.set()
        if among is None:
            now = asyncio.get_running_loop().time()
            self._sweep_at = now + max(_LOOK_EVERY_S, _SWEEP_SHARE * (now - began))

    async def give_up_late(self) -> None:
        """End calls that no worker has taken in their time; for ever.

        A worker that takes one afterwards sees that it is late. One that runs has a lease by then,
        unless we have just begun to lead.
        """
        loop = asyncio.get_running_loop()
        led, since = None, 0.0
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            epoch = self._epoch()
            if epoch != led:
                led, since = epoch, loop.time()
            elif epoch is not None and loop.time() - since >= _LATE_S:
                await self._report_late()

    async def _report_late(self) -> None:
        before = self._clock.earliest() - _LATE_S
        try:
            late = await self._in_thread(partial(self._custody.late, before, _MOST))
            for client, counter, attempt in late:
                await self._decide("late", client, counter, attempt=attempt)
        except (SQLAlchemyError, FlameError) as problem:
            _log.warning("custody.late_calls_not_ended", reason=in_words(problem))

    async def _decide(self, verb: str, client: str, counter: int, **more: Plain) -> None:
        """A letter to ourselves: what it says is repeated until the client is told."""
        told: dict[str, Plain] = {"client": client, "counters": (counter,), **more}
        body = encode(ControlFrame(self._reply, verb, told), self._key)
        await self._transport.publish(self._reply, body)

    # ── to the broker ────────────────────────────────────────────────────────

    async def start(self) -> None:
        """Queue each call when it is due; for ever."""
        try:
            while True:
                now = time()
                due = [call for call in self._soon if call.due_at <= now]
                if due:
                    self._soon = self._soon[len(due) :]
                    for frame, calls in self._frames(due):
                        self._spawn(frame, calls)
                    await asyncio.sleep(_PACK_S)
                    now = time()
                next_s = self._soon[0].due_at - now if self._soon else _LOOK_EVERY_S
                await _until(self._sooner, min(next_s, _LOOK_EVERY_S))
        finally:
            for task in self._publishing:
                task.cancel()

    def _spawn(self, frame: CallFrame, calls: list[Due]) -> None:
        task = asyncio.ensure_future(self._queue(frame, calls))
        self._publishing.add(task)
        task.add_done_callback(self._publishing.discard)

    async def _queue(self, frame: CallFrame, calls: list[Due]) -> None:
        try:
            await self._publish(frame)
        except FlameError as problem:
            _log.warning("custody.not_started", reason=str(problem))
            self._taken -= {(due.id, due.attempt) for due in calls}
        else:
            self._queued += calls
        self._news.set()

    def _frames(self, calls: list[Due]) -> Iterator[tuple[CallFrame, list[Due]]]:
        """What is published of calls: those alike share frames, as a client has them do.

        Their results come back to us, who tell the client.
        """
        alike: dict[tuple[object, ...], list[Due]] = defaultdict(list)
        for call in calls:
            frame = call.frame
            address = frame.queue, frame.client, frame.spec, call.attempt, call.queue_timeout_s
            alike[address].append(call)
        for group in alike.values():
            first = group[0]
            waits_s = first.queue_timeout_s
            shared = replace(
                first.frame,
                reply=self._reply,
                spec=replace(first.frame.spec, track=False),
                attempt=first.attempt,
                expires_at=time() + waits_s if waits_s else 0.0,
            )
            for packed in _packed(group):
                yield replace(shared, calls=tuple(due.frame.calls[0] for due in packed)), packed

    async def _publish(self, frame: CallFrame) -> None:
        body = encode(frame, self._key)
        try:
            await self._transport.publish(frame.queue, body)
        except Unroutable:
            await self._transport.declare(tracked(work_queue(frame.queue), self._key.hex_id))
            await self._transport.publish(frame.queue, body)


def _packed(calls: list[Due]) -> Iterator[list[Due]]:
    """Calls in portions that a frame may hold."""
    taken: list[Due] = []
    nbytes = 0
    for call in calls:
        size = _size(call.frame.calls[0])
        if taken and (len(taken) == FRAME_CALLS or nbytes + size > FRAME_BYTES):
            yield taken
            taken, nbytes = [], 0
        taken.append(call)
        nbytes += size
    yield taken


def _size(call: Call) -> int:
    return len(call.payload) + len(call.refs) * REF_BYTES


def _is_among(due: Due, ended: Mapping[str, set[int]]) -> bool:
    return due.frame.calls[0].counter in ended.get(due.frame.client, ())


async def _until(event: asyncio.Event, timeout_s: float) -> None:
    """Wait for news, or so long."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return
    event.clear()
