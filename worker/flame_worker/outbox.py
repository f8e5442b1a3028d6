"""What leaves the worker: results, hand-backs, output. Nothing is settled before its confirm."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from time import time
from typing import Final

from flame_broker.errors import ConfigError, FlameError
from flame_broker.frames import encode
from flame_broker.keys import Key
from flame_broker.logs import get_logger
from flame_broker.messages import (
    FRAME_BYTES,
    SHORT_FRAME_CALLS,
    Call,
    ControlFrame,
    Event,
    EventFrame,
    Plain,
    Result,
    ResultFrame,
    Status,
    Suspicion,
    Target,
)
from flame_broker.outcomes import encode_failure
from flame_broker.topology import (
    REASON_HEADER,
    SET_ASIDE_HEADER,
    calls_exchange,
    custody_queue,
    ledger_queue,
    logs_exchange,
    work_queue,
)
from flame_broker.transport import QueueSpec, Transport, Unroutable
from flame_worker.holding import Holding
from flame_worker.telling import Voice

__all__ = ["Outbox"]

_log = get_logger("flame.worker")

_PATIENCE_S: Final = float("inf")
"""How long custody waits for the broker: a frame that was given up would be held for ever."""

_TRY_AGAIN_S: Final = 1.0
_STALLED_S: Final = 0.05

_REPLY_AGAIN_S: Final = 1.0
_REPLY_PATIENCE_S: Final = 60.0
_REMEMBERED_QUEUES: Final = 1000
_EVENTS_DELAY_S: Final = 0.05
_EVENTS_SIZE: Final = 256 * 1024
"""Characters of telemetry that are not held back: a frame of all of them is far below its limit."""
_EVENT_SIZE: Final = 40  # what a line takes beyond its text


_Address = tuple[str, str, int, Target]
"""Reply queue, client, attempt and target: the custodian's queue is one for all clients."""


@dataclass(slots=True, eq=False)
class _Parcel:
    """Results that wait to be sent together: a frame has one of each part of an address."""

    holding: Holding
    results: list[Result] = field(default_factory=list)
    nbytes: int = 0
    seconds: float = 0.0
    finished: Counter[Holding] = field(default_factory=Counter)


class Outbox:
    """Packs and publishes; settles a holding when the broker has confirmed.

    Args:
        transport: Where to.
        worker: This worker's name, for the records.
    """

    def __init__(self, transport: Transport, worker: str) -> None:
        self._transport = transport
        self._worker = worker
        self._parcels: dict[_Address, _Parcel] = {}
        self._events: dict[Voice, tuple[float, list[Event]]] = {}
        self._events_size = 0
        self._in_flight: set[asyncio.Future[None]] = set()
        self._making: set[asyncio.Future[None]] = set()
        self._flush_due = False
        self._closed = False
        self._heard_at = 0.0
        self._patient_until = 0.0
        self._gone: OrderedDict[str, None] = OrderedDict()

    @property
    def stalled(self) -> bool:
        """Whether nothing leaves: for 50 ms the broker has confirmed nothing of what waits.

        RabbitMQ stops to read from publishers while its memory or its disk is short.
        """
        if not self._in_flight:
            return False
        return asyncio.get_running_loop().time() - self._heard_at > _STALLED_S

    def reconnected(self) -> None:
        """Be patient with clients from now on: a broker that crashed may have lost their queues.

        RabbitMQ 3.10 writes the declaration of a classic queue to disk up to two seconds late, and
        a worker may be back before the clients, which then declare their queues anew.
        """
        self._patient_until = asyncio.get_running_loop().time() + _REPLY_PATIENCE_S
        self._gone.clear()

    def results(self, holding: Holding, results: Iterable[Result], *, seconds: float = 0.0) -> None:
        """Queue results; they leave in this turn of the loop, packed with their neighbours.

        Args:
            holding: The frame whose calls they end.
            results: The results.
            seconds: What the child spent on them together, if that was measured.
        """
        if holding.lease is not None:
            results = holding.lease.sift(results, seconds, holding.settle)
            if not results:
                return
        self._pack(holding, results, seconds)

    def _pack(self, holding: Holding, results: Iterable[Result], seconds: float) -> None:
        frame = holding.frame
        address = frame.reply, frame.client, frame.attempt, frame.spec.target
        parcel = self._parcels.get(address)
        if parcel is None:
            parcel = self._parcels[address] = _Parcel(holding)
        parcel.seconds += seconds
        finished = 0
        for result in results:
            if parcel.nbytes and parcel.nbytes + len(result.payload) > FRAME_BYTES:
                # Some brokers take 180 KiB a message, and a batch may bring much more at once.
                parcel.finished[holding] += finished
                finished = 0
                self._send(parcel)
                parcel = self._parcels[address] = _Parcel(holding)
            parcel.results.append(result)
            parcel.nbytes += len(result.payload)
            if result.status is Status.ITEM:
                holding.unsettled += 1  # its call may be confirmed first, and must not be forgotten
            finished += 1
        parcel.finished[holding] += finished
        if len(parcel.results) >= SHORT_FRAME_CALLS or parcel.nbytes >= FRAME_BYTES:
            self._send(self._parcels.pop(address))
        elif not self._flush_due:
            self._flush_due = True
            asyncio.get_running_loop().call_soon(self._flush)

    def failure(
        self, holding: Holding, calls: Iterable[Call], kind: type[FlameError], message: str
    ) -> None:
        """Queue the same typed failure for several calls."""
        payload = encode_failure(kind, message)
        self.results(holding, [Result(c.counter, Status.FAILED, payload) for c in calls])

    def hand_back(
        self,
        holding: Holding,
        calls: Iterable[Call],
        *,
        queue: str = "",
        strikes: int = 0,
        suspicion: Suspicion | None = None,
    ) -> None:
        """Publish calls one a frame (to their own queue, unless told), then settle them.

        Those in the orchestrator's custody are given back to it.
        """
        if holding.run:
            self._release(holding, [*calls])
            return
        if suspicion is None:  # who hands it back does not start it
            suspicion = min(holding.frame.suspicion, Suspicion.APART)
        for call in calls:
            frame = replace(
                holding.frame,
                queue=queue or holding.frame.queue,
                calls=(call,),
                strikes=strikes or holding.frame.strikes,
                suspicion=suspicion,
                handed=holding.frame.handed + 1,
            )
            body = encode(frame, holding.key)
            self.store(work_queue(frame.queue), body, partial(holding.settle, 1))

    def _release(self, holding: Holding, calls: list[Call]) -> None:
        queue = custody_queue(holding.key.hex_id)
        about: dict[str, Plain] = {
            "client": holding.frame.client,
            "counters": tuple(call.counter for call in calls),
            "run": holding.run,
        }
        body = encode(ControlFrame(queue.name, "release", about), holding.key)
        self.store(queue, body, partial(holding.settle, len(calls)))

    def set_aside(self, queue: str, body: bytes, reason: str, then: Callable[[], None]) -> None:
        """Publish a message that cannot be run here, as it came, with the reason and the time."""
        headers: dict[str, str | int] = {
            REASON_HEADER: reason[:1000],
            SET_ASIDE_HEADER: int(time()),
        }
        self.store(work_queue(queue), body, then, headers=headers)

    def event(self, voice: Voice, event: Event) -> None:
        """Queue telemetry: packed over 50 ms, sent unconfirmed, dropped if nobody listens."""
        if not self._transport.capabilities.fanout:
            return  # said once at the start; nobody could listen
        said = self._events.get(voice)
        if said is None:
            said = self._events[voice] = time(), []
            asyncio.get_running_loop().call_later(_EVENTS_DELAY_S, self.send_events)
        said[1].append(event)
        self._events_size += len(event.text) + _EVENT_SIZE
        if self._events_size >= _EVENTS_SIZE:
            self.send_events()

    def send_events(self) -> None:
        """Send the telemetry that has piled up."""
        pending, self._events, self._events_size = self._events, {}, 0
        for voice, (at, events) in pending.items():
            key, client, label, attempt, echo, _ = voice
            exchange = logs_exchange(key.hex_id)
            frame = EventFrame(
                exchange, client, self._worker, label, tuple(events), attempt, at, echo
            )
            confirmed = self._transport.publish(
                voice.routing_key,
                encode(frame, key),
                exchange=exchange,
                mandatory=False,
                persistent=False,
            )
            confirmed.add_done_callback(_forget)

    def publish(
        self,
        queue: str,
        body: bytes,
        then: Callable[[], None],
        *,
        exchange: str = "",
        headers: dict[str, str | int] | None = None,
        otherwise: Callable[[], None] | None = None,
    ) -> None:
        """Publish, and call ``then`` when confirmed; ``otherwise`` if no queue has that name."""
        if self._closed:
            return
        confirmed = self._transport.publish(
            queue, body, exchange=exchange, headers=headers, deadline_s=_PATIENCE_S
        )
        if not self._in_flight:
            self._heard_at = asyncio.get_running_loop().time()
        self._in_flight.add(confirmed)
        confirmed.add_done_callback(partial(self._confirmed, queue, then, otherwise))

    def store(
        self,
        queue: QueueSpec,
        body: bytes,
        then: Callable[[], None],
        *,
        headers: dict[str, str | int] | None = None,
    ) -> None:
        """Publish into a queue of the cluster, which is made again if somebody has deleted it."""
        again = partial(self.store, queue, body, then, headers=headers)
        otherwise = partial(self._make, queue, again)
        self.publish(queue.name, body, then, headers=headers, otherwise=otherwise)

    async def drain(self, timeout_s: float) -> None:
        """Send what is queued and wait for the confirms."""
        self._flush()
        self.send_events()
        if self._in_flight:
            await asyncio.wait(self._in_flight, timeout=timeout_s)

    def close(self) -> None:
        """Send nothing any more: the transport is about to close, and others get what is held."""
        self._closed = True
        for task in self._making:
            task.cancel()

    def _flush(self) -> None:
        self._flush_due = False
        parcels, self._parcels = self._parcels, {}
        for parcel in parcels.values():
            self._send(parcel)

    def _send(self, parcel: _Parcel) -> None:
        frame, key = parcel.holding.frame, parcel.holding.key
        record = ResultFrame(
            frame.reply,
            frame.client,
            self._worker,
            tuple(parcel.results),
            frame.attempt,
            parcel.seconds,
        )
        settle = partial(_settle, parcel.finished)
        tracked = frame.spec.track and self._transport.capabilities.fanout
        exchange = calls_exchange(key.hex_id) if tracked else ""
        self._reply(record, encode(record, key), key, settle, exchange, first=True)

    def _reply(
        self,
        record: ResultFrame,
        body: bytes,
        key: Key,
        settle: Callable[[], None],
        exchange: str,
        *,
        first: bool = False,
    ) -> None:
        again = partial(self._reply, record, body, key, settle, exchange)
        lost = partial(self._to_ledger, record, key, settle)
        otherwise = partial(self._later, record.queue, again, lost, first=first)
        if exchange:  # a queue may be there without its binding
            otherwise = partial(self.publish, record.queue, body, settle, otherwise=otherwise)
        self.publish(record.queue, body, settle, exchange=exchange, otherwise=otherwise)

    def _later(
        self, queue: str, again: Callable[[], None], lost: Callable[[], None], *, first: bool
    ) -> None:
        """Try a second time: a client whose queue was deleted under it is making it anew.

        Once a queue, or each call that a client has left behind would be held for so long.
        """
        loop = asyncio.get_running_loop()
        if loop.time() < self._patient_until or (first and queue not in self._gone):
            loop.call_later(_REPLY_AGAIN_S, again)
            return
        if queue not in self._gone:
            _log.info("reply_queue.gone", queue=queue, remedy="the results are kept in the ledger")
        self._gone[queue] = None
        if len(self._gone) > _REMEMBERED_QUEUES:
            self._gone.popitem(last=False)
        lost()

    def _to_ledger(self, record: ResultFrame, key: Key, settle: Callable[[], None]) -> None:
        """The reply queue is gone: the client died, or slept past its expiry (rule 9)."""
        spec = ledger_queue(key.hex_id)
        body = encode(replace(record, queue=spec.name), key)
        self._make(spec, partial(self.store, spec, body, settle))

    def _make(self, queue: QueueSpec, then: Callable[[], None]) -> None:
        task = asyncio.ensure_future(self._declare(queue, then))
        for under_way in (self._in_flight, self._making):
            under_way.add(task)
            task.add_done_callback(under_way.discard)

    async def _declare(self, queue: QueueSpec, then: Callable[[], None]) -> None:
        while True:
            try:
                await self._transport.declare(queue)
            except FlameError as problem:
                _log.warning("queue.not_made", queue=queue.name, reason=str(problem))
                await asyncio.sleep(_TRY_AGAIN_S)
            else:
                then()
                return

    def _confirmed(
        self,
        queue: str,
        then: Callable[[], None],
        otherwise: Callable[[], None] | None,
        confirmed: asyncio.Future[None],
    ) -> None:
        self._in_flight.discard(confirmed)
        self._heard_at = asyncio.get_running_loop().time()
        if confirmed.cancelled():
            return
        problem = confirmed.exception()
        if problem is None:
            then()
        elif isinstance(problem, (Unroutable, ConfigError)) and otherwise is not None:
            otherwise()  # no such queue, or a name that no queue can have
        elif isinstance(problem, FlameError):
            # The transport is closed. Not acked, so not lost: the frame is delivered again.
            _log.warning("publish.failed", queue=queue, reason=str(problem))
        else:
            raise problem


def _settle(finished: Counter[Holding]) -> None:
    for holding, calls in finished.items():
        holding.settle(calls)


def _forget(confirmed: asyncio.Future[None]) -> None:
    """Telemetry may drop; looking at the exception keeps asyncio from reporting it."""
    if not confirmed.cancelled():
        confirmed.exception()
