"""How much waits in the queues of a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from flame_broker.errors import FlameError
from flame_broker.frames import open_frame
from flame_broker.keys import Keyring
from flame_broker.messages import ControlFrame, Priority
from flame_broker.resources import DEFAULT_CLASS
from flame_broker.topology import (
    calls_queue,
    classes_queue,
    custody_queue,
    dead_queue,
    kept_logs_queue,
    ledger_queue,
    parked_queue,
    suspects_queue,
)
from flame_broker.transport import Delivery, QueueSpec, Transport

__all__ = ["QueueDepth", "depths"]

_STREAM_QUIET_S: Final = 0.3
_STREAM_AHEAD: Final = 500


@dataclass(frozen=True, slots=True)
class QueueDepth:
    """How much waits in one queue.

    Attributes:
        pool: The pool that it belongs to; ``""`` for the queues of a whole key or client.
        kind: ``calls``, ``suspects``, ``dead``, ``parked``, ``ledger``, ``custody``, ``logs`` or
            ``replies``.
        resources: The resource class of calls.
        priority: The priority of calls.
        messages: Messages that nobody has taken yet; one may hold up to 256 calls.
        name: The queue, as the broker knows it.
    """

    pool: str
    kind: str
    resources: str
    priority: str
    messages: int
    name: str


async def depths(
    transport: Transport, keyring: Keyring, pools: Sequence[str], reply_queue: str
) -> list[QueueDepth]:
    """How much waits in the queues of these pools and in our own; those that exist.

    Args:
        transport: Where the cluster is.
        keyring: The first key names the queues; all vouch for what was announced.
        pools: Which pools.
        reply_queue: Where our own answers come to.
    """
    key_id, found = keyring.signer.hex_id, list[QueueDepth]()

    async def count(spec: QueueSpec, kind: str, *place: str) -> None:
        depth = await transport.depth(spec.name)
        if depth is not None:
            pool, resources, priority = (*place, "", "", "")[:3]
            found.append(QueueDepth(pool, kind, resources, priority, depth, spec.name))

    for pool in pools:
        for name in await _classes(transport, keyring, pool):
            for level in Priority:
                queue = calls_queue(key_id, pool, name, level)
                await count(queue, "calls", pool, name, level.value)
        await count(suspects_queue(key_id, pool), "suspects", pool)
        await count(dead_queue(key_id, pool), "dead", pool)
        await count(parked_queue(key_id, pool), "parked", pool)
    await count(ledger_queue(key_id), "ledger")
    await count(custody_queue(key_id), "custody")
    await count(kept_logs_queue(key_id), "logs")
    await count(QueueSpec(reply_queue), "replies")
    return found


async def _classes(transport: Transport, keyring: Keyring, pool: str) -> list[str]:
    """The resource classes that were announced in a pool, the default one first."""
    stream = classes_queue(keyring.signer.hex_id, pool)
    names = {DEFAULT_CLASS: None}
    if not transport.capabilities.streams:
        return [*names]
    if await transport.depth(stream.name) is None:
        return [*names]
    # A stream has no end that could be asked for: silence is the end.
    fresh = asyncio.Event()
    await transport.declare(stream)
    consumer = await transport.consume(
        stream.name, partial(_note_class, keyring, names, fresh), prefetch=_STREAM_AHEAD
    )
    while await _heard(fresh):
        fresh.clear()
    await consumer.cancel()
    return [*names]


def _note_class(
    keyring: Keyring, names: dict[str, None], fresh: asyncio.Event, delivery: Delivery
) -> None:
    delivery.ack()
    fresh.set()
    try:
        frame, _ = open_frame(delivery.body, keyring, queue=delivery.queue)
    except FlameError:
        return  # workers say so in their logs; here it is merely no class
    if isinstance(frame, ControlFrame) and frame.verb == "class":
        names[str(frame.arguments.get("name"))] = None


async def _heard(fresh: asyncio.Event) -> bool:
    try:
        async with asyncio.timeout(_STREAM_QUIET_S):
            await fresh.wait()
    except TimeoutError:
        return False
    return True
