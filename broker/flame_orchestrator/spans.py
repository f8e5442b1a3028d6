"""The numbers of the calls in one frame, and a bit for each of them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import msgpack
from sqlalchemy import ColumnElement, Table, and_, select

from flame_orchestrator.schema import clients

__all__ = ["Span", "merged", "near_runs", "overlapping"]

_NEAR = 256


def overlapping(table: Table, client: str, first: int, last: int) -> ColumnElement[bool]:
    """The rows of a client whose frames may hold a counter between two, by the index."""
    widest = select(clients.c.widest).where(clients.c.client == client).scalar_subquery()
    columns = table.c
    return and_(
        columns.client == client,
        columns.first.between(first - widest, last),
        columns.last >= first,
    )


def near_runs(ordered: Iterable[int]) -> Iterator[tuple[int, int]]:
    """First and last of each run of rising numbers that are near one another."""
    return merged((number, number) for number in ordered)


def merged(intervals: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Intervals that come by their beginnings, those that overlap or are near as one.

    >>> list(merged([(1, 5), (3, 4), (7, 9), (1000, 1001)]))
    [(1, 9), (1000, 1001)]
    """
    run: tuple[int, int] | None = None
    for first, last in intervals:
        if run is not None and first - run[1] <= _NEAR:
            run = run[0], max(run[1], last)
            continue
        if run is not None:
            yield run
        run = first, last
    if run is not None:
        yield run


class Span:
    """Counters in rising order.

    >>> span = Span.of([7, 8, 9])
    >>> span.bits([8, 100])
    2
    >>> span.picked(0b101)
    [7, 9]
    """

    __slots__ = ("counters",)

    def __init__(self, counters: Sequence[int]) -> None:
        self.counters = counters

    @classmethod
    def of(cls, counters: Iterable[int]) -> Span:
        """The span of these counters, in whatever order they come."""
        ordered = sorted(set(counters))
        if ordered and ordered[-1] - ordered[0] == len(ordered) - 1:
            return cls(range(ordered[0], ordered[-1] + 1))
        return cls(ordered)

    @classmethod
    def load(cls, first: int, last: int, packed: bytes | None) -> Span:
        """The span that was stored as these columns."""
        if packed is None:
            return cls(range(first, last + 1))
        return cls(msgpack.unpackb(packed))

    @property
    def first(self) -> int:
        """The lowest counter."""
        return self.counters[0]

    @property
    def last(self) -> int:
        """The highest counter."""
        return self.counters[-1]

    def __len__(self) -> int:
        return len(self.counters)

    def pack(self) -> bytes | None:
        """The counters as bytes; None if first and last say it all."""
        if isinstance(self.counters, range):
            return None
        return cast(bytes, msgpack.packb(self.counters))

    def bits(self, ordered: Sequence[int]) -> int:
        """A bit for each of our counters that stands in ``ordered``, which rises."""
        between = ordered[bisect_left(ordered, self.first) : bisect_right(ordered, self.last)]
        if not between:
            return 0
        if isinstance(self.counters, range):
            if len(between) == len(self):
                return (1 << len(self)) - 1
            first = self.first
            return sum(1 << (counter - first) for counter in between)
        found = 0
        for counter in between:
            at = bisect_left(self.counters, counter)
            if self.counters[at] == counter:
                found |= 1 << at
        return found

    def picked(self, bits: int) -> list[int]:
        """The counters whose bit is set."""
        return [counter for at, counter in enumerate(self.counters) if bits >> at & 1]
