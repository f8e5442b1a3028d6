"""What the orchestrator is told to do: schedules, and calls to be run again.

An order comes as a question; its answer says that it is written down. Any orchestrator may write:
the one that leads hears of it and acts. An order that comes twice, since its first answer was
lost, is carried out once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, TypeVar

from sqlalchemy import Engine

from flame_broker.errors import CallError, FlameError
from flame_broker.frames import encode, reread
from flame_broker.keys import Key
from flame_broker.logs import get_logger
from flame_broker.messages import ControlFrame, Deposit, Plain, parse_call_id
from flame_broker.schedules import check_schedule
from flame_broker.topology import custody_queue
from flame_broker.transport import Transport
from flame_orchestrator.answers import Question
from flame_orchestrator.custody import Custody
from flame_orchestrator.reruns import Reruns
from flame_orchestrator.schedules import Plan, Schedules
from flame_orchestrator.timekeeper import InThread

__all__ = ["LOOK", "Orders"]

_log = get_logger("flame.orchestrator")

T = TypeVar("T")
Arguments = Mapping[str, Any]

LOOK: Final = "look"
"""The verb of a word to whoever leads: something was written down."""


class Orders:
    """Takes orders.

    Args:
        transport: The way to whoever leads.
        engine: The database.
        in_thread: Where that blocks.
    """

    def __init__(self, transport: Transport, engine: Engine, in_thread: InThread) -> None:
        self._transport = transport
        self._engine = engine
        self._in_thread = in_thread
        self._schedules: dict[str, Schedules] = {}
        self._reruns: dict[str, Reruns] = {}

    def serve(self, key: Key, custody: Custody) -> Schedules:
        """Take orders for a cluster key; its schedules."""
        schedules = Schedules(self._engine, custody, key)
        self._schedules[key.hex_id] = schedules
        self._reruns[key.hex_id] = Reruns(self._engine, custody, key)
        return schedules

    @property
    def questions(self) -> Mapping[str, Question]:
        """How each is answered."""
        return {
            "schedule": self._put,
            "schedules": self._list,
            "schedule.show": self._show,
            "schedule.pause": self._pause,
            "schedule.resume": self._resume,
            "schedule.remove": self._remove,
            "schedule.run": self._run,
            "retry": self._retry,
        }

    async def _put(self, asked: Arguments, key: Key) -> dict[str, Plain]:
        name, overlap = asked.get("name"), asked.get("overlap")
        catch_up = check_schedule(name, asked.get("catch_up"), overlap)
        deposit = reread(asked["deposit"])  # what holds it is signed
        if not isinstance(deposit, Deposit):
            raise TypeError("a schedule needs a call to make")
        plan = Plan(
            str(name), str(asked["cron"]), str(asked["timezone"]), catch_up, bool(overlap), deposit
        )
        written = await self._do(key, partial(self._of(key).put, plan))
        return {"schedule": written}

    async def _list(self, asked: Arguments, key: Key) -> dict[str, Plain]:
        return {"schedules": tuple(await self._in_thread(self._of(key).every))}

    async def _show(self, asked: Arguments, key: Key) -> dict[str, Plain]:
        return {"schedule": await self._in_thread(partial(self._of(key).show, _name(asked)))}

    async def _pause(self, asked: Arguments, key: Key) -> dict[str, Plain]:
        await self._do(key, partial(self._of(key).pause, _name(asked)))
        return {}

    async def _resume(self, asked: Arguments, key: Key) -> dict[str, Plain]:
        await self._do(key, partial(self._of(key).resume, _name(asked)))
        return {}

    async def _remove(self, asked: Arguments, key: Key) -> dict[str, Plain]:
        await self._do(key, partial(self._of(key).remove, _name(asked)))
        return {}

    async def _run(self, asked: Arguments, key: Key) -> dict[str, Plain]:
        order = str(asked["order"])
        return {"call": await self._do(key, partial(self._of(key).run, _name(asked), order))}

    async def _retry(self, asked: Arguments, key: Key) -> dict[str, Plain]:
        client, counter = parse_call_id(str(asked.get("call")))
        reruns, new_client = self._reruns[key.hex_id], str(asked["order"])
        try:
            new = await self._do(key, partial(reruns.again, client, counter, new_client))
        except CallError as refusal:
            return {"refusal": str(refusal)}
        return {"call": new}

    def _of(self, key: Key) -> Schedules:
        return self._schedules[key.hex_id]

    async def _do(self, key: Key, work: Callable[[], T]) -> T:
        """Write something down, and say so to whoever leads."""
        done = await self._in_thread(work)
        queue = custody_queue(key.hex_id).name
        try:
            await self._transport.publish(queue, encode(ControlFrame(queue, LOOK), key))
        except FlameError as problem:
            _log.info("order.not_told", reason=str(problem))  # it looks for itself in 5 s
        return done


def _name(asked: Arguments) -> str:
    return str(asked.get("name"))
