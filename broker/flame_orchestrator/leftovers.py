"""What a cluster leaves behind that has gone with its program: nobody runs these calls any more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import time
from typing import Any, Final

from sqlalchemy import Engine, Row, and_, delete, select, update
from sqlalchemy.exc import SQLAlchemyError

from flame_broker.errors import CallCancelled, FlameError
from flame_broker.frames import encode
from flame_broker.keys import Key
from flame_broker.messages import Result, ResultFrame, Status
from flame_broker.outcomes import encode_failure
from flame_broker.topology import calls_exchange
from flame_orchestrator.database import in_words
from flame_orchestrator.ledger import Arrival, Ledger
from flame_orchestrator.schema import (
    batches,
    dependencies,
    followers,
    kept,
    leaders,
    schedules,
)
from flame_orchestrator.spans import Span
from flame_orchestrator.states import CallState

__all__ = ["end_calls"]

_BATCHES_AT_ONCE: Final = 100
_RESULTS_A_FRAME: Final = 256
_OUR_NAME: Final = "orchestrator"


def end_calls(engine: Engine, key_id: str, reason: str, signer: Key) -> int:
    """End all calls of a cluster key as cancelled, and forget who led and its schedules.

    It blocks: call it in a thread. If it is cut off, it can be done again.

    Args:
        engine: The database.
        key_id: Of the cluster that is gone.
        reason: Why its calls end, one sentence.
        signer: Signs what is written about them; the key itself went with its cluster.

    Returns:
        How many calls were ended.

    Raises:
        FlameError: The database refused, and not all is written; try again.
    """
    try:
        ended = _end_tracked(engine, key_id, reason, signer)
        _close_custody(engine, key_id, reason)
    except SQLAlchemyError as exc:
        raise FlameError(f"the calls of key {key_id} cannot be ended: {in_words(exc)}") from exc
    return ended


def _end_tracked(engine: Engine, key_id: str, reason: str, signer: Key) -> int:
    ledger, ended, last = Ledger(engine), 0, 0
    while rows := _unended(engine, key_id, last):
        last = rows[-1].id
        frames = [frame for row in rows for frame in _endings(row, reason)]
        ledger.record([Arrival(frame, encode(frame, signer)) for frame in frames])
        ended += sum(len(frame.results) for frame in frames)
    return ended


def _unended(engine: Engine, key_id: str, after: int) -> Sequence[Row[Any]]:
    """Some frames of calls of this key that have not all ended, by their queues' names."""
    ours = batches.c.queue.startswith(calls_exchange(key_id).removesuffix("calls"))
    wanted = (
        select(
            batches.c.id,
            batches.c.client,
            batches.c.first,
            batches.c.last,
            batches.c.counters,
            batches.c.done,
            batches.c.attempt,
        )
        .where(batches.c.unended > 0, batches.c.id > after, ours)
        .order_by(batches.c.id)
        .limit(_BATCHES_AT_ONCE)
    )
    with engine.connect() as connection:
        return [*connection.execute(wanted)]


def _endings(row: Row[Any], reason: str) -> Iterator[ResultFrame]:
    span = Span.load(row.first, row.last, row.counters)
    left = span.picked(~int.from_bytes(row.done, "little"))
    payload = encode_failure(CallCancelled, reason)
    for first in range(0, len(left), _RESULTS_A_FRAME):
        some = left[first : first + _RESULTS_A_FRAME]
        results = tuple(Result(counter, Status.FAILED, payload) for counter in some)
        yield ResultFrame("", row.client, _OUR_NAME, results, row.attempt)


def _close_custody(engine: Engine, key_id: str, reason: str) -> None:
    ours = kept.c.key_id == key_id
    calls = select(kept.c.id).where(ours)
    over = {
        "state": CallState.CANCELLED.value,
        "reason": reason,
        "ended_at": time(),
        "unmet": 0,
        "place": None,
    }
    with engine.begin() as connection:
        connection.execute(delete(leaders).where(leaders.c.key_id == key_id))
        connection.execute(delete(schedules).where(schedules.c.key_id == key_id))
        connection.execute(delete(dependencies).where(dependencies.c.call.in_(calls)))
        connection.execute(delete(followers).where(followers.c.of.in_(calls)))
        connection.execute(update(kept).where(and_(ours, kept.c.ended_at.is_(None))).values(over))
