"""Ended calls that are to run again, from what the ledger keeps of them."""

from __future__ import annotations

from dataclasses import replace
from time import time
from typing import Any, Final

import msgpack
from sqlalchemy import Connection, Engine, and_, select

from flame_broker.errors import CallError
from flame_broker.keys import Key
from flame_broker.messages import (
    CallFrame,
    Deposit,
    Limitation,
    Priority,
    RetryPolicy,
    call_id,
)
from flame_broker.topology import calls_queue, custody_queue
from flame_orchestrator.custody import Custody
from flame_orchestrator.history import History
from flame_orchestrator.schema import kept
from flame_orchestrator.states import TERMINAL

__all__ = ["Reruns"]

_COUNTER: Final = 1


class Reruns:
    """Makes new calls of old ones, for one cluster key. It blocks: call it in a thread.

    Args:
        engine: The database.
        custody: Keeps the new calls.
        key: Its queues take them, whatever key the old ones had.
    """

    def __init__(self, engine: Engine, custody: Custody, key: Key) -> None:
        self._engine = engine
        self._history = History(engine)
        self._custody = custody
        self._key = key

    def again(self, client: str, counter: int, new_client: str) -> str:
        """Run a call again that has ended; the id of the new one.

        It starts afresh: attempt 1, without the queue timeout that an ordinary call had. A retry
        policy and a limit go on to hold; what it had to wait for does not.

        Args:
            client: Whose call it was.
            counter: Its number there.
            new_client: Whose first call the new one is; said twice, one is made.

        Raises:
            CallError: It is unknown, or it has not ended, or its arguments are not known.
            sqlalchemy.exc.SQLAlchemyError: Nothing was written; try again.
        """
        frame = self._frame(client, counter)
        with self._engine.connect() as connection:
            terms = _terms(connection, client, counter)
        call = frame.calls[0]._replace(counter=_COUNTER)
        deposit = Deposit(
            queue=custody_queue(self._key.hex_id).name,
            frame=CallFrame(
                queue=self._queue(frame),
                reply="",
                client=new_client,
                spec=replace(frame.spec, echo=False, track=True),
                calls=(call,),
            ),
            due=(time(),),
            keys=("",),
            **terms,
        )
        self._custody.keep(lambda _: [deposit])
        return call_id(new_client, _COUNTER)

    def _frame(self, client: str, counter: int) -> CallFrame:
        """The frame that brought a call, with it alone."""
        name = call_id(client, counter)
        story = self._history.story(client, counter)
        if story is None:
            raise CallError(f"the history knows no call {name}; `flame ps` lists those it knows")
        if story["state"] not in {state.value for state in TERMINAL}:
            raise CallError(
                f"{name} has not ended, it is {story['state']}: `flame wait {name}` waits for it, "
                f"`flame cancel {name}` ends it"
            )
        frame = self._history.frame(client, counter)
        if frame is None:
            raise CallError(
                f"the history knows how {name} ended, and not what it was called with: call it "
                "again from your program"
            )
        return frame

    def _queue(self, frame: CallFrame) -> str:
        """Where such calls wait, under our key; a suspect has lost its priority."""
        pool, *_, last = frame.queue.split(".")[3:]
        known = {one.value: one for one in Priority}
        priority = known.get(last, Priority.NORMAL)
        return calls_queue(self._key.hex_id, pool, frame.spec.resources, priority).name


def _terms(connection: Connection, client: str, counter: int) -> dict[str, Any]:
    """What the deposit of a call that was in custody said of it, besides the call itself."""
    ours = and_(kept.c.client == client, kept.c.counter == counter)
    row = connection.execute(select(kept).where(ours)).one_or_none()
    if row is None:
        return {}
    policy = None if row.retry is None else RetryPolicy(*msgpack.unpackb(row.retry))
    limit = None if row.limit_key is None else Limitation(row.limit_key, row.limit_calls)
    return {"retry": policy, "queue_timeout_s": row.queue_timeout_s, "limits": (limit,)}
