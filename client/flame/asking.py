"""A connection for questions alone, as commands use it: it is up sooner than a client.

Nothing that makes or carries calls is imported here, and the broker keeps nothing for it on disk.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, Final, Self, TypeVar

from flame.answers import Answers
from flame.clusters import Cluster, embedded_cluster
from flame.inquiry import Inquiry
from flame.questions import Questions
from flame.reaching import bounded, forget, reach
from flame_broker.config import Settings
from flame_broker.connect import open_transport
from flame_broker.topology import control_exchange, reply_queue
from flame_broker.transport import Consumer, Transport

__all__ = ["Asker"]

_ID_BYTES: Final = 5
_ANSWERS_AHEAD: Final = 512

T = TypeVar("T")


class Asker(Questions):
    """Asks a cluster from one thread; nothing runs between two questions.

    Where the broker knows exclusive queues, that of the answers goes with its connection. So a
    question whose connection was lost is put again on the next one.

    Args:
        settings: Which broker and key. With no broker the history of embedded clusters is asked.

    Raises:
        ConfigError: There is no key, or it or the broker's URL is malformed.

    Example:
        >>> with Asker(load()) as asker:
        ...     asker.calls(state="failed")
    """

    def __init__(self, settings: Settings) -> None:
        url, name = settings.broker_url, secrets.token_hex(_ID_BYTES)
        self._cluster: Cluster | None = None
        if url is None:
            self._cluster = embedded_cluster(works=False)
            url = self._cluster.url
        keyring = settings.keyring if self._cluster is None else self._cluster.keyring
        self._key_id = keyring.signer.hex_id
        self._transport: Transport = open_transport(url, name=f"flame client {name}")
        # SQS has no exclusive queues: there the queue is deleted at the end.
        exclusive = self._transport.capabilities.fanout
        self._queue = replace(reply_queue(self._key_id, name, 0), exclusive=exclusive)
        self._answers = Answers(keyring)
        self._inquiry = Inquiry(self._transport, keyring, self._answers, lambda: self._queue.name)
        self._consumer: Consumer | None = None
        self._lost: asyncio.Future[None] | None = None
        self._runner = asyncio.Runner()

    def __enter__(self) -> Self:
        """Connect.

        Raises:
            BrokerUnavailable: No broker answered within 10 s.
        """
        try:
            self._runner.run(self._open())
        except BaseException:  # Ctrl-C too; it goes on, and who did not connect leaves no loop
            self._runner.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._runner.run(self._close())
        self._runner.close()

    @property
    def key_id(self) -> str:
        """Which key signs, as queue names show it; it reveals nothing of the key."""
        return self._key_id

    @property
    def server(self) -> str:
        """What the broker says it is, such as ``RabbitMQ 4.0.5``."""
        return self._transport.server

    @property
    def reaches_workers(self) -> bool:
        """Whether workers can be asked and told; not on a broker without fan-out (SQS)."""
        return self._inquiry.reaches_workers

    def _ask(self, question: Callable[[Inquiry], Coroutine[None, None, T]]) -> T:
        return self._runner.run(self._put(question))

    async def _open(self) -> None:
        transport = self._transport
        async with bounded():
            if self._cluster is not None:
                await self._cluster.start()
            await reach(transport)
            transport.on_reconnect = self._reconnected
            if self.reaches_workers:
                await transport.declare_exchange(control_exchange(self._key_id), "fanout")
            await transport.declare(self._queue)
            self._consumer = await transport.consume(
                self._queue.name, self._answers.on_reply, prefetch=_ANSWERS_AHEAD
            )

    async def _put(self, question: Callable[[Inquiry], Coroutine[None, None, T]]) -> T:
        loop = asyncio.get_running_loop()
        while True:
            self._lost = loop.create_future()
            asked = loop.create_task(question(self._inquiry))
            ends: set[asyncio.Future[Any]] = {asked, self._lost}
            try:
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                if asked.done():
                    return asked.result()
            finally:
                asked.cancel()

    def _reconnected(self) -> None:
        """An answer may have come while there was no queue for it."""
        if self._lost is not None and not self._lost.done():
            self._lost.set_result(None)

    async def _close(self) -> None:
        if self._consumer is not None and not self._queue.exclusive and self._transport.connected:
            await forget(self._transport, self._consumer, self._queue.name)
        await self._transport.close()
        if self._cluster is not None:
            await self._cluster.stop()
