"""What comes back: results, items, output and progress, each brought to who waits for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

from flame.console import Console, LogBook
from flame.lanes import Pending, Record
from flame_broker.errors import FlameError, MalformedMessage
from flame_broker.frames import decode
from flame_broker.keys import Keyring
from flame_broker.logs import get_logger
from flame_broker.messages import (
    ControlFrame,
    Event,
    EventFrame,
    EventKind,
    Frame,
    Result,
    ResultFrame,
    Status,
)
from flame_broker.transport import Delivery

__all__ = ["Replies"]

_log = get_logger("flame.client")


class Replies:
    """Takes the deliveries of the reply queue and of the logs queue.

    Args:
        keyring: Whose signatures count.
        pending: Who waits.
        released: Told of each settled call that took room in the window.
        unblock: Called when there is room again.

    Attributes:
        console: Prints what calls say.
        log_book: Keeps it.
        refused: What was not signed by a key of ours, counted.
        last_result_s: When the last result came, by the monotonic clock.
        lost_queues: Reply queues that were lost with their node; the present one takes their place.
    """

    def __init__(
        self,
        keyring: Keyring,
        pending: Pending,
        *,
        released: Callable[[Record, int], None],
        unblock: Callable[[], None],
    ) -> None:
        self.console = Console()
        self.log_book = LogBook()
        self.refused: Counter[str] = Counter()
        self.last_result_s = 0.0
        self.lost_queues: list[str] = []
        self._keyring = keyring
        self._pending = pending
        self._released = released
        self._unblock = unblock
        self._listeners: list[Callable[[ControlFrame], None]] = []

    @contextmanager
    def listening(self, listener: Callable[[ControlFrame], None]) -> Iterator[None]:
        """Tell ``listener`` of every control frame that arrives meanwhile."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    def on_reply(self, delivery: Delivery) -> None:
        """Settle what the results of one frame belong to, then ack it."""
        frame = self._open(delivery, delivery.queue)
        if isinstance(frame, ResultFrame):
            self._settle(frame)
        elif isinstance(frame, ControlFrame):
            for listener in tuple(self._listeners):
                listener(frame)
        delivery.ack()

    def on_event(self, exchange: str, delivery: Delivery) -> None:
        """Print and note what running calls say."""
        frame = self._open(delivery, exchange)
        if isinstance(frame, EventFrame):
            for event in frame.events:
                self._note(frame.label, event)
        delivery.ack()

    def _open(self, delivery: Delivery, queue: str) -> Frame | None:
        try:
            return decode(delivery.body, self._keyring, queue=queue, also=self.lost_queues)
        except FlameError as exc:
            self._refuse(exc)
            return None

    def _refuse(self, exc: FlameError) -> None:
        """Drop what is not signed by a key of ours; say so once for each kind of fault."""
        kind = type(exc).__name__
        self.refused[kind] += 1
        if self.refused[kind] == 1:
            level = _log.error if not isinstance(exc, MalformedMessage) else _log.warning
            level("reply.refused", kind=kind, reason=str(exc))

    def _settle(self, frame: ResultFrame) -> None:
        # The hot path of a client: about 1 µs a result. Who takes the record out of the table
        # settles it, so a repeated, late or cancelled result finds none and is dropped.
        pop, item, settled = self._pending.records.pop, Status.ITEM, 0
        record: Record | None = None
        for result in frame.results:
            outcome = result
            if result.status is item or result.index:
                followed = self._follow(result)
                if followed is None:
                    continue
                outcome = followed
            record = pop(result.counter, None)
            if record is None:
                continue
            settled += 1
            if record.gate is not None:
                record.gate.inside -= 1
            record.settle(outcome)
        self.last_result_s = monotonic()
        if frame.seconds and record is not None and record.lane is not None:
            record.lane.learn(len(frame.results), frame.seconds)
        self._pending.window.settled(settled, self.last_result_s)
        self._unblock()

    def _follow(self, result: Result) -> Result | None:
        """Bring a part of a stream to its call: gives the outcome when the stream is whole."""
        record = self._pending.records.get(result.counter)
        return None if record is None else record.follow(result)

    def _note(self, label: str, event: Event) -> None:
        record = self._pending.records.get(event.counter)
        if event.kind is EventKind.PROGRESS:
            if record is not None:
                record.take_progress(event.fraction, event.text)
            return
        if record is not None:
            record.take_sign_of_life()
        self.log_book.add(event.counter, event.text)
        self.console.write(label, event.text, event.kind)
