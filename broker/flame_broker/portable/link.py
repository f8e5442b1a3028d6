"""What one kind of broker has to supply: blocking links, each used by one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from flame_broker.transport import Capabilities, QueueSpec

__all__ = ["Dialect", "Letter", "Link", "Parcel", "Receipt", "Subscription"]


class Receipt(NamedTuple):
    """What a broker wants to hear to find a message in hand again.

    Args:
        place: The queue, in the broker's own words.
        tag: The message; ``""`` where reading takes nothing away.
    """

    place: str
    tag: str


@dataclass(frozen=True, slots=True)
class Letter:
    """A message to send."""

    exchange: str
    key: str
    body: bytes
    headers: Mapping[str, str | int]
    mandatory: bool


@dataclass(frozen=True, slots=True)
class Parcel:
    """A message received and not yet acked."""

    queue: str
    body: bytes
    headers: Mapping[str, object]
    redelivered: bool
    receipt: Receipt


@dataclass(slots=True)
class Subscription:
    """Where a consumer reads; it outlives the links it is served by.

    Args:
        queue: The queue.
        on_parcel: Called for each message, in the thread that calls ``Link.receive``.
        position: How far a stream was read.
    """

    queue: str
    on_parcel: Callable[[Parcel], None]
    position: str = ""


class Link(Protocol):
    """One live connection. Any method may raise one of its dialect's ``failures``."""

    def declare(self, spec: QueueSpec) -> None:
        """Make a queue, or keep it from expiring."""

    def declare_exchange(self, name: str, kind: str) -> None:
        """Make an exchange."""

    def delete(self, queue: str) -> None:
        """Delete a queue if it is there."""

    def depth(self, queue: str) -> int | None:
        """Messages ready in a queue, or None if it does not exist."""

    def publish(self, letter: Letter) -> None:
        """Store a message. Raises ``Unroutable`` if it is mandatory and no queue takes it."""

    def subscribe(self, subscription: Subscription) -> None:
        """Prepare to receive; once in the life of a link."""

    def receive(self, credit: int) -> None:
        """Wait a while for up to ``credit`` messages and call back for each."""

    def ack(self, receipt: Receipt) -> None:
        """Take a message off its queue. One that is gone is fine."""

    def hold(self, receipts: Iterable[Receipt]) -> None:
        """Say that these are still in hand, so that they are not given to others."""

    def give_back(self, receipts: Iterable[Receipt]) -> None:
        """Make messages in hand available to others, marked as redelivered."""

    def tidy(self) -> None:
        """Bring back what dead consumers held, and remove what has expired."""

    def close(self) -> None:
        """Disconnect; never raises one of the failures."""


class Dialect(Protocol):
    """One kind of broker at one address."""

    @property
    def product(self) -> str:
        """What this broker is called."""

    @property
    def capabilities(self) -> Capabilities:
        """What this broker guarantees."""

    @property
    def failures(self) -> tuple[type[Exception], ...]:
        """What its library raises when the broker is away: a new link may cure it."""

    @property
    def visibility_s(self) -> float:
        """How long a message in hand stays hidden from others without ``hold``, in seconds."""

    def connect(self) -> Link:
        """Connect to one of the hosts; the next call tries the next."""

    def __str__(self) -> str:
        """The address without its password."""
