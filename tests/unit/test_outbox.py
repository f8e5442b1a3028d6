"""Results find their way, or the ledger; output leaves in frames that its reader takes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from flame_broker.frames import open_frame
from flame_broker.messages import Event, EventFrame, EventKind, ResultFrame
from flame_broker.topology import (
    custody_queue,
    ledger_queue,
    logs_exchange,
    logs_queue,
    reply_queue,
)
from flame_broker.transport import Delivery
from flame_worker import outbox
from flame_worker.telling import Voice
from lab.bench import KEYRING, bench, frame_of
from lab.wait import eventually

KEY = KEYRING.signer


async def test_results_of_a_client_that_is_gone_go_to_the_ledger_and_settle(tmp_path: Path) -> None:
    async with bench(tmp_path) as lab:
        for reply in ("flame.v1.nobody", "x" * 300):
            await lab.submit(frame_of([1], reply=reply))
        for _ in range(2):
            await eventually(lambda: lab.slots[0].batches, 5)
            lab.slots[0].finish()
        await eventually(lambda: not lab.intake.held, 5)
        ledger: list[Delivery] = []
        await lab.broker.consume(ledger_queue(KEY.hex_id).name, ledger.append, prefetch=0)
        await eventually(lambda: len(ledger) == 2, 5)
        for delivery in ledger:
            record = open_frame(delivery.body, KEYRING, queue=delivery.queue).frame
            assert isinstance(record, ResultFrame)
            assert [result.counter for result in record.results] == [1]


async def test_only_the_first_result_waits_for_a_client_to_make_its_queue_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path) as lab:
        await lab.submit(frame_of([1], reply="flame.v1.nobody"))
        await eventually(lambda: lab.slots[0].batches, 5)
        lab.slots[0].finish()
        await eventually(lambda: not lab.intake.held, 5)
        monkeypatch.setattr(outbox, "_REPLY_AGAIN_S", 60)
        await lab.submit(frame_of([2], reply="flame.v1.nobody"))
        await eventually(lambda: lab.slots[0].batches, 5)
        lab.slots[0].finish()
        await eventually(lambda: not lab.intake.held, 5)
        assert await lab.depth(ledger_queue(KEY.hex_id).name) == 2


async def test_after_a_reconnect_results_wait_for_a_client_that_is_slower_to_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "_REPLY_AGAIN_S", 0.01)
    reply = reply_queue(KEY.hex_id, "slow", 0)
    async with bench(tmp_path) as lab:
        lab.outbox.reconnected()
        returned: list[str] = []
        publish = lab.transport.publish

        def count(queue: str, *args: Any, **options: Any) -> Any:
            returned.append(queue)
            return publish(queue, *args, **options)

        monkeypatch.setattr(lab.transport, "publish", count)
        await lab.submit(frame_of([1], reply=reply.name))
        await eventually(lambda: lab.slots[0].batches, 5)
        lab.slots[0].finish()
        await eventually(lambda: returned.count(reply.name) > 3, 5)
        await lab.broker.declare(reply)
        await eventually(lambda: not lab.intake.held, 5)
        assert await lab.depth(reply.name) == 1


async def test_a_flood_of_output_leaves_in_frames_that_are_not_refused(tmp_path: Path) -> None:
    async with bench(tmp_path) as lab:
        await lab.broker.declare_exchange(logs_exchange(KEY.hex_id), "topic")
        queue = logs_queue(KEY.hex_id, "c0")
        await lab.broker.declare(queue)
        found: list[Delivery] = []
        await lab.broker.consume(queue.name, found.append, prefetch=0)
        for _ in range(100):
            lab.outbox.event(Voice(KEY, "c0"), Event(1, EventKind.STDOUT, "x" * 64 * 1024))
        lines: list[Event] = []

        def all_read() -> bool:
            while found:
                frame = open_frame(found.pop().body, KEYRING).frame
                assert isinstance(frame, EventFrame)
                lines.extend(frame.events)
            return len(lines) == 100

        await eventually(all_read, 5)


async def test_while_the_broker_lets_nothing_leave_slots_go_on_and_nothing_is_handed_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path) as lab:
        publish, blocked = lab.transport.publish, [True]

        async def when_it_flows(queue: str, body: bytes, options: dict[str, Any]) -> None:
            await eventually(lambda: not blocked[0], 30)
            await publish(queue, body, **options)

        def wait(queue: str, body: bytes, **options: Any) -> asyncio.Future[None]:
            return asyncio.ensure_future(when_it_flows(queue, body, options))

        monkeypatch.setattr(lab.transport, "publish", wait)
        await lab.submit(frame_of([1]), frame_of([2, 3]), *(frame_of([n]) for n in range(4, 40)))
        for done in range(39):
            await eventually(lambda: len(lab.slots[0].started) > done, 5)  # noqa: B023
            if done == 1:
                await eventually(lambda: lab.outbox.stalled and lab.slots[0].revoked, 5)
            lab.slots[0].finish()
        assert lab.intake.held == 38
        blocked[0] = False
        await lab.settled(39)
        assert lab.slots[0].started == [*range(1, 40)]


async def test_results_of_two_clients_or_attempts_never_share_a_frame(tmp_path: Path) -> None:
    async with bench(tmp_path, slots=3) as lab:
        reply = custody_queue(KEY.hex_id).name
        await lab.broker.declare(custody_queue(KEY.hex_id))
        took: list[Delivery] = []
        await lab.broker.consume(reply, took.append, prefetch=0)
        for circumstances in ({}, {"attempt": 2}, {"client": "c1"}):
            await lab.submit(frame_of([1], reply=reply, **circumstances))
        await eventually(lambda: all(slot.batches for slot in lab.slots), 5)
        for slot in lab.slots:
            slot.finish()
        await eventually(lambda: len(took) == 3, 5)
        frames = [open_frame(d.body, KEYRING, queue=d.queue).frame for d in took]
        found = {(f.client, f.attempt) for f in frames if isinstance(f, ResultFrame)}
        assert found == {("c0", 1), ("c0", 2), ("c1", 1)}


async def test_what_comes_after_the_end_is_left_to_others_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as a call whose code was still on its way here: it is not acked."""
    async with bench(tmp_path) as lab:
        await lab.submit(frame_of([1]))
        await eventually(lambda: lab.intake.held, 5)
        (holding,) = lab.intake.holdings()
        lab.outbox.close()
        await lab.transport.close()
        lab.outbox.hand_back(holding, [*holding.frame.calls])
        await lab.outbox.drain(timeout_s=5)
        await asyncio.sleep(0)
        assert lab.intake.held == 1
        assert not caplog.records
