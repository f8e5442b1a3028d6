"""What bars kept calls from their start: other calls that have to succeed first, and limits.

A barred call is due never. Here the bars are lifted: when the last of the calls that it waits for
has succeeded, and when fewer calls than its limit says are under way with the same key.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from time import time
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    and_,
    bindparam,
    case,
    delete,
    func,
    literal_column,
    select,
    tuple_,
    update,
)

from flame_broker.messages import Status, call_id
from flame_broker.outcomes import describe
from flame_orchestrator.history import outcome_of, perhaps_ended
from flame_orchestrator.schema import NEVER, dependencies, kept

__all__ = ["Hopeless", "Lifted", "awaits", "give_places", "keys_that_want", "lift"]

_AT_ONCE: Final = 500
_MOST_PLACED: Final = 2000

_YES: Final[ColumnElement[int]] = literal_column("1")
_NO: Final[ColumnElement[int]] = literal_column("0")
"""As in the conditions of the indices, which SQLite then need not check again in each row."""


class Hopeless(NamedTuple):
    """A call that will never start, since one that it waits for did not succeed.

    Attributes:
        client: Whose it is.
        counter: Its number.
        reason: Which one failed, and how.
    """

    client: str
    counter: int
    reason: str


class Lifted(NamedTuple):
    """What lifting bars has come to.

    Attributes:
        hopeless: Calls that wait in vain.
        more: Whether there are calls that wait for others still.
        places: Whether there may be places still for calls that wait for them.
    """

    hopeless: list[Hopeless]
    more: bool
    places: bool = False


def lift(connection: Connection, key_id: str, among: Mapping[str, set[int]] | None) -> Lifted:
    """Let calls go on whose last awaited call has succeeded.

    Args:
        connection: In a transaction.
        key_id: Whose calls.
        among: What may have ended, by client; None for anything.

    Returns:
        Nothing is changed about those that wait in vain.
    """
    hopeless: list[Hopeless] = []
    nearer: Counter[int] = Counter()
    for client, counter in [*_awaited(connection, among)]:
        outcome = outcome_of(connection, client, counter)
        if outcome is None:
            continue
        on = and_(dependencies.c.client == client, dependencies.c.counter == counter)
        ours = select(kept.c.id, kept.c.client, kept.c.counter).where(on, kept.c.key_id == key_id)
        rows = connection.execute(ours.join(dependencies, dependencies.c.call == kept.c.id)).all()
        if outcome.final.status is Status.OK:
            nearer.update(row.id for row in rows)
            connection.execute(delete(dependencies).where(on))
        else:
            why = ": ".join(filter(None, describe(outcome.final)))
            reason = f"it was to start after {call_id(client, counter)}, which failed: {why}"
            hopeless += [Hopeless(row.client, row.counter, reason) for row in rows]
    _go_on(connection, nearer)
    return Lifted(hopeless, awaits(connection))


def awaits(connection: Connection) -> bool:
    """Whether any call waits for another one."""
    return connection.execute(select(dependencies.c.call).limit(1)).first() is not None


def _go_on(connection: Connection, calls: Mapping[int, int]) -> None:
    """Calls wait for so many less; those that wait for none any more have their time."""
    rows = [{"row": call, "fewer": fewer} for call, fewer in calls.items()]
    if not rows:
        return
    this = kept.c.id == bindparam("row")
    free = and_(this, kept.c.unmet == 0, kept.c.place.is_(None), kept.c.due_at == NEVER)
    limited = kept.c.limit_key.is_not(None)
    now = time()
    due_at = case((kept.c.not_before > now, kept.c.not_before), else_=now)
    connection.execute(
        update(kept).where(this).values(unmet=kept.c.unmet - bindparam("fewer")), rows
    )
    those = [{"row": call} for call in calls]
    connection.execute(update(kept).where(free, ~limited).values(due_at=due_at), those)
    connection.execute(update(kept).where(free, limited).values(place=0), those)


def keys_that_want(connection: Connection, key_id: str, before: float) -> list[str]:
    """The keys of limits under which calls wait for places.

    Args:
        connection: To read.
        key_id: Whose calls.
        before: Those whose time comes by then, in seconds since 1970.
    """
    return list(
        connection.scalars(select(kept.c.limit_key).where(_waits(key_id, before)).distinct())
    )


def give_places(
    connection: Connection, key_id: str, before: float, keys: Iterable[str]
) -> set[str]:
    """Let calls that are under limits go on as far as these allow, in the order of their times.

    Args:
        connection: In a transaction.
        key_id: Whose calls.
        before: Those whose time comes by then, in seconds since 1970.
        keys: Of the limits to look at.

    Returns:
        Those keys under which there is no place for the next call.
    """
    full: set[str] = set()
    for key in keys:
        under_way = and_(kept.c.key_id == key_id, kept.c.limit_key == key, kept.c.place == _YES)
        taken: int = connection.scalar(select(func.count()).select_from(kept).where(under_way)) or 0
        wanted = (
            select(kept.c.id, kept.c.limit_calls)
            .where(_waits(key_id, before), kept.c.limit_key == key)
            .order_by(kept.c.not_before, kept.c.id)
            .limit(_MOST_PLACED)
        )
        placed: list[dict[str, Any]] = []
        for row in connection.execute(wanted):
            if taken >= row.limit_calls:
                full.add(key)
                break
            taken += 1
            placed.append({"row": row.id})
        if placed:
            those = update(kept).where(kept.c.id == bindparam("row"))
            connection.execute(those.values(place=1, due_at=kept.c.not_before), placed)
    return full


def _waits(key_id: str, before: float) -> Any:
    """Nothing but a limit bars these; the index on places knows all of this."""
    return and_(kept.c.key_id == key_id, kept.c.place == _NO, kept.c.not_before <= before)


def _awaited(
    connection: Connection, among: Mapping[str, set[int]] | None
) -> Iterator[tuple[str, int]]:
    """Those calls that others wait for."""
    columns = dependencies.c.client, dependencies.c.counter
    if among is None:
        every: dict[str, set[int]] = defaultdict(set)
        for row in connection.execute(select(*columns).distinct()):
            every[row.client].add(row.counter)
        for client, counters in every.items():
            for counter in perhaps_ended(connection, client, counters):
                yield client, counter
        return
    news = ((client, counter) for client, counters in among.items() for counter in counters)
    while some := list(islice(news, _AT_ONCE)):
        wanted = select(*columns).where(tuple_(*columns).in_(some)).distinct()
        for row in connection.execute(wanted).all():
            yield row.client, row.counter
