"""An orchestrator whose database refuses says so by its silence, and workers do not wait for it."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from itertools import count
from pathlib import Path

import pytest

from flame_broker.frames import encode, open_frame
from flame_broker.keys import Keyring
from flame_broker.memory import MemoryTransport
from flame_broker.messages import Call, CallFrame, CallSpec, Claim, ControlFrame, Target
from flame_broker.topology import beats_queue, control_queue, custody_queue
from flame_broker.transport import Delivery
from flame_orchestrator import database, leases
from flame_orchestrator.daemon import Orchestrator, OrchestratorSettings
from lab.bench import KEYRING
from lab.wait import eventually

KEY = KEYRING.signer
_numbers = count()


class Listener:
    """Hears what orchestrators say, in a worker's place."""

    def __init__(self, broker: str) -> None:
        self.transport = MemoryTransport(broker)
        self.said: list[str] = []
        self.answers: list[ControlFrame] = []

    async def start(self) -> None:
        await self.transport.open()
        for ear in (beats_queue(KEY.hex_id, "test"), control_queue(KEY.hex_id, "w")):
            await self.transport.declare(ear)
            await self.transport.consume(ear.name, self._hear, prefetch=0)

    def _hear(self, delivery: Delivery) -> None:
        delivery.ack()
        frame = open_frame(delivery.body, Keyring([KEY])).frame
        assert isinstance(frame, ControlFrame)
        self.said.append(frame.verb)
        if frame.verb == "leased":
            self.answers.append(frame)

    def silent_for(self, beats: int) -> bool:
        """Whether that many heartbeats have come since it was last said that somebody leads."""
        return self.said[-beats:] == ["beat"] * beats

    async def claim(self) -> None:
        queue = custody_queue(KEY.hex_id).name
        frame = CallFrame("calls", "reply.c", "c", CallSpec(Target("m:f")), (Call(1, b""),))
        ear = control_queue(KEY.hex_id, "w").name
        await self.transport.publish(queue, encode(Claim(queue, frame, "w/1", "w", ear), KEY))


@pytest.fixture
async def listener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Listener]:
    """Beside an orchestrator that has its database in this folder."""
    monkeypatch.setattr(database, "_LOCK_WAIT_MS", 20)
    monkeypatch.setattr(leases, "ECHO_EVERY_S", 0.01)
    broker = f"writable-{next(_numbers)}"
    heard = Listener(broker)
    orchestrator = Orchestrator(
        OrchestratorSettings(
            broker_url=f"memory://{broker}",
            keyring=KEYRING,
            database_url=f"sqlite:///{tmp_path}/ledger.sqlite",
        )
    )
    await orchestrator.start()
    await heard.start()
    yield heard
    await orchestrator.stop()
    await heard.transport.close()


async def test_claims_are_waited_for_only_while_they_can_be_written_down(
    listener: Listener, tmp_path: Path
) -> None:
    await eventually(lambda: "leads" in listener.said, 10)
    other = sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    await listener.claim()
    await eventually(lambda: listener.silent_for(20), 10)
    assert not listener.answers
    other.execute("ROLLBACK")
    other.close()
    await eventually(lambda: listener.answers, 10)
    assert listener.answers[0].arguments["granted"] == (1,)
    listener.said.clear()
    await eventually(lambda: "leads" in listener.said, 10)
