"""Hears what tracked calls print, has it written down, and answers who asks for it.

Telemetry may be lost: what waits for us in the broker is bounded, and while the database refuses
nothing is taken from there. So neither a flood of lines nor a slow disk holds up the ledger, whose
thread this does not use.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from flame_broker.backoff import Backoff
from flame_broker.errors import FlameError, StoreError
from flame_broker.frames import open_frame
from flame_broker.keys import Key, Keyring
from flame_broker.logs import get_logger
from flame_broker.messages import EventFrame, call_id, is_plain
from flame_broker.store import Store
from flame_broker.topology import kept_logs_queue, logs_exchange
from flame_broker.transport import Delivery, Transport
from flame_orchestrator.database import in_words
from flame_orchestrator.following import Following
from flame_orchestrator.history import History
from flame_orchestrator.log_reader import LogReader
from flame_orchestrator.log_upkeep import LogUpkeep
from flame_orchestrator.logs import Call, Logs, Written
from flame_orchestrator.threads import in_thread

__all__ = ["LogKeeper"]

_log = get_logger("flame.orchestrator")

_GATHER_S: Final = 0.2
_AHEAD: Final = 64
"""Frames in hand, of some 300 KiB at most: all else waits in the broker."""

_MOST_FRAMES: Final = 16
_LAST_WRITE_S: Final = 5.0
_TRY_AGAIN_S: Final = 5.0
_READERS: Final = 3


class LogKeeper:
    """Keeps the logs of the calls of a cluster. ``start``, then ``stop``; lives in one loop.

    Args:
        transport: Where the cluster is.
        keyring: Keys whose calls it follows.
        engine: The database.
        store: Takes what is large; None to keep all in the database.
        limit_bytes: What the log of one call may hold; 0 to keep none.

    Attributes:
        following: Answers the question "logs".
    """

    def __init__(
        self,
        transport: Transport,
        keyring: Keyring,
        engine: Engine,
        store: Store | None,
        *,
        limit_bytes: int,
    ) -> None:
        self._transport, self._keyring, self._store = transport, keyring, store
        self._limit = limit_bytes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="flame-logs")
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="flame-logs-read")
        self._logs = Logs(engine, limit_bytes=limit_bytes)
        self._upkeep = LogUpkeep(engine, store)
        self.following = Following(
            LogReader(engine, store), History(engine), self._readers, lambda: bool(self._inbox)
        )
        self._inbox: list[tuple[str, Delivery]] = []
        self._writing: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._moving: set[Call] = set()
        self._leaving = False

    async def start(self) -> None:
        """Begin to listen, for each key; later where the broker cannot do it yet."""
        if not self._limit:
            return
        for key in self._keyring:
            if not await self._listen(key):
                self._later(self._listen_later(key))

    async def stop(self) -> None:
        """Leave; what is not written is not acked, and comes again."""
        self._leaving = True
        if self._writing is not None:
            await asyncio.wait([self._writing], timeout=_LAST_WRITE_S)
        for task in [*self._tasks, *filter(None, [self._writing])]:
            task.cancel()
        if self._store is not None:
            self._store.close()
        for threads in (self._thread, self._readers):
            threads.shutdown(cancel_futures=True)

    async def settle(self) -> None:
        """Wait until what has arrived is written."""
        while self._writing is not None:
            await asyncio.wait([self._writing])

    async def forget(self, *, before: float, keep_calls: int) -> None:
        """Forget the logs of calls that the history has forgotten."""
        work = partial(self._upkeep.forget, before=before, keep_calls=keep_calls)
        try:
            forgotten = await in_thread(self._readers, work)
        except SQLAlchemyError as problem:
            _log.warning("logs.not_forgotten", reason=in_words(problem))
        else:
            if forgotten:
                _log.info("logs.forgot", calls=forgotten)

    # ── listening ────────────────────────────────────────────────────────────

    async def _listen(self, key: Key) -> bool:
        exchange, queue = logs_exchange(key.hex_id), kept_logs_queue(key.hex_id)
        hear = partial(self._hear, exchange)
        try:
            await self._transport.declare_exchange(exchange, "topic")
            await self._transport.declare(queue)
            await self._transport.consume(queue.name, hear, prefetch=_AHEAD)
        except FlameError as problem:  # its node may be away: that of the ledger is not
            _log.warning(
                "logs.not_heard",
                queue=queue.name,
                reason=str(problem),
                remedy="what calls print is not kept; it is tried again",
            )
            return False
        return True

    async def _listen_later(self, key: Key) -> None:
        while True:
            await asyncio.sleep(_TRY_AGAIN_S)
            if await self._listen(key):
                _log.info("logs.heard_again")
                return

    def _hear(self, exchange: str, delivery: Delivery) -> None:
        if self._leaving:
            return  # not acked: it comes again
        self._inbox.append((exchange, delivery))
        if self._writing is None:
            self._writing = asyncio.ensure_future(self._write())
            self._writing.add_done_callback(self._written)

    # ── writing ──────────────────────────────────────────────────────────────

    async def _write(self) -> None:
        backoff, failing = Backoff(), False
        await asyncio.sleep(_GATHER_S)
        while self._inbox:
            taken = self._inbox[:_MOST_FRAMES]
            try:
                written = await in_thread(self._thread, partial(self._record, taken))
            except SQLAlchemyError as problem:
                failing = True
                _log.warning(
                    "logs.write_failed",
                    reason=in_words(problem),
                    remedy="see to the database; it is tried again, and the broker keeps the "
                    "latest of what calls print",
                )
                await asyncio.sleep(backoff.next_s())
                continue
            if failing:
                backoff.reset()
                failing = False
                _log.info("logs.written_again")
            del self._inbox[: len(taken)]
            for _, delivery in taken:
                delivery.ack()
            self.following.tell(written.calls)
            self._move(written.large)

    def _record(self, taken: list[tuple[str, Delivery]]) -> Written:
        read = (self._read(exchange, delivery.body) for exchange, delivery in taken)
        return self._logs.write([frame for frame in read if frame is not None])

    def _read(self, exchange: str, body: bytes) -> EventFrame | None:
        """What a message says; None if nothing of it can be kept."""
        try:
            frame, _ = open_frame(body, self._keyring, queue=exchange)
        except FlameError as problem:
            _log.warning("logs.refused", reason=str(problem))
            return None
        if isinstance(frame, EventFrame) and is_plain(frame.client) and is_plain(frame.worker):
            return frame
        return None

    def _written(self, writing: asyncio.Task[None]) -> None:
        self._writing = None
        if not writing.cancelled() and (fault := writing.exception()) is not None:
            # A fault of ours. What it concerns is not acked, and comes again after a restart.
            asyncio.get_running_loop().call_exception_handler(
                {"message": "logs cannot be written", "exception": fault}
            )

    # ── moving ───────────────────────────────────────────────────────────────

    def _move(self, calls: set[Call]) -> None:
        if self._store is not None:
            for call in calls - self._moving:
                self._moving.add(call)
                self._later(self._move_one(call))

    async def _move_one(self, call: Call) -> None:
        try:
            moved = await in_thread(self._readers, partial(self._upkeep.move, call))
        except (StoreError, SQLAlchemyError) as problem:
            # It stays in the database; when there is more of it, it is tried again.
            reason = in_words(problem)
            _log.warning("logs.not_moved", call=call_id(*call), reason=reason)
        else:
            _log.debug("logs.moved", call=call_id(*call), chunks=moved)
        finally:
            self._moving.discard(call)

    def _later(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
