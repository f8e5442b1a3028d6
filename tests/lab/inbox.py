"""A consumer's callback that keeps what it got."""

from __future__ import annotations

from flame_broker.transport import Delivery
from lab.wait import eventually

__all__ = ["Inbox", "numbered"]


class Inbox:
    """Keeps deliveries, and acks them unless told otherwise.

    Attributes:
        deliveries: What came, in order.
        ack: Whether each is acked as it comes.
    """

    def __init__(self, *, ack: bool = True) -> None:
        self.deliveries: list[Delivery] = []
        self.ack = ack

    def __call__(self, delivery: Delivery) -> None:
        self.deliveries.append(delivery)
        if self.ack:
            assert delivery.ack()

    @property
    def bodies(self) -> list[bytes]:
        """The bodies of what came."""
        return [delivery.body for delivery in self.deliveries]

    async def until(self, count: int, timeout_s: float = 20.0) -> list[bytes]:
        """Wait for that many deliveries and return all bodies so far."""
        await eventually(
            lambda: len(self.deliveries) >= count,
            timeout_s,
            lambda: f"{count} deliveries, got {len(self.deliveries)}",
        )
        return self.bodies


def numbered(count: int) -> list[bytes]:
    """Make bodies that tell each other apart."""
    return [b"%d" % number for number in range(count)]
