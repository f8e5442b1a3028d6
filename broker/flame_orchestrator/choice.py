"""Which of several outcomes of a call counts: the one that its client took.

A call may run twice, and the two results reach the client and us in different orders. The first
that the client has counts, so it tells us what it did not take (``disown``); of what is left, our
first counts. Whatever of all this comes first, the same is chosen in the end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, select

from flame_broker.frames import identity, reread
from flame_broker.messages import ControlFrame, Result, ResultFrame, Status, is_plain
from flame_orchestrator.schema import HIGHEST, disowned, outcomes
from flame_orchestrator.spans import Span, near_runs, overlapping

__all__ = ["Chosen", "choose", "disowned_row", "doubtful", "result_frames"]


class Chosen(NamedTuple):
    """The outcome that counts.

    Attributes:
        row: Of ``outcomes``.
        frame: What brought it.
        final: The outcome itself.
    """

    row: Row[Any]
    frame: ResultFrame
    final: Result


def result_frames(
    connection: Connection, client: str, counters: Iterable[int]
) -> Iterator[tuple[Row[Any], ResultFrame]]:
    """The frames with results of these calls, and of some others, each in the order they came."""
    for first, last in near_runs(sorted(counters)):
        near = select(outcomes).where(overlapping(outcomes, client, first, last))
        for row in connection.execute(near.order_by(outcomes.c.id)):
            frame = reread(row.body)
            assert isinstance(frame, ResultFrame)
            yield row, frame


def choose(connection: Connection, client: str, counters: Iterable[int]) -> Mapping[int, Chosen]:
    """The outcomes that count of those calls that have any."""
    wanted = {*counters}
    refused = _disowned(connection, client, wanted)
    first: dict[int, Chosen] = {}
    taken: dict[int, Chosen] = {}
    for row, frame in result_frames(connection, client, wanted):
        for result in frame.results:
            if result.counter in wanted and result.status not in (Status.ITEM, Status.AGAIN):
                found = Chosen(row, frame, result)
                first.setdefault(result.counter, found)
                if result.counter not in refused.get(row.mark, ()):
                    taken.setdefault(result.counter, found)
    return first | taken


def disowned_row(word: ControlFrame, body: bytes, now: float) -> dict[str, Any] | None:
    """What is written of a client's word; None if it makes no sense."""
    client, mark, counters = (word.arguments.get(n) for n in ("client", "mark", "counters"))
    if not (isinstance(client, str) and isinstance(mark, bytes) and isinstance(counters, tuple)):
        return None
    # No database may refuse it: what cannot be written is tried again for ever.
    span = Span.of(n for n in counters if isinstance(n, int) and 0 <= n <= HIGHEST)
    if not (len(span) and is_plain(client)):
        return None
    return {
        "note": identity(body),
        "mark": mark,
        "client": client,
        "first": span.first,
        "last": span.last,
        "counters": span.pack(),
        "at": now,
    }


def doubtful(connection: Connection, calls: Mapping[str, set[int]]) -> Mapping[str, set[int]]:
    """Those of these calls, by client, of which the client has ever refused an outcome."""
    found: dict[str, set[int]] = defaultdict(set)
    known = select(disowned.c.client).where(disowned.c.client.in_([*calls])).distinct()
    for client in connection.scalars(known):
        for counters in _disowned(connection, client, calls[client]).values():
            found[client] |= counters & calls[client]
    return found


def _disowned(
    connection: Connection, client: str, counters: Iterable[int]
) -> dict[bytes, set[int]]:
    """What a client did not take of these calls and of some others, by the frame it was in."""
    found: dict[bytes, set[int]] = defaultdict(set)
    columns = disowned.c.mark, disowned.c.first, disowned.c.last, disowned.c.counters
    for first, last in near_runs(sorted(counters)):
        near = overlapping(disowned, client, first, last)
        for row in connection.execute(select(*columns).where(near)):
            found[row.mark].update(Span.load(row.first, row.last, row.counters).counters)
    return found
