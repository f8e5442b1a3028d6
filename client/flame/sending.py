"""From lanes to frames to the broker: packing, the window, confirms.

Everything here runs in the courier's loop, except ``submit``.
"""

from __future__ import annotations

import asyncio
import copy
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from time import monotonic
from typing import Final

from flame.expiry import Expiry
from flame.lanes import NO_TERMS, Lane, Pending, Record
from flame_broker.clock import Clock, elapsed
from flame_broker.errors import (
    CallExpired,
    ConfigError,
    FlameError,
    NoOrchestrator,
    PayloadTooLarge,
    StoreError,
)
from flame_broker.frames import encode
from flame_broker.keys import Key
from flame_broker.logs import get_logger
from flame_broker.messages import Call, CallFrame, ControlFrame, Deposit, Plain, call_id
from flame_broker.resources import DEFAULT_CLASS
from flame_broker.topology import classes_queue, control_exchange, custody_queue, ledger_queue
from flame_broker.transport import DEFAULT_DEADLINE_S, Transport, Unroutable

__all__ = ["Sender"]

_FRAMES_A_TURN: Final = 16  # then replies get their turn

_CANCEL_DEADLINE_S: Final = 86_400.0  # who cancels does not wait for it, and counts on it
_LOOK_EVERY_S: Final = 0.25
_MOST_KEPT: Final = 1_000_000  # the orchestrator writes them to its database
_NO_ORCHESTRATOR: Final = (
    "retry=, delivery='at_most_once' and the options not_before=, key=, after= and limit= need an "
    "orchestrator, and none has ever run on this broker with this key: start `flame-orchestrator` "
    "beside it"
)

_log = get_logger("flame.client")


class Sender:
    """Publishes the calls of all lanes, in turns, within the client's window.

    Args:
        transport: Where to.
        key: Signs.
        client_id: Whose calls these are.
        pending: Who waits for them.
        wake: Has ``flush`` called soon, in the loop; callable from any thread.
        upload: Brings a target's pickle into the store; blocks.

    Attributes:
        expiry: Watches published calls that have a queue timeout.
    """

    expiry: Expiry

    def __init__(
        self,
        transport: Transport,
        key: Key,
        client_id: str,
        pending: Pending,
        *,
        wake: Callable[[], None],
        upload: Callable[[Lane], None],
    ) -> None:
        self.reply = ""
        self._transport = transport
        self._key = key
        self._client_id = client_id
        self._pending = pending
        self._wake = wake
        self._upload = upload
        self._clock = Clock()
        self._busy: deque[Lane] = deque()
        self._stuck: list[Lane] = []
        self._declared: set[str] = set()
        self._in_flight: set[asyncio.Future[None]] = set()
        self._preparations: set[asyncio.Task[None]] = set()
        self._watching: asyncio.Task[None] | None = None

    def stir(self, lane: Lane) -> None:
        """See that a lane with calls in it is looked at; from any thread."""
        if not lane.busy:
            lane.busy = True
            self._busy.append(lane)
            self._wake()

    def flush(self) -> None:
        """Pack and publish what has piled up, a frame per lane and turn."""
        for _ in range(_FRAMES_A_TURN):
            if not self._busy:
                return
            lane = self._busy.popleft()
            lane.busy = False
            if not lane.prepared:
                self._prepare(lane)
            elif self._room(lane) <= 0:
                lane.busy = True
                self._stuck.append(lane)
                self._watch_window()
            else:
                self._send_frame(lane)
                if lane.outbox:
                    self.stir(lane)
        self._wake()

    def unblock(self) -> None:
        """Look again at lanes that had no room: results have come."""
        if self._stuck:
            stuck, self._stuck = self._stuck, []
            self._busy.extend(stuck)
            self._wake()

    async def get_ready(self, timeout_s: float) -> None:
        """Wait until no lane is being made ready for its first frame."""
        deadline = monotonic() + timeout_s
        while self._preparations and monotonic() < deadline:
            await asyncio.wait([*self._preparations], timeout=deadline - monotonic())

    async def drain(self, timeout_s: float) -> None:
        """Wait until what may be sent is sent and confirmed."""
        deadline = monotonic() + timeout_s
        while (waiting := {*self._in_flight, *self._preparations}) and monotonic() < deadline:
            await asyncio.wait(waiting, timeout=deadline - monotonic())
            self.flush()
        if self._watching is not None:
            self._watching.cancel()

    def cancel(
        self, counters: Iterable[int], *, spare_running: bool = False, owner: str = ""
    ) -> None:
        """Tell the workers to stop published calls, or only never to start them.

        Args:
            counters: Of the calls.
            spare_running: Let those go on that have started.
            owner: The client that made them; by default this one.

        A broker without fan-out has no way to: the calls run, and their results are dropped.
        """
        if not self._transport.capabilities.fanout:
            return
        arguments: dict[str, Plain] = {
            "client": owner or self._client_id,
            "counters": tuple(counters),
            "spare_running": spare_running,
        }
        exchange, custody = control_exchange(self._key.hex_id), custody_queue(self._key.hex_id).name
        for place, key in ((exchange, ""), ("", custody)):
            # Where no orchestrator has ever run, there is no custody queue, and nothing is kept.
            self._say("cancel", arguments, key, exchange=place)

    def disown(self, mark: bytes, counters: list[int]) -> None:
        """Tell the history that these results were not taken: they came too late, or twice.

        Args:
            mark: The signature of the frame that brought them.
            counters: Whose they are.
        """
        if self._transport.capabilities.fanout:
            ledger = ledger_queue(self._key.hex_id).name
            told: dict[str, Plain] = {
                "client": self._client_id, "mark": mark, "counters": tuple(counters)
            }  # fmt: skip
            self._say("disown", told, ledger)

    def _say(self, verb: str, told: dict[str, Plain], queue: str, *, exchange: str = "") -> None:
        """Say something that a broker which is away for long must not make us forget."""
        body = encode(ControlFrame(exchange or queue, verb, told), self._key)
        confirmed = self._transport.publish(
            queue, body, exchange=exchange, mandatory=False, deadline_s=_CANCEL_DEADLINE_S
        )
        self._in_flight.add(confirmed)
        confirmed.add_done_callback(partial(self._control_sent, verb))

    def released(self, record: Record, calls: int = 1) -> None:
        """Give back the room that published calls took."""
        if record.lane is None or record.lane.keeping is None:
            self._pending.window.inside -= calls
        if record.gate is not None:
            record.gate.inside -= calls

    def fail(self, counters: Iterable[int], exc: BaseException) -> None:
        """End published calls that are still pending, and give back their room."""
        for counter in counters:
            record = self._pending.records.pop(counter, None)
            if record is not None:
                self.released(record)
                record.fail_call(counter, _own(exc, call_id(self._client_id, counter)))
        self.unblock()

    def _watch_window(self) -> None:
        """While calls are held back here, see that the workers do not run dry."""
        if self._watching is None:
            self._watching = asyncio.ensure_future(self._watch_queues())

    async def _watch_queues(self) -> None:
        try:
            while True:
                await asyncio.sleep(_LOOK_EVERY_S)
                held_back = {lane.queue.name for lane in self._stuck}
                if not held_back or self._pending.window.room > 0:
                    return
                depths = [await self._transport.depth(name) for name in held_back]
                if not all(depths):
                    self._pending.window.starved()
                    self.unblock()
        except FlameError as exc:
            _log.info("window.not_watched", reason=str(exc))
        finally:
            self._watching = None

    # ── frames ───────────────────────────────────────────────────────────────

    def _room(self, lane: Lane) -> int:
        room = _MOST_KEPT if lane.keeping is not None else self._pending.window.room
        return room if lane.gate is None else min(room, lane.gate.room)

    def _send_frame(self, lane: Lane) -> None:
        calls, due = lane.take(self._room(lane), self._pending.records)
        if not calls:
            return
        if lane.keeping is None:
            self._pending.window.inside += len(calls)
        if lane.gate is not None:
            lane.gate.inside += len(calls)
        left_s = due - elapsed()
        if due and left_s <= 0:
            self._fail(calls, CallExpired("it waited in the client longer than its queue timeout"))
            return
        frame = CallFrame(
            queue=lane.queue.name,
            reply=self.reply,
            client=self._client_id,
            spec=lane.spec,
            calls=tuple(calls),
            expires_at=self._clock.latest() + left_s if due else 0.0,
        )
        try:
            body = encode(self._addressed(lane, frame), self._key)
        except PayloadTooLarge as exc:  # one call with thousands of references
            self._fail(calls, exc)
        else:
            self._publish(lane, calls, body, again=lane.keeping is None)
            if due:
                self.expiry.watch(lane, [call.counter for call in calls], due)

    def _addressed(self, lane: Lane, frame: CallFrame) -> CallFrame | Deposit:
        """What is published of it: the frame itself, or a deposit with the orchestrator."""
        keeping = lane.keeping
        if keeping is None:
            return frame
        terms = [keeping.terms.pop(call.counter, NO_TERMS) for call in frame.calls]
        return Deposit(
            queue=custody_queue(self._key.hex_id).name,
            frame=frame,
            due=tuple([one.not_before for one in terms]),
            keys=tuple([one.key for one in terms]),
            retry=keeping.retry,
            queue_timeout_s=keeping.queue_timeout_s,
            after=tuple([one.after for one in terms]) if any(t.after for t in terms) else (),
            limits=tuple([one.limit for one in terms]) if any(t.limit for t in terms) else (),
        )

    def _publish(self, lane: Lane, calls: list[Call], body: bytes, *, again: bool) -> None:
        if lane.keeping is not None:
            queue, exchange = custody_queue(self._key.hex_id).name, ""
        else:
            queue, exchange = lane.queue.name, lane.exchange
        confirmed = self._transport.publish(
            queue, body, exchange=exchange, deadline_s=DEFAULT_DEADLINE_S
        )
        self._in_flight.add(confirmed)
        confirmed.add_done_callback(partial(self._confirmed, lane, calls, body, again))

    def _confirmed(
        self,
        lane: Lane,
        calls: list[Call],
        body: bytes,
        again: bool,
        confirmed: asyncio.Future[None],
    ) -> None:
        self._in_flight.discard(confirmed)
        exc = None if confirmed.cancelled() else confirmed.exception()
        if exc is None:
            return
        if isinstance(exc, Unroutable) and again:
            self._keep(asyncio.ensure_future(self._send_again(lane, calls, body)))
        elif isinstance(exc, Unroutable) and lane.keeping is not None:
            self._fail(calls, NoOrchestrator(_NO_ORCHESTRATOR))
        else:
            self._fail(calls, exc)

    async def _send_again(self, lane: Lane, calls: list[Call], body: bytes) -> None:
        """The queue was deleted since we declared it: once is mended, twice is an error."""
        try:
            await self._transport.declare(lane.queue)
        except FlameError as exc:
            self._fail(calls, exc)
            return
        self._publish(lane, calls, body, again=False)

    def _fail(self, calls: Iterable[Call], exc: BaseException) -> None:
        self.fail([call.counter for call in calls], exc)

    def _control_sent(self, verb: str, confirmed: asyncio.Future[None]) -> None:
        self._in_flight.discard(confirmed)
        exc = None if confirmed.cancelled() else confirmed.exception()
        if exc is not None:
            _log.warning(f"{verb}.not_sent", reason=str(exc))

    # ── before the first frame of a lane ─────────────────────────────────────

    def _prepare(self, lane: Lane) -> None:
        """Declare the queue, announce the class, upload the target; then look again."""
        if lane.preparing is None:
            lane.preparing = asyncio.ensure_future(self.make_ready(lane))
            lane.preparing.add_done_callback(partial(self._made_ready, lane))
            self._keep(lane.preparing)

    async def make_ready(self, lane: Lane) -> None:
        """Have everything in its place that a call of this lane needs.

        Raises:
            FlameError: The broker or the store refused.
        """
        await self._declare(lane)
        if lane.packed.blob is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._upload, lane)

    def _made_ready(self, lane: Lane, made: asyncio.Future[None]) -> None:
        lane.preparing = None
        if made.cancelled():
            return  # with the loop; the courier ends what waits
        exc = made.exception()
        lane.prepared = exc is None
        if exc is not None:
            self._fail_all(lane, exc)
        if lane.outbox:
            self.stir(lane)

    async def _declare(self, lane: Lane) -> None:
        if lane.queue.name in self._declared:
            return
        other = lane.spec.resources != DEFAULT_CLASS
        if other and not self._transport.capabilities.streams:
            raise ConfigError(
                f"resources {lane.spec.resources}: this broker ({self._transport.server}) has no "
                f"streams, so workers never learn of other resources than {DEFAULT_CLASS}; leave "
                "them at their default and use a pool for such calls, or use RabbitMQ or Redis"
            )
        await self._transport.declare(lane.queue)
        if other:
            stream = classes_queue(self._key.hex_id, lane.pool)
            await self._transport.declare(stream)
            arguments = {"pool": lane.pool, "name": lane.spec.resources}
            body = encode(ControlFrame(stream.name, "class", arguments), self._key)
            await self._transport.publish(stream.name, body)
        self._declared.add(lane.queue.name)

    def _fail_all(self, lane: Lane, exc: BaseException) -> None:
        """What waits in the lane now fails; the next call tries the preparation again."""
        level = _log.warning if isinstance(exc, StoreError) else _log.error
        if isinstance(exc, FlameError):
            level("lane.not_ready", queue=lane.queue.name, reason=str(exc))
        else:
            exc = _unforeseen(exc)
            level("lane.not_ready", queue=lane.queue.name, reason=str(exc), exc_info=exc)
        while lane.outbox:
            call = lane.outbox.popleft()
            record = self._pending.records.pop(call.counter, None)
            if record is not None:
                record.fail_call(call.counter, _own(exc, ""))
        lane.born.clear()

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._preparations.add(task)
        task.add_done_callback(self._preparations.discard)


def _unforeseen(exc: BaseException) -> FlameError:
    problem = FlameError(f"the call could not be sent: {type(exc).__name__}: {exc}")
    problem.__cause__ = exc
    return problem


def _own(exc: BaseException, call: str) -> BaseException:
    """A copy for each future: raised in several threads, one would collect all their traces."""
    twin = copy.copy(exc)
    twin.__cause__ = exc.__cause__
    if hasattr(twin, "call_id"):
        twin.call_id = call
    return twin
