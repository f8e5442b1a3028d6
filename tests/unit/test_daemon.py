"""The daemon's chores outlive trouble, and a start that fails leaves nothing behind."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from itertools import count
from pathlib import Path

import pytest

from flame_broker.errors import BrokerUnavailable, WorkerLost
from flame_broker.frames import encode
from flame_broker.memory import MemoryTransport
from flame_broker.messages import ControlFrame
from flame_broker.resources import Capacity
from flame_broker.topology import control_exchange
from flame_broker.transport import QueueSpec
from flame_worker import bridge, command, daemon
from flame_worker.daemon import Worker, WorkerSettings
from flame_worker.pool import SlotPool
from lab.bench import KEYRING
from lab.wait import eventually

_numbers = count()


class Flaky(MemoryTransport):
    """Refuses questions and declarations so many times."""

    refusals = 0
    asked = 0

    async def depth(self, queue: str) -> int | None:
        self._refuse()
        return await super().depth(queue)

    async def declare(self, *queues: QueueSpec) -> None:
        self._refuse()
        await super().declare(*queues)

    def _refuse(self) -> None:
        self.asked += 1
        if self.refusals:
            self.refusals -= 1
            raise BrokerUnavailable("not now")


@pytest.fixture
def url() -> str:
    return f"memory://daemon-{next(_numbers)}"


@pytest.fixture
def transport(url: str) -> Flaky:
    return Flaky(url.removeprefix("memory://"))


@pytest.fixture
async def worker(
    url: str, transport: Flaky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Worker]:
    """A worker that has no room for anything."""
    for name in ("_LOOK_EVERY_S", "_HEALTH_EVERY_S", "_TRY_AGAIN_S"):
        monkeypatch.setattr(daemon, name, 0.01)
    settings = WorkerSettings(
        broker_url=url,
        keyring=KEYRING,
        home=tmp_path,
        slots=0,
        capacity=Capacity(0, 2**34, 0),
        health_file=tmp_path / "later" / "health",
    )
    made = Worker(settings, transport=transport)
    await made.start()
    yield made
    await made.stop()


async def test_a_broker_that_did_not_answer_once_is_asked_again(
    worker: Worker, transport: Flaky
) -> None:
    transport.refusals, before = 3, transport.asked
    await eventually(lambda: transport.asked > before + 5, 5)


async def test_the_health_file_is_written_once_its_folder_is_there(
    worker: Worker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await eventually(lambda: "worker.health_file_failed" in caplog.text, 5)
    (tmp_path / "later").mkdir()
    await eventually((tmp_path / "later" / "health").exists, 5)


async def test_a_class_that_could_not_be_declared_is_tried_again(
    url: str, transport: Flaky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "_TRY_AGAIN_S", 0.01)
    settings = WorkerSettings(
        broker_url=url, keyring=KEYRING, home=tmp_path, slots=0, capacity=Capacity(2, 2**34, 0)
    )
    worker = Worker(settings, transport=transport)
    await worker.start()
    transport.refusals = 2
    exchange = control_exchange(KEYRING.signer.hex_id)
    frame = ControlFrame(exchange, "class", {"name": "c2", "pool": "default"})
    for _ in range(2):  # it may be announced twice
        await transport.publish("", encode(frame, KEYRING.signer), exchange=exchange)
    known = f"flame.v1.{KEYRING.signer.hex_id}.default.c2.normal"
    await eventually(lambda: known in transport._broker.queues, 5)
    await eventually(lambda: len(transport._broker.queues[known].ready) == 1, 5)
    await worker.stop()


async def test_a_start_that_fails_leaves_no_folders_behind(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(_self: SlotPool, _slots: int) -> None:
        raise WorkerLost("no child started")

    monkeypatch.setattr(SlotPool, "start", refuse)
    temporary = Path(tempfile.mkdtemp(dir="/tmp"))  # a socket's path must be short
    monkeypatch.setattr(bridge.tempfile, "gettempdir", lambda: str(temporary))
    told: list[str] = []
    monkeypatch.setattr(daemon._log, "info", lambda event, **_: told.append(event))
    settings = WorkerSettings(broker_url=url, keyring=KEYRING, home=tmp_path, slots=1)
    with pytest.raises(WorkerLost):
        await command._serve(settings)
    assert told == ["worker.connecting"]  # what has not started does not stop
    temporary.rmdir()  # it is empty
    assert list((tmp_path / "spool").iterdir()) == []


async def test_a_worker_without_a_store_says_so_when_it_starts(
    url: str, transport: Flaky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: dict[str, str] = {}
    monkeypatch.setattr(daemon._log, "warning", lambda event, **f: warnings.update({event: str(f)}))
    settings = WorkerSettings(
        broker_url=url, keyring=KEYRING, home=tmp_path, slots=0, capacity=Capacity(0, 2**34, 0)
    )
    worker = Worker(settings, transport=transport)
    await worker.start()
    assert "FLAME_STORE_URL" in warnings["worker.no_store"]
    assert worker._facts()["store"] == ""
    await worker.stop()
