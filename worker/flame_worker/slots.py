"""A slot: one child process with its GPUs, the calls it was given, and the child's successors."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

from flame_broker.errors import CallCancelled, CallError, CallTimeout, OutOfMemory, WorkerLost
from flame_broker.logs import get_logger
from flame_broker.messages import Call, CallSpec, EventKind, Result, Status
from flame_worker.backlog import Backlog, Part
from flame_worker.batches import Batch, Lost, SlotOwner, SlotSettings, SpooledResult
from flame_worker.limits import available_bytes, private_bytes
from flame_worker.output import LastWords, OutputSplitter
from flame_worker.pipes import LOADED, MAX_OUTSTANDING, NOTICE, PROGRESS, READY
from flame_worker.process import ChildProcess
from flame_worker.results import failure_of, result_of
from flame_worker.watch import CallClock, MemoryWatch

__all__ = ["Batch", "Lost", "Slot", "SlotOwner", "SlotSettings", "SpooledResult"]

_log = get_logger("flame.worker")

_START_TIMEOUT_S: Final = 60.0
_KILL_AFTER_TERM_S: Final = 1.0
_FIRST_BACKOFF_S: Final = 0.1
_LAST_BACKOFF_S: Final = 5.0
_REPLACEMENT_BYTES: Final = 256 * 1024 * 1024
_ITEM: Final = int(Status.ITEM)


class Slot:
    """Runs batches of calls in a child process, one call at a time, and survives the child.

    Every method is to be called in the loop that ``start`` ran in.

    Args:
        number: Among the worker's slots, for logs.
        settings: How children are started and replaced.
        owner: Hears of results, output and deaths.

    Attributes:
        revoked: Nothing was given since the last ``revoke``: all that is left here has started.
        batches: What was given and has not ended, oldest first.
    """

    def __init__(self, number: int, *, settings: SlotSettings, owner: SlotOwner) -> None:
        self.number = number
        self.revoked = False
        self.batches: deque[Batch] = deque()
        self._settings, self._owner = settings, owner
        self._child: ChildProcess | None = None
        self._next: ChildProcess | None = None
        self._retired: set[ChildProcess] = set()
        self._first_ready: asyncio.Future[None] | None = None
        self._closing = self._recycling = False
        self._failures = 0
        self._held: deque[Part] = deque()
        self._timers: set[asyncio.TimerHandle] = set()
        self._memory = MemoryWatch(
            settings, lambda: self.pid, lambda: bool(self.batches), self._on_excess
        )
        self._clock = CallClock(self._on_due)
        self._reset()

    def _reset(self) -> None:
        """Forget what belongs to one child."""
        self._backlog = Backlog()
        self._served = 0
        self._clock.reset()
        self._doom: tuple[type[CallError], str] | None = None
        self._doomed: list[Part] = []
        self._last_words = LastWords()
        self._outputs = {kind: self._splitter(kind) for kind in EventKind}

    def _splitter(self, kind: EventKind) -> OutputSplitter:
        def emit(serial: int, lines: list[str]) -> None:
            self._emit(kind, serial, lines)

        limits = self._settings.max_output_bytes, self._settings.max_output_lines
        backlog = self._backlog
        return OutputSplitter(emit, lambda: backlog.running, *limits)

    @property
    def gpus(self) -> tuple[str, ...]:
        """What the child sees as ``CUDA_VISIBLE_DEVICES``."""
        return self._settings.gpus

    @property
    def pid(self) -> int | None:
        """Of the child that runs calls; None between two children."""
        return None if self._child is None else self._child.pid

    @property
    def ready(self) -> bool:
        """The child has started. Batches may be given before: they wait."""
        return self._child is not None and self._child.ready

    @property
    def idle(self) -> bool:
        """Nothing runs and nothing waits here."""
        return not self.batches

    @property
    def load(self) -> int:
        """Calls given and not finished."""
        return self._backlog.load + sum(len(calls) for _, calls in (*self._held, *self._doomed))

    def left_of(self, batch: Batch) -> list[int]:
        """Counters of the calls of a batch that were given to the child and have not ended."""
        parts = (g.calls[g.done :] for g in self._backlog.given if g.batch is batch)
        return [call.counter for calls in parts for call in calls]

    async def start(self) -> None:
        """Start the child and wait until it is ready.

        Raises:
            WorkerLost: It did not come up; the message has its last words.
        """
        self._loop = asyncio.get_running_loop()
        self._first_ready = self._loop.create_future()
        self._spawn()
        try:
            await asyncio.wait_for(asyncio.shield(self._first_ready), _START_TIMEOUT_S)
        except TimeoutError as exc:
            raise WorkerLost(f"no child started within {_START_TIMEOUT_S:g} s") from exc

    def give(self, batch: Batch) -> None:
        """Run a batch after those given before.

        Raises:
            RuntimeError: The slot is closed.
            ValueError: More calls than a slot takes at once.
        """
        if self._closing:
            raise RuntimeError("the slot is closed")
        if not 0 < len(batch.calls) <= MAX_OUTSTANDING - self.load:
            raise ValueError(f"a slot takes 1 to {MAX_OUTSTANDING} calls at once")
        self.revoked = False
        batch.given_at = self._loop.time()
        self.batches.append(batch)
        self._hand_over(batch, batch.calls)

    def revoke(self) -> list[tuple[Batch, list[Call]]]:
        """Take back every call that has not started, oldest first.

        A batch of which nothing is left ends at once; its ``on_done`` follows.
        """
        parts = self._take_back()
        self.revoked = True
        for batch in {id(batch): batch for batch, _ in parts}.values():
            if self._is_over(batch):
                self.batches.remove(batch)
                self._loop.call_soon(self._owner.on_done, self, batch, batch.seconds)
        self._recycle()
        return parts

    def cancel(self, client: str, counter: int) -> bool:
        """End a call, started or not, as ``CallCancelled``; False if it is not here.

        A call that runs gets an exception, SIGTERM after a grace, and SIGKILL a second later.
        """
        serial = self._backlog.serial_of(client, counter)
        if serial is None and not _contains(self._held, client, counter):
            return False
        found = False
        for batch, calls in self._take_back():
            left = [c for c in calls if batch.client != client or c.counter != counter]
            if len(left) < len(calls):
                found = True
                self._loop.call_soon(self._report_cancelled, batch, counter)
            if left:
                self._hand_over(batch, left)
        if not found and serial is not None and self._child is not None:
            self._child.interrupt(serial)
            self._later(self._settings.grace_s, self._insist, self._child, serial)
        self._recycle()
        return True

    def kill(self) -> None:
        """End the children at once, with what they run."""
        self._closing = True
        for child in self._children():
            child.kill()

    async def close(self, *, grace_s: float) -> None:
        """Stop: no more calls start than were given, and none outlives the grace."""
        self._closing = True
        self._memory.stop()
        self._clock.follow(None)
        for timer in self._timers:
            timer.cancel()
        children = self._children()
        for child in children:
            child.finish()
        gone = [child.gone for child in children]
        for wait_s, signum in ((grace_s, signal.SIGTERM), (_KILL_AFTER_TERM_S, signal.SIGKILL)):
            if not gone or not (await asyncio.wait(gone, timeout=wait_s))[1]:
                return
            for child in children:
                child.kill(signum)
        await asyncio.wait(gone)

    def _children(self) -> list[ChildProcess]:
        return [c for c in (self._child, self._next, *self._retired) if c is not None]

    # Giving calls to the child and taking them back

    def _hand_over(self, batch: Batch, calls: Sequence[Call]) -> None:
        child = self._child
        if child is None or self._recycling or self._doom is not None or self._closing:
            self._held.append((batch, [*calls]))
            return
        if not self._backlog.load:
            self._clock.sign_of_life(self._loop.time())
            self._clock.follow(batch.spec)
        serial = self._backlog.add(batch, calls)
        child.give(serial, batch, calls)
        self._memory.start()

    def _send_held(self) -> None:
        waiting, self._held = self._held, deque()
        for batch, calls in waiting:
            self._hand_over(batch, calls)

    def _take_back(self) -> list[Part]:
        held, self._held = self._held, deque()
        if self._child is None:
            return [*held]
        taken = self._backlog.take_last(self._child.claims.take_back())
        self._child.busy = bool(self._backlog.given)
        return [*taken, *held]

    def _is_over(self, batch: Batch) -> bool:
        waiting = (*self._held, *self._doomed)
        return not self._backlog.holds(batch) and all(other is not batch for other, _ in waiting)

    # What the child says

    def on_records(self, child: ChildProcess, records: list[list[Any]]) -> None:
        """Results and notices of a child."""
        results: list[Result | SpooledResult] = []
        batch: Batch | None = None
        for record in records:
            if record[0] == NOTICE:
                self._on_notice(child, record)
                continue
            given = self._backlog.given and self._backlog.given[0]
            if child is not self._child or not given or record[0] != self._backlog.running:
                child.kill()  # a call wrote to our pipe: nothing after it can be trusted
                return
            if batch is not given.batch:
                self._deliver(batch, results)
                batch, results = given.batch, []
            counter = given.calls[given.done].counter
            results.append(result_of(counter, record, self._settings.spool_dir))
            if record[1] == _ITEM:
                continue
            batch.seconds += record[3]
            self._finish_call(record)
            if not self._backlog.given or self._backlog.given[0].batch is not batch:
                self._deliver(batch, results)
                results = []
                self._clock.follow(self._running_spec())
                self._end_batch(batch)
        self._deliver(batch, results)
        if not self._backlog.given:
            child.busy = False

    def _finish_call(self, record: list[Any]) -> None:
        if len(record) > 4 and record[5]:
            for output in self._outputs.values():
                output.end_call()
        self._backlog.finish()
        self._served += 1
        self._clock.sign_of_life(self._loop.time())

    def _deliver(self, batch: Batch | None, results: list[Result | SpooledResult]) -> None:
        if batch is not None and results:
            self._owner.on_results(self, batch, results)

    def _end_batch(self, batch: Batch) -> None:
        if self._is_over(batch):
            self.batches.remove(batch)
            self._owner.on_done(self, batch, batch.seconds)
        self._consider_recycling()

    def _on_notice(self, child: ChildProcess, record: list[Any]) -> None:
        kind = record[1]
        if kind == READY:
            self._on_ready(child)
        elif child is not self._child:
            return
        elif kind == LOADED and self._backlog.given:
            spec = self._backlog.given[0].batch.spec
            self._clock.loaded(spec.target, self._loop.time())
            self._clock.follow(spec)
        elif kind == PROGRESS:
            _, _, serial, fraction, text = record
            found = self._backlog.find(serial)
            if found is not None:
                self._owner.on_progress(self, *found, fraction, text)

    def on_output(self, child: ChildProcess, kind: EventKind, data: bytes) -> None:
        """Bytes that a child wrote."""
        if child is self._child:
            self._outputs[kind].feed(data)

    def _emit(self, kind: EventKind, serial: int, lines: list[str]) -> None:
        if kind is EventKind.STDERR:
            self._last_words.hear(lines)
        found = self._backlog.find(serial)
        if found is not None:
            self._owner.on_output(self, *found, kind, lines)

    # Time and memory

    def _running_spec(self) -> CallSpec | None:
        return self._backlog.given[0].batch.spec if self._backlog.given else None

    def _on_due(self) -> None:
        if self._child is not None:
            self._child.collect()  # the call may have ended without our having looked
        spec = self._running_spec()
        if spec is not None and spec.timeout_s and self._clock.due(spec) <= self._loop.time():
            limit_s = spec.timeout_s
            self._condemn(CallTimeout, f"the call ran longer than its timeout of {limit_s:g} s")
        else:
            self._clock.follow(spec)

    def _insist(self, child: ChildProcess, serial: int) -> None:
        """A cancelled call did not stop when it was asked to."""
        if child is not self._child:
            return  # each child's serial numbers begin anew
        child.collect()  # the call may have ended without our having looked
        if child is self._child and self._backlog.running == serial and self._backlog.given:
            self._condemn(CallCancelled, "the call was cancelled while it ran, and was killed")

    def _on_excess(self) -> None:
        limit = self._settings.memory_bytes
        message = f"the call used more memory than its limit of {limit} bytes"
        self._condemn(OutOfMemory, message, signal.SIGKILL)

    def _condemn(
        self, reason: type[CallError], message: str, signum: signal.Signals = signal.SIGTERM
    ) -> None:
        """Kill the child for what its call does, after taking back what has not started."""
        child = self._child
        if child is None or self._doom is not None:
            return
        self._doom = (reason, message)
        self._doomed = self._take_back()
        child.kill(signum)
        self._later(_KILL_AFTER_TERM_S, child.kill)

    def _report_cancelled(self, batch: Batch, counter: int) -> None:
        message = "the call was cancelled before it started"
        self._owner.on_results(self, batch, [failure_of(counter, CallCancelled, message)])
        if batch in self.batches and self._is_over(batch):
            self.batches.remove(batch)
            self._owner.on_done(self, batch, batch.seconds)

    def _later(self, delay_s: float, callback: Any, *args: object) -> None:
        def run() -> None:
            self._timers.discard(timer)
            callback(*args)

        timer = self._loop.call_later(delay_s, run)
        self._timers.add(timer)

    # Births and deaths

    def _spawn(self) -> None:
        if self._closing:
            return
        try:
            self._child = ChildProcess(self._settings, self)
        except OSError as exc:
            self._retry_start(f"no child could be started: {exc}")
            return
        self._reset()
        self._send_held()

    def _retry_start(self, message: str) -> None:
        self._failures += 1
        if self._first_ready is not None and not self._first_ready.done():
            self._first_ready.set_exception(WorkerLost(message))
            self._closing = True
            return
        delay_s = min(_LAST_BACKOFF_S, _FIRST_BACKOFF_S * 2 ** (self._failures - 1))
        self._later(delay_s, self._spawn)

    def _on_ready(self, child: ChildProcess) -> None:
        child.ready = True
        self._failures = 0
        if child is self._child:
            self._clock.sign_of_life(self._loop.time())
        if self._first_ready is not None and not self._first_ready.done():
            self._first_ready.set_result(None)
        self._recycle()
        self._owner.on_ready(self)

    def on_exit(self, child: ChildProcess) -> None:
        """A child is gone."""
        self._retired.discard(child)
        if child is self._next:
            self._next = None
            self._recycling = False
            self._send_held()
        if child is not self._child:
            return
        lost = self._lost(child)
        self._child, self._next = self._next, None
        self._recycling = False
        self.batches.clear()
        self._reset()
        if child.ready and self._child is None:
            self._spawn()
        elif self._child is None and not self._closing:
            self._retry_start(lost.message)
        if lost.running or lost.unstarted or not self._closing:
            self._owner.on_lost(self, lost)

    def _lost(self, child: ChildProcess) -> Lost:
        parts = self._doomed + self._take_back()
        unstarted = [(batch, call.counter) for batch, calls in parts for call in calls]
        started = self._backlog.take_all()
        reason, message = self._doom or (WorkerLost, child.exit_message())
        if self._doom is None and (child.crashed or not child.ready):
            message = f"{message}\n{self._last_words}".rstrip()
        if self._closing and self._doom is None:
            message = "the worker stopped before the call ended"
        return Lost(reason, message, started[-1] if started else None, started[:-1], unstarted)

    def _consider_recycling(self) -> None:
        """Replace the child if it has served long enough or grown too big, losing no call.

        The successor starts first if there is room for both. What is given meanwhile waits for
        it, and what the old child was given it finishes.
        """
        if not self._recycling and self._doom is None and not self._closing and self._is_worn():
            self._recycling = True
            self._start_successor()
        self._recycle()

    def _recycle(self) -> None:
        """Go on with it, if all that the old child was given is done."""
        child = self._child
        if not self._recycling or child is None or self._backlog.given:
            return
        if self._doom is not None or self._closing:
            return
        if self._next is None:
            self._child = None
            self._retire(child)
            child.gone.add_done_callback(lambda _: self._succeed(None))
        elif self._next.ready:
            self._retire(child)
            self._succeed(self._next)

    def _start_successor(self) -> None:
        """Start it beside the old child, unless both would want the same GPUs or memory."""
        room_bytes = _REPLACEMENT_BYTES + self._settings.recycle_over_bytes
        if not self._settings.gpus and available_bytes() > room_bytes:
            with contextlib.suppress(OSError):  # then it comes when the old one is gone
                self._next = ChildProcess(self._settings, self)

    def _is_worn(self) -> bool:
        limit = self._settings.recycle_after_calls
        return bool(limit and self._served >= limit) or self._memory.is_grown(self._loop.time())

    def _retire(self, child: ChildProcess) -> None:
        kept_bytes = private_bytes(child.pid)
        _log.info("child.recycled", slot=self.number, calls=self._served, kept_bytes=kept_bytes)
        self._retired.add(child)
        child.finish()
        self._later(self._settings.grace_s, child.kill)

    def _succeed(self, successor: ChildProcess | None) -> None:
        self._recycling = False
        self._child, self._next = successor, None
        if successor is None:
            self._spawn()
            return
        self._reset()
        self._send_held()


def _contains(parts: deque[Part], client: str, counter: int) -> bool:
    return any(
        batch.client == client and any(call.counter == counter for call in calls)
        for batch, calls in parts
    )
