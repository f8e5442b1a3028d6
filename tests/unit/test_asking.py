"""A connection for questions alone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from flame.asking import Asker
from flame.errors import BrokerUnavailable, NoOrchestrator
from flame.inquiry import Inquiry
from flame_broker.config import Settings, load
from flame_broker.connect import open_transport
from lab.fake_worker import FakeWorker


@pytest.fixture
def settings(worker: FakeWorker) -> Settings:
    return load(broker=worker.url, key=worker.key_text)


@pytest.fixture
def asker(settings: Settings) -> Iterator[Asker]:
    with Asker(settings) as made:
        yield made


async def depth(url: str, queue: str) -> int | None:
    transport = open_transport(url, name="test")
    await transport.open()
    try:
        return await transport.depth(queue)
    finally:
        await transport.close()


def test_it_is_answered_as_a_client_is(asker: Asker, worker: FakeWorker) -> None:
    assert [facts["worker"] for facts in asker.workers(0.3)] == ["fake"]
    assert 0 < asker.ping_broker() < 5
    assert asker.server == "broker in this process"
    assert asker.reaches_workers
    assert asker.key_id == worker.keyring.signer.hex_id
    with pytest.raises(NoOrchestrator, match="start `flame-orchestrator`"):
        asker.calls()
    with pytest.raises(ValueError, match="not a call id"):
        asker.story("nonsense")


def test_its_queue_goes_with_its_connection(settings: Settings, worker: FakeWorker) -> None:
    with Asker(settings) as asker:
        (own,) = [found.name for found in asker.queues() if found.kind == "replies"]
        assert asyncio.run(depth(worker.url, own)) == 0
    assert asyncio.run(depth(worker.url, own)) is None


def test_a_question_whose_connection_was_lost_is_put_again(asker: Asker) -> None:
    times = 0

    async def question(inquiry: Inquiry) -> int:
        nonlocal times
        times += 1
        if times == 1:
            assert asker._transport.on_reconnect is not None
            asker._transport.on_reconnect()
            await asyncio.Event().wait()
        return times

    assert asker._ask(question) == 2


def test_a_broker_that_falls_silent_is_not_waited_for_for_ever(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def declare(*_: Any) -> None:
        await asyncio.Event().wait()

    asker = Asker(settings)
    monkeypatch.setattr(asker._transport, "declare", declare)
    monkeypatch.setattr("flame.reaching._SILENCE_S", 0.01)
    with pytest.raises(BrokerUnavailable, match="fell silent"), asker:
        pass


def test_with_no_broker_the_history_of_embedded_clusters_is_asked_and_no_worker_started(
    settings: Settings,
) -> None:
    with Asker(replace(settings, broker_url=None)) as asker:
        assert asker.calls(label="nobody made such calls") == []
        assert asker.workers(0.1) == []
