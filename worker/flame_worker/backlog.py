"""The calls that one child was given, in order, each with a serial number."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from flame_broker.messages import Call
from flame_worker.batches import Batch

__all__ = ["Backlog", "Given"]

Part = tuple[Batch, list[Call]]


@dataclass(slots=True, eq=False)
class Given:
    """Consecutive calls of a batch. The first ``done`` have results; ``first`` is a serial."""

    batch: Batch
    calls: Sequence[Call]
    first: int
    done: int = 0


class Backlog:
    """What a child has been given and has not finished.

    Calls run in order, so a result belongs to the first call without one, and what a child has
    not started is the end of the backlog.

    Attributes:
        given: Oldest first.
        load: How many calls that is.
        last: The call that finished last.
    """

    def __init__(self) -> None:
        self.given: deque[Given] = deque()
        self.load = 0
        self.last: tuple[Batch, int] | None = None
        self._next = 0

    @property
    def running(self) -> int:
        """Serial number of the first call without a result, else of the last one."""
        if not self.given:
            return self._next - 1
        head = self.given[0]
        return head.first + head.done

    def add(self, batch: Batch, calls: Sequence[Call]) -> int:
        """Append calls; returns the serial number of the first."""
        first = self._next
        self.given.append(Given(batch, calls, first))
        self._next += len(calls)
        self.load += len(calls)
        return first

    def find(self, serial: int) -> tuple[Batch, int] | None:
        """Batch and counter of a call, also of the last finished one."""
        for given in self.given:
            index = serial - given.first
            if 0 <= index < len(given.calls):
                return given.batch, given.calls[index].counter
        return self.last

    def serial_of(self, client: str, counter: int) -> int | None:
        """The serial number of an unfinished call."""
        for given in self.given:
            if given.batch.client != client:
                continue
            for index in range(given.done, len(given.calls)):
                if given.calls[index].counter == counter:
                    return given.first + index
        return None

    def finish(self) -> None:
        """The first call without a result has one now."""
        head = self.given[0]
        self.last = head.batch, head.calls[head.done].counter
        head.done += 1
        self.load -= 1
        if head.done == len(head.calls):
            self.given.popleft()

    def take_last(self, count: int) -> list[Part]:
        """Take the last calls back, those that have not started; oldest first."""
        parts: list[Part] = []
        while count:
            tail = self.given[-1]
            taken = min(count, len(tail.calls) - tail.done)
            keep = len(tail.calls) - taken
            parts.append((tail.batch, list(tail.calls[keep:])))
            tail.calls = tail.calls[:keep]
            if tail.done == keep:
                self.given.pop()
            count -= taken
            self.load -= taken
        return parts[::-1]

    def take_all(self) -> list[tuple[Batch, int]]:
        """Take back every call without a result, started or not."""
        calls = [(g.batch, call.counter) for g in self.given for call in g.calls[g.done :]]
        self.given.clear()
        self.load = 0
        return calls

    def holds(self, batch: Batch) -> bool:
        """Whether calls of a batch are in here."""
        return any(given.batch is batch for given in self.given)
