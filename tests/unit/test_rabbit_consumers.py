"""Consumers that the broker refuses at first."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from flame_broker.errors import BrokerUnavailable
from flame_broker.rabbit.channel import ChannelRefused
from flame_broker.rabbit.consumer import Consumers, RabbitConsumer
from flame_broker.rabbit.topology import Topology
from flame_broker.transport import QueueMismatch

TOO_EARLY = ChannelRefused(
    406, "PRECONDITION_FAILED - stream queue 's' does not have a running replica on the local node"
)
OTHERWISE = ChannelRefused(406, "PRECONDITION_FAILED - consumer prefetch count is not set")


def consumers(
    monkeypatch: pytest.MonkeyPatch, refusals: Iterator[ChannelRefused | None]
) -> Consumers:
    """Consumers of a broker that refuses so often."""
    up = asyncio.Event()
    up.set()

    async def start(_: Consumers, consumer: RabbitConsumer) -> None:
        if (refused := next(refusals)) is not None:
            raise refused

    monkeypatch.setattr(Consumers, "_start", start)
    return Consumers(up, Topology(up, lambda: "no trouble"), lambda: None)


async def test_a_stream_that_the_broker_still_starts_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broker = consumers(monkeypatch, iter([TOO_EARLY, TOO_EARLY, None]))
    consumer = await broker.consume("s", lambda _: None, 10, deadline_s=30)
    assert not consumer.cancelled


async def test_a_stream_that_is_never_served_is_no_wrong_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broker = consumers(monkeypatch, iter(lambda: TOO_EARLY, None))
    with pytest.raises(BrokerUnavailable, match="cannot consume"):
        await broker.consume("s", lambda _: None, 10, deadline_s=0.2)


async def test_another_refusal_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    broker = consumers(monkeypatch, iter([OTHERWISE]))
    with pytest.raises(QueueMismatch, match="prefetch"):
        await broker.consume("s", lambda _: None, 10, deadline_s=30)
