"""The keeper of logs: hears, has written down, and lives with what its broker or database do."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from flame_broker.errors import BrokerUnavailable
from flame_broker.frames import encode
from flame_broker.memory import MemoryTransport
from flame_broker.messages import Event, EventFrame, EventKind
from flame_broker.topology import kept_logs_queue, kept_output, logs_exchange
from flame_orchestrator import log_keeper
from flame_orchestrator.database import open_database
from flame_orchestrator.log_keeper import LogKeeper
from flame_orchestrator.open_log import OpenLog
from lab.bench import KEYRING
from lab.wait import eventually

KEY = KEYRING.signer
EXCHANGE, QUEUE = logs_exchange(KEY.hex_id), kept_logs_queue(KEY.hex_id)

_numbers = itertools.count()


class Lab:
    """A keeper and a broker to print through."""

    def __init__(self, folder: Path, transport: MemoryTransport, limit_bytes: int) -> None:
        self.transport = transport
        self.engine = open_database(f"sqlite:///{folder}/ledger.sqlite")
        self.keeper = LogKeeper(transport, KEYRING, self.engine, None, limit_bytes=limit_bytes)

    async def say(self, text: str, index: int, *, client: str = "c", queue: str = EXCHANGE) -> None:
        said = Event(1, EventKind.STDOUT, text, 0.0, 1, index)
        await self.send(client, encode(EventFrame(queue, client, "w", "f", (said,)), KEY))

    async def send(self, client: str, body: bytes) -> None:
        key = kept_output(client)
        await self.transport.publish(key, body, exchange=EXCHANGE, mandatory=False)

    async def kept(self, client: str = "c") -> list[str]:
        asked: dict[str, Any] = {"call": f"{client}-1"}
        answer: Any = await self.keeper.following.answer(asked, KEY)
        return [text for _, _, _, lines in answer["parts"] for _, _, text in lines]


@asynccontextmanager
async def lab(folder: Path, *, limit_bytes: int = 10**6) -> AsyncIterator[Lab]:
    transport = MemoryTransport(f"keeper-{next(_numbers)}")
    await transport.open()
    made = Lab(folder, transport, limit_bytes)
    yield made
    await made.keeper.stop()
    await transport.close()
    made.engine.dispose()


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_keeper, "_GATHER_S", 0.0)
    monkeypatch.setattr(log_keeper, "_TRY_AGAIN_S", 0.01)


async def test_what_cannot_be_read_is_left_out_and_the_rest_is_kept(tmp_path: Path) -> None:
    async with lab(tmp_path) as made:
        await made.keeper.start()
        await made.say("a", 0)
        await made.send("c", b"nonsense")
        await made.say("moved from elsewhere", 1, queue="another")
        await made.say("a name that no database takes", 0, client="c\0")
        await made.say("b", 1)
        await eventually(lambda: _is(made, ["a", "b"]), 10)


async def test_a_queue_that_is_down_with_its_node_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with lab(tmp_path) as made:
        declare, refusals = made.transport.declare, [1, 2, 3]

        async def refuse(*queues: Any) -> None:
            if refusals:
                refusals.pop()
                raise BrokerUnavailable("its node is down")
            await declare(*queues)

        monkeypatch.setattr(made.transport, "declare", refuse)
        await made.keeper.start()
        await eventually(lambda: _exists(made), 10)
        await made.say("a", 0)
        await eventually(lambda: _is(made, ["a"]), 10)


async def test_a_keeper_that_is_to_keep_nothing_does_not_listen(tmp_path: Path) -> None:
    async with lab(tmp_path, limit_bytes=0) as made:
        await made.keeper.start()
        assert not await _exists(made)


async def test_a_mistake_of_ours_is_told_and_loses_nothing_that_comes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with lab(tmp_path) as made:
        await made.keeper.start()
        told: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        with monkeypatch.context() as patch:
            patch.setattr(OpenLog, "add", lambda *_: 1 / 0)
            await made.say("a", 0)
            await eventually(lambda: told, 10)
        await made.say("b", 1)
        await eventually(lambda: _is(made, ["a", "b"]), 10)


async def _exists(made: Lab) -> bool:
    return await made.transport.depth(QUEUE.name) is not None


async def _is(made: Lab, lines: list[str]) -> bool:
    return await made.kept() == lines
