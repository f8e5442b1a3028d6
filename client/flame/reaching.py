"""Reaching the broker for the first time, and leaving it: how long that may take."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from flame_broker.errors import BrokerUnavailable, FlameError
from flame_broker.logs import get_logger
from flame_broker.transport import Consumer, Transport

__all__ = ["bounded", "forget", "reach"]

_CONNECT_DEADLINE_S: Final = 10.0
_SILENCE_S: Final = _CONNECT_DEADLINE_S + 5
_GOODBYE_S: Final = 2.0

_log = get_logger("flame.client")


@asynccontextmanager
async def bounded() -> AsyncIterator[None]:
    """Bound all that is needed before a connection can be used.

    Raises:
        BrokerUnavailable: It was not done in 15 s.
    """
    try:
        async with asyncio.timeout(_SILENCE_S):
            yield
    except TimeoutError as exc:
        raise BrokerUnavailable("the broker accepted us and then fell silent") from exc


async def reach(transport: Transport) -> None:
    """Open a transport, and say what its broker lacks.

    Raises:
        BrokerUnavailable: No broker answered within 10 s.
    """
    await transport.open(deadline_s=_CONNECT_DEADLINE_S)
    if not transport.capabilities.fanout:
        _log.warning(
            "broker.no_fanout",
            broker=transport.server,
            reason="no remote output, remote cancel or `flame workers` with this broker",
        )


async def forget(transport: Transport, consumer: Consumer, queue: str) -> None:
    """Delete our reply queue: what comes from now on must not wait where nobody reads."""
    try:
        async with asyncio.timeout(_GOODBYE_S):
            await consumer.cancel()
            await transport.delete(queue)
    except (FlameError, TimeoutError) as exc:
        _log.info("reply_queue.not_deleted", reason=str(exc))
