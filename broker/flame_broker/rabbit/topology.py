"""What was declared, on a channel where a refusal hurts nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, TypeVar

from flame_broker.errors import BrokerUnavailable, ConfigError
from flame_broker.logs import get_logger
from flame_broker.rabbit.channel import ChannelGone, ChannelRefused, RabbitChannel
from flame_broker.rabbit.connection import Connection
from flame_broker.transport import QueueKind, QueueMismatch, QueueSpec

__all__ = ["Topology", "refusal"]

ACCESS_REFUSED: Final = 403
NOT_FOUND: Final = 404
LOCKED: Final = 405

_T = TypeVar("_T")
_log = get_logger("flame.broker")


class Topology:
    """Exchanges and queues that this transport declared, and the channel that declares them.

    The broker answers a wrong declare by closing its channel, so a channel is kept for these alone.
    """

    def __init__(self, up: asyncio.Event, trouble: Callable[[], str]) -> None:
        self._up = up
        self._trouble = trouble
        self._exchanges: dict[str, str] = {}
        self._queues: dict[str, QueueSpec] = {}
        self._connection: Connection | None = None
        self._channel: RabbitChannel | None = None
        self._turn = asyncio.Lock()

    def kind_of(self, queue: str) -> QueueKind | None:
        """The kind of a queue that was declared here."""
        spec = self._queues.get(queue)
        return spec.kind if spec else None

    async def restore(self, connection: Connection) -> None:
        """Declare everything again on a new connection.

        Raises:
            ChannelGone: The connection was lost meanwhile.
            ChannelRefused: A queue is still locked by our previous connection; try again.
        """
        self._connection, self._channel = connection, None
        for name, kind in self._exchanges.items():
            await self._redo(name, partial(_exchange, name=name, kind=kind))
        for spec in tuple(self._queues.values()):
            await self._redo(spec.name, partial(_queue, spec=spec))

    async def declare(self, spec: QueueSpec, deadline_s: float) -> None:
        """Declare a queue with its bindings, and remember it."""
        await self.run(partial(_queue, spec=spec), deadline_s)
        self._queues[spec.name] = spec

    async def redeclare(self, queue: str) -> None:
        """Declare one queue again, if it was declared here: it was deleted under its consumer."""
        if spec := self._queues.get(queue):
            await self._redo(queue, partial(_queue, spec=spec))

    async def declare_exchange(self, name: str, kind: str, deadline_s: float) -> None:
        """Declare a durable exchange, and remember it."""
        await self.run(partial(_exchange, name=name, kind=kind), deadline_s)
        self._exchanges[name] = kind

    async def delete(self, queue: str, deadline_s: float) -> None:
        """Delete a queue and forget it."""
        self._queues.pop(queue, None)
        await self.run(lambda channel: channel.call(channel.raw.queue_delete, queue), deadline_s)

    async def depth(self, queue: str, deadline_s: float) -> int | None:
        """Messages ready in a queue; None if there is no such queue."""

        async def ask(channel: RabbitChannel) -> int | None:
            try:
                answer = await channel.call(channel.raw.queue_declare, queue, passive=True)
            except ChannelRefused as exc:
                if exc.code == NOT_FOUND:
                    return None
                raise
            return int(answer.message_count)

        return await self.run(ask, deadline_s)

    async def run(
        self, operation: Callable[[RabbitChannel], Awaitable[_T]], deadline_s: float
    ) -> _T:
        """Run an idempotent operation, on the next connection again if this one is lost.

        Raises:
            BrokerUnavailable: Not done within the deadline.
            QueueMismatch: The broker refused it.
        """
        try:
            async with asyncio.timeout(deadline_s):
                while True:
                    await self._up.wait()
                    try:
                        return await self._attempt(operation)
                    except ChannelGone:
                        await asyncio.sleep(0)
        except TimeoutError as exc:
            raise BrokerUnavailable(
                f"no answer within {deadline_s:g} s: {self._trouble()}"
            ) from exc
        except ChannelRefused as exc:
            raise refusal(exc) from exc

    async def _attempt(self, operation: Callable[[RabbitChannel], Awaitable[_T]]) -> _T:
        async with self._turn:
            if self._connection is None:
                raise ChannelGone("no connection")
            if self._channel is None or not self._channel.is_open:
                self._channel = await RabbitChannel.open(self._connection)
            return await operation(self._channel)

    async def _redo(
        self, name: str, operation: Callable[[RabbitChannel], Awaitable[object]]
    ) -> None:
        try:
            await self._attempt(operation)
        except ChannelRefused as exc:
            if exc.code == LOCKED:
                raise
            # Somebody declared it otherwise in between. Those that still hold must be served.
            _log.error("broker_redeclare_refused", name=name, reason=str(exc))


def refusal(error: ChannelRefused) -> ConfigError:
    """Translate a refusal for the caller."""
    if error.code == ACCESS_REFUSED:
        return ConfigError(f"the broker's permissions forbid it: {error}")
    return QueueMismatch(str(error))


async def _exchange(channel: RabbitChannel, name: str, kind: str) -> None:
    await channel.call(channel.raw.exchange_declare, name, exchange_type=kind, durable=True)


async def _queue(channel: RabbitChannel, spec: QueueSpec) -> None:
    # Transient queues that are not exclusive are deprecated in RabbitMQ 4; exclusive ones are
    # classic, whatever the kind says: a replica of what dies with one connection helps nobody.
    kind = QueueKind.CLASSIC if spec.exclusive else spec.kind
    arguments = {"x-queue-type": kind.value, **spec.arguments}
    await channel.call(
        channel.raw.queue_declare,
        spec.name,
        durable=not spec.exclusive,
        exclusive=spec.exclusive,
        arguments=arguments,
    )
    for exchange, routing_key in spec.bindings:
        await channel.call(channel.raw.queue_bind, spec.name, exchange, routing_key)
