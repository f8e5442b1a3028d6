"""Calls are queued when they are due: packed, once, and again if the broker did not take them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from time import time
from typing import Any

import pytest

from flame_broker.errors import BrokerUnavailable
from flame_broker.frames import encode, identity, open_frame
from flame_broker.memory import MemoryTransport
from flame_broker.messages import (
    FRAME_CALLS,
    Call,
    CallFrame,
    CallSpec,
    ControlFrame,
    Deposit,
    Target,
)
from flame_broker.topology import calls_queue, custody_queue
from flame_orchestrator.custody import Custody
from flame_orchestrator.database import open_database
from flame_orchestrator.ledger import Ledger
from flame_orchestrator.letters import Letter
from flame_orchestrator.timekeeper import Timekeeper
from lab.bench import KEYRING
from lab.wait import eventually

KEY = KEYRING.signer
CUSTODY = custody_queue(KEY.hex_id).name
CALLS = calls_queue(KEY.hex_id, "default", "c1")


class Clockwork:
    """A timekeeper with its custody, and the frames that have reached the calls queue."""

    def __init__(self, folder: Path) -> None:
        engine = open_database(f"sqlite:///{folder}/ledger.sqlite")
        self.custody = Custody(engine, Ledger(engine), KEY)
        self.epoch: int | None = self.custody.lead("us")
        self.transport = MemoryTransport(folder.name)
        self.frames: list[CallFrame] = []
        self.fenced: list[str] = []
        self.timekeeper = Timekeeper(
            self.transport,
            KEY,
            self.custody,
            self._in_thread,
            lambda: self.epoch,
            self.fenced.append,
        )

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        return await asyncio.to_thread(work)

    def deposit(
        self,
        *counters: int,
        due: float = 0.0,
        client: str = "c",
        epoch: int | None = None,
        queue_timeout_s: float = 0.0,
    ) -> None:
        """Calls arrive, at us or at the leader of a later epoch."""
        calls = tuple(Call(counter, b"") for counter in counters)
        frame = CallFrame(CALLS.name, "reply", client, CallSpec(Target("m:f")), calls)
        dues, keys = (due,) * len(calls), ("",) * len(calls)
        frame_and_terms = Deposit(CUSTODY, frame, dues, keys, queue_timeout_s=queue_timeout_s)
        letter = Letter(frame_and_terms, identity(encode(frame_and_terms, KEY)))
        leader = epoch or self.epoch
        assert leader is not None
        self.custody.record(leader, [letter])
        self.timekeeper.look()

    @property
    def started(self) -> list[tuple[str, int]]:
        """The calls that have reached their queue."""
        return [(frame.client, call.counter) for frame in self.frames for call in frame.calls]


@asynccontextmanager
async def clockwork(folder: Path) -> AsyncIterator[Clockwork]:
    made = Clockwork(folder)
    await made.transport.open()
    await made.transport.declare(CALLS)

    def arrived(delivery: Any) -> None:
        frame = open_frame(delivery.body, KEYRING, queue=CALLS.name).frame
        assert isinstance(frame, CallFrame)
        made.frames.append(frame)
        delivery.ack()

    await made.transport.consume(CALLS.name, arrived, prefetch=0)
    tasks = [
        asyncio.ensure_future(work()) for work in (made.timekeeper.load, made.timekeeper.start)
    ]
    try:
        yield made
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await made.transport.close()


async def test_calls_that_are_due_together_share_frames_and_answer_to_the_custodian(
    tmp_path: Path,
) -> None:
    async with clockwork(tmp_path) as works:
        works.deposit(*range(1, 101))
        works.deposit(7, client="d")
        await eventually(lambda: len(works.started) >= 101, 10)
        assert sorted(works.started) == sorted([("c", n) for n in range(1, 101)] + [("d", 7)])
        assert len(works.frames) == 3
        assert {len(frame.calls) for frame in works.frames} == {FRAME_CALLS, 100 - FRAME_CALLS, 1}
        assert {frame.reply for frame in works.frames} == {CUSTODY}
        assert not any(frame.spec.track for frame in works.frames)


async def test_calls_that_are_due_within_a_moment_share_frames(tmp_path: Path) -> None:
    async with clockwork(tmp_path) as works:
        first = time() + 3
        for number in range(100):
            works.deposit(number, due=first + number / 1000)
        await eventually(lambda: len(works.started) >= 100, 10)
        assert sorted(works.started) == [("c", number) for number in range(100)]
        assert len(works.frames) <= 20


async def test_a_call_starts_when_it_is_due_and_one_that_has_ended_meanwhile_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [time()]  # it stands still until the test moves it
    for module in ("session", "timekeeper"):
        monkeypatch.setattr(f"flame_orchestrator.{module}.time", lambda: now[0])
    async with clockwork(tmp_path) as works:
        works.deposit(1, 2, due=now[0] + 0.4)
        works.deposit(3)
        await eventually(lambda: works.started == [("c", 3)], 10)
        await eventually(lambda: len(works.timekeeper._soon) == 2, 10)
        works.timekeeper.look({"c": {1}})
        assert works.started == [("c", 3)]
        now[0] += 0.5
        await eventually(lambda: works.started == [("c", 3), ("c", 2)], 10)


async def test_a_call_that_the_broker_did_not_take_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with clockwork(tmp_path) as works:
        publish, refused = works.transport.publish, list[str]()

        def refuse(queue: str, body: bytes, **options: Any) -> asyncio.Future[None]:
            if refused:
                return publish(queue, body, **options)
            refused.append(queue)
            failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            failed.set_exception(BrokerUnavailable("not now"))
            return failed

        monkeypatch.setattr(works.transport, "publish", refuse)
        works.deposit(1)
        await eventually(lambda: works.started == [("c", 1)], 10)
        assert refused == [CALLS.name]


async def test_a_queue_that_was_deleted_is_made_again(tmp_path: Path) -> None:
    async with clockwork(tmp_path) as works:
        await works.transport.delete(CALLS.name)
        works.deposit(1)
        await eventually(lambda: works.custody.due(time(), 10) == [], 10)
        assert await works.transport.depth(CALLS.name) == 1


async def test_whoever_is_fenced_says_so_and_starts_nothing_more(tmp_path: Path) -> None:
    async with clockwork(tmp_path) as works:
        works.deposit(1)
        works.custody.lead("another")
        await eventually(lambda: bool(works.fenced), 10)


async def test_who_was_overtaken_without_hearing_of_it_starts_nothing_of_his_successor(
    tmp_path: Path,
) -> None:
    async with clockwork(tmp_path) as works:
        works.deposit(1, epoch=works.custody.lead("another"))
        await eventually(lambda: bool(works.fenced), 10)
        assert works.started == []


async def test_a_call_that_no_worker_has_taken_in_its_time_is_reported_to_the_custodian(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_LATE_S", "_LOOK_EVERY_S"):
        monkeypatch.setattr(f"flame_orchestrator.timekeeper.{name}", 0.05)
    async with clockwork(tmp_path) as works:
        letters: list[ControlFrame] = []

        def arrived(delivery: Any) -> None:
            frame = open_frame(delivery.body, KEYRING, queue=CUSTODY).frame
            assert isinstance(frame, ControlFrame)
            letters.append(frame)
            delivery.ack()

        await works.transport.declare(custody_queue(KEY.hex_id))
        await works.transport.consume(CUSTODY, arrived, prefetch=0)
        ending = asyncio.ensure_future(works.timekeeper.give_up_late())
        works.deposit(1, queue_timeout_s=0.001)
        works.deposit(2, queue_timeout_s=3600.0)
        await eventually(lambda: letters != [], 10)
        assert (letters[0].verb, letters[0].arguments) == (
            "late", {"client": "c", "counters": (1,), "attempt": 1}
        )  # fmt: skip
        assert sorted(works.started) == [("c", 1), ("c", 2)]
        ending.cancel()
