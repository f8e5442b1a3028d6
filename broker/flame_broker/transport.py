"""The narrow interface that every broker sits behind.

A transport lives in one asyncio loop and is used from that loop only. It moves opaque bytes: it
knows queues, confirms and deliveries, and nothing of calls.

Example:
    >>> async def echo(transport: Transport) -> None:
    ...     await transport.open()
    ...     await transport.declare(QueueSpec("greetings"))
    ...     await transport.consume("greetings", lambda d: d.ack(), prefetch=10)
    ...     await transport.publish("greetings", b"hello")
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, runtime_checkable

from flame_broker.errors import ConfigError, FlameError

__all__ = [
    "DEFAULT_DEADLINE_S",
    "Capabilities",
    "Consumer",
    "Delivery",
    "OnDelivery",
    "QueueKind",
    "QueueMismatch",
    "QueueSpec",
    "TellsOfWaiting",
    "Transport",
    "Unroutable",
]

DEFAULT_DEADLINE_S = 30.0
"""How long a publish may wait for its confirm, in seconds, while no broker answers."""


class Unroutable(FlameError):
    """The broker took the message and returned it: no queue is bound where it was sent."""


class QueueMismatch(ConfigError):
    """The broker has no such queue or exchange, or has it with other arguments than these."""


class QueueKind(StrEnum):
    """What a queue is made of; a transport without the difference treats all as durable."""

    QUORUM = "quorum"
    CLASSIC = "classic"
    STREAM = "stream"


@dataclass(frozen=True, slots=True)
class QueueSpec:
    """All that is needed to declare one queue, and to declare it again after a reconnect.

    Args:
        name: The queue.
        kind: Quorum for work, classic for replies and telemetry, stream for announcements.
        exclusive: Gone with this connection; declared anew (with its bindings) at each reconnect.
        arguments: ``x-…`` arguments beyond ``x-queue-type``.
        bindings: ``(exchange, routing key)`` pairs.
    """

    name: str
    kind: QueueKind = QueueKind.QUORUM
    exclusive: bool = False
    arguments: Mapping[str, str | int] = field(default_factory=dict)
    bindings: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a transport guarantees. What it lacks, others supply or ``connect`` says so.

    Attributes:
        durable: Messages outlive the broker process.
        confirms: A publish is known to be stored.
        dead_letters: The broker itself can set a message aside.
        redelivery: An unacked message comes back when its consumer dies, marked ``redelivered``.
        fanout: Exchanges with several queues bound.
        max_message_bytes: The largest body the broker takes.
        streams: A queue of kind ``stream`` is read by every consumer from its first message on.
        returns_in_order: What was in hand when a transport closes goes back to where it was in its
            queue, so a queue can be looked through without changing it.
    """

    durable: bool
    confirms: bool
    dead_letters: bool
    redelivery: bool
    fanout: bool
    max_message_bytes: int
    streams: bool = True
    returns_in_order: bool = False


@runtime_checkable
class Delivery(Protocol):
    """One message in hand. Acked once; never rejected (a reject raises the broker's count)."""

    @property
    def body(self) -> bytes:
        """The message."""

    @property
    def queue(self) -> str:
        """Where it came from."""

    @property
    def redelivered(self) -> bool:
        """Whether somebody had it in hand before and did not ack it."""

    @property
    def headers(self) -> Mapping[str, object]:
        """Its headers."""

    def ack(self) -> bool:
        """Take the message off the queue. False if its connection is gone: then it comes again."""


OnDelivery = Callable[[Delivery], None]


@runtime_checkable
class Consumer(Protocol):
    """A running consumer; it is restarted by the transport after a reconnect."""

    async def cancel(self) -> None:
        """Stop deliveries. On return no further callback happens; unacked deliveries stay ours."""


@runtime_checkable
class Transport(Protocol):
    """A connection (or two) to one broker, kept alive.

    Every method may be called while the connection is down: it then waits for it, up to its
    deadline, and raises ``BrokerUnavailable`` after that.
    """

    @property
    def capabilities(self) -> Capabilities:
        """What this transport guarantees."""

    @property
    def connected(self) -> bool:
        """Whether the broker can be reached at this moment."""

    @property
    def server(self) -> str:
        """What the broker last said it is, such as ``RabbitMQ 4.0.5``; ``""`` before ``open``."""

    on_reconnect: Callable[[], None] | None
    """Called in the loop after a lost connection is back, queues and consumers included.

    And when the broker ended a consumer, because its queue was lost.
    """

    async def open(self, *, deadline_s: float = 10.0) -> None:
        """Connect.

        Raises:
            BrokerUnavailable: No host answered, or it refused us, within the deadline.
        """

    async def close(self) -> None:
        """Wait for outstanding confirms (briefly), then disconnect. Safe to call twice."""

    async def declare(self, *queues: QueueSpec) -> None:
        """Declare queues, their exchanges and bindings; remembered and repeated at reconnect."""

    async def declare_exchange(self, name: str, kind: str) -> None:
        """Declare a durable exchange (``fanout``, ``topic``, ``direct``); remembered too."""

    async def delete(self, queue: str) -> None:
        """Delete a queue and forget its declaration. A queue that is not there is fine."""

    async def depth(self, queue: str) -> int | None:
        """Messages ready in the queue, or None if it does not exist."""

    def publish(
        self,
        routing_key: str,
        body: bytes,
        *,
        exchange: str = "",
        headers: Mapping[str, str | int] | None = None,
        mandatory: bool = True,
        persistent: bool = True,
        deadline_s: float = DEFAULT_DEADLINE_S,
    ) -> asyncio.Future[None]:
        """Send at once; the future is done when the broker has confirmed.

        Unconfirmed messages are sent again after a reconnect, so a message may arrive twice.
        The deadline does not run while the broker blocks publishers (a memory or disk alarm):
        that is back-pressure, not absence.

        The future raises:
            BrokerUnavailable: No confirm within the deadline.
            Unroutable: ``mandatory`` and no queue took it.
            PayloadTooLarge: The body is over ``capabilities.max_message_bytes``.
        """

    async def consume(self, queue: str, on_delivery: OnDelivery, *, prefetch: int) -> Consumer:
        """Start a consumer with a credit of its own (``prefetch`` unacked messages).

        The callback runs in the loop and must not block; an exception in it is a programming
        error and goes to the loop's exception handler.
        """


@runtime_checkable
class TellsOfWaiting(Protocol):
    """A transport of a process that runs calls: others may use its cpu while it waits."""

    def waits_while(self, condition: Callable[[], bool]) -> None:
        """Say when this process waits for calls of its own."""
