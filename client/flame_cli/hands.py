"""Takes messages that were set aside in hand, and gives back what was not taken off.

A message is looked at as any consumer does it, without an ack. Closing the connection gives it
back: the broker puts it to where it was, marked as redelivered, which means nothing in these
queues. It does the same when this process is killed, so looking loses nothing. A reject promises
less: where a rejected message goes differs between brokers and their versions.
"""

from __future__ import annotations

import asyncio
from time import perf_counter
from types import TracebackType
from typing import Final, Self

from flame_broker.connect import open_transport
from flame_broker.errors import BrokerUnavailable, ConfigError, FlameError
from flame_broker.transport import Delivery, Transport
from flame_cli.aside import Shelf

__all__ = ["MOST", "Hands", "Pile"]

MOST: Final = 10_000
"""So many messages of a queue are taken in hand at most; RabbitMQ 3.10 needs seconds to put back
more, and AMQP can ask for 65,535."""

_QUIET_S: Final = 5.0
_BACK_S: Final = 5.0
_LOOK_EVERY_S: Final = 0.02
# RabbitMQ says that a quorum queue is empty which leaves its question unanswered for 250 ms.
_NO_ANSWER_S: Final = 0.2
_QUESTIONS: Final = 5


class Pile:
    """Messages of one shelf that are in hand, one after another.

    Args:
        hands: Whose.
        depth: How many lay on the shelf.
    """

    def __init__(self, hands: Hands, depth: int) -> None:
        self.arrived: asyncio.Queue[Delivery] = asyncio.Queue()
        self.left = depth
        self._hands = hands

    async def next(self) -> Delivery | None:
        """The next message; None if none came for 5 s.

        Raises:
            BrokerUnavailable: The connection was lost, and everything went back.
        """
        if self.arrived.empty():
            try:
                async with asyncio.timeout(_QUIET_S):
                    delivery = await self.arrived.get()
            except TimeoutError:
                self._hands.check()
                return None
        else:
            delivery = self.arrived.get_nowait()
        self._hands.check()
        return delivery

    def take_off(self, delivery: Delivery) -> None:
        """Remove a message from its queue for good.

        Raises:
            BrokerUnavailable: The connection was lost: it is still there.
        """
        if not delivery.ack():
            raise _lost()
        self.left -= 1


class Hands:
    """A connection to look with, and one to ask and publish with; an async context manager.

    Args:
        url: The broker.

    Attributes:
        desk: The transport to publish with.
    """

    def __init__(self, url: str) -> None:
        self.desk: Transport = open_transport(url, name="flame-dead")
        self._grip: Transport = open_transport(url, name="flame-dead in hand")
        self._piles: dict[str, Pile] = {}
        self._lost = False

    async def __aenter__(self) -> Self:
        await self.desk.open()
        try:
            self._check_broker()
            await self._grip.open()
        except FlameError:
            await self.desk.close()
            raise
        self._grip.on_reconnect = self._on_reconnect
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._grip.close()
        if error is None:
            await self._all_back()
        await self.desk.close()

    async def depth(self, shelf: Shelf) -> int:
        """How many messages lie on a shelf; 0 if there is no such queue."""
        for _ in range(_QUESTIONS):
            asked_s = perf_counter()
            depth = await self.desk.depth(shelf.queue)
            if depth != 0 or perf_counter() - asked_s < _NO_ANSWER_S:
                break
        return depth or 0

    async def reach(self, shelf: Shelf, credit: int) -> Pile:
        """Take up to ``credit`` messages in hand, the oldest first; once for each shelf.

        Raises:
            QueueMismatch: There is no such queue.
            BrokerUnavailable: No answer in time.
        """
        pile = self._piles[shelf.queue] = Pile(self, await self.depth(shelf))
        await self._grip.consume(shelf.queue, pile.arrived.put_nowait, prefetch=min(credit, MOST))
        return pile

    def check(self) -> None:
        """Raise if the connection was lost since it was made: then nothing is in hand any more.

        Raises:
            BrokerUnavailable: It was.
        """
        if self._lost or not self._grip.connected:
            raise _lost()

    def _check_broker(self) -> None:
        if not self.desk.capabilities.returns_in_order:
            raise ConfigError(
                f"this broker ({self.desk.server}) does not give messages back to where they were, "
                "so they cannot be looked at without harm: look with the broker's own tools"
            )

    def _on_reconnect(self) -> None:
        self._lost = True

    async def _all_back(self) -> None:
        """Wait a moment until the broker has put back what was in hand: the next look needs it."""
        try:
            async with asyncio.timeout(_BACK_S):
                for queue, pile in self._piles.items():
                    # The broker sends no word when it has put messages back.
                    while (await self.desk.depth(queue) or 0) < pile.left:  # noqa: ASYNC110
                        await asyncio.sleep(_LOOK_EVERY_S)
        except (TimeoutError, FlameError):
            return  # somebody else has taken some; or the broker is away, and does it later


def _lost() -> BrokerUnavailable:
    return BrokerUnavailable(
        "the connection to the broker was lost; what was not done yet is still set aside: try again"
    )
