"""A consumer in a process of its own, to be killed: writes down each message, then acks it."""

from __future__ import annotations

import asyncio
import sys

from flame_broker.connect import open_transport
from flame_broker.transport import Delivery


async def eat(url: str, queue: str) -> None:
    transport = open_transport(url, name="eater")
    await transport.open()
    await transport.consume(queue, _eat, prefetch=8)
    await asyncio.Event().wait()


def _eat(delivery: Delivery) -> None:
    print(bytes(delivery.body).decode(), flush=True)
    delivery.ack()


if __name__ == "__main__":
    asyncio.run(eat(*sys.argv[1:]))
