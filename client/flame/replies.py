"""What comes back: results, items, output and progress, each brought to who waits for it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from time import monotonic
from typing import Final

from flame.answers import Answers
from flame.console import Console, LogBook
from flame.lanes import Lane, Pending, Record
from flame_broker.frames import identity
from flame_broker.messages import Event, EventFrame, EventKind, Result, ResultFrame, Status
from flame_broker.transport import Delivery

__all__ = ["Replies"]

_REMEMBERED_FRAMES: Final = 10_000


class Replies:
    """Takes the deliveries of the reply queue and of the logs queue.

    Args:
        answers: Opens the frames, and takes those that are answers to questions.
        pending: Who waits.
        released: Told of each settled call that took room in the window.
        unblock: Called when there is room again.
        disown: Told which results nobody waited for any more, by the frame that brought them.

    Attributes:
        console: Prints what calls say.
        log_book: Keeps it.
        last_result_s: When the last result came, by the monotonic clock.
    """

    def __init__(
        self,
        answers: Answers,
        pending: Pending,
        *,
        released: Callable[[Record, int], None],
        unblock: Callable[[], None],
        disown: Callable[[bytes, list[int]], None],
    ) -> None:
        self.console = Console()
        self.log_book = LogBook()
        self.last_result_s = 0.0
        self._answers = answers
        self._pending = pending
        self._released = released
        self._unblock = unblock
        self._disown = disown
        self._seen: OrderedDict[bytes, None] = OrderedDict()

    def on_reply(self, delivery: Delivery) -> None:
        """Settle what the results of one frame belong to, then ack it."""
        frame = self._answers.open(delivery, delivery.queue)
        if isinstance(frame, ResultFrame):
            if self._is_new(mark := identity(delivery.body)):
                self._settle(frame, mark)
        else:
            self._answers.tell(frame)
        delivery.ack()

    def on_event(self, exchange: str, delivery: Delivery) -> None:
        """Print and note what running calls say."""
        frame = self._answers.open(delivery, exchange)
        if isinstance(frame, EventFrame):
            for event in frame.events:
                self._note(frame.label, event, echo=frame.echo)
        delivery.ack()

    def _is_new(self, mark: bytes) -> bool:
        """Whether this frame has not come before: what it brought then must not be disowned."""
        if mark in self._seen:
            return False
        self._seen[mark] = None
        if len(self._seen) > _REMEMBERED_FRAMES:
            self._seen.popitem(last=False)
        return True

    def _settle(self, frame: ResultFrame, mark: bytes) -> None:
        # The hot path of a client: about 1 µs a result. Who takes the record out of the table
        # settles it, so a repeated, late or cancelled result finds none and is dropped.
        pop, item, settled = self._pending.records.pop, Status.ITEM, 0
        record: Record | None = None
        dropped: list[int] = []
        for result in frame.results:
            outcome = result
            if result.status is item or result.index:
                followed = self._follow(result)
                if followed is None:
                    continue
                outcome = followed
            record = pop(result.counter, None)
            if record is None:
                dropped.append(result.counter)
                continue
            settled += 1
            if record.gate is not None:
                record.gate.inside -= 1
            record.settle(outcome)
        if dropped:
            self._disown(mark, dropped)
        self._make_room(frame, settled, None if record is None else record.lane)

    def _make_room(self, frame: ResultFrame, settled: int, lane: Lane | None) -> None:
        self.last_result_s = monotonic()
        if frame.seconds and lane is not None:
            lane.learn(len(frame.results), frame.seconds)
        if lane is None or lane.keeping is None:  # what is kept takes no room in the window
            self._pending.window.settled(settled, self.last_result_s)
        self._unblock()

    def _follow(self, result: Result) -> Result | None:
        """Bring a part of a stream to its call: gives the outcome when the stream is whole."""
        record = self._pending.records.get(result.counter)
        return None if record is None else record.follow(result)

    def _note(self, label: str, event: Event, *, echo: bool) -> None:
        record = self._pending.records.get(event.counter)
        if event.kind is EventKind.PROGRESS:
            if record is not None:
                record.take_progress(event.fraction, event.text)
            return
        if record is not None:
            record.take_sign_of_life()
        self.log_book.add(event.counter, event.text)
        if echo:
            self.console.write(label, event.text, event.kind)
