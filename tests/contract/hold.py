"""A consumer in a process of its own, to be killed: takes one message and keeps it."""

from __future__ import annotations

import asyncio
import sys

from flame_broker.connect import open_transport
from flame_broker.transport import Delivery


async def hold(url: str, queue: str) -> None:
    transport = open_transport(url, name="holder")
    await transport.open()
    await transport.consume(queue, _show, prefetch=1)
    await asyncio.Event().wait()


def _show(delivery: Delivery) -> None:
    print("holding", bytes(delivery.body).decode(), flush=True)


if __name__ == "__main__":
    asyncio.run(hold(*sys.argv[1:]))
