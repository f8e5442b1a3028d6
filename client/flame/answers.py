"""What arrives on a reply queue: opened if its signature holds, and answers told to who waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flame_broker.errors import FlameError, MalformedMessage
from flame_broker.frames import decode
from flame_broker.keys import Keyring
from flame_broker.logs import get_logger
from flame_broker.messages import ControlFrame, Frame
from flame_broker.transport import Delivery

__all__ = ["Answers"]

_log = get_logger("flame.client")


class Answers:
    """Opens frames, and hands the control frames among them to those who listen.

    Args:
        keyring: Whose signatures count.

    Attributes:
        refused: How many frames did not hold, by the kind of fault.
        lost_queues: Reply queues that were lost with their node; the present one takes their place.
    """

    def __init__(self, keyring: Keyring) -> None:
        self.refused: Counter[str] = Counter()
        self.lost_queues: list[str] = []
        self._keyring = keyring
        self._listeners: list[Callable[[ControlFrame], None]] = []

    @contextmanager
    def listening(self, listener: Callable[[ControlFrame], None]) -> Iterator[None]:
        """Tell ``listener`` of every control frame that arrives meanwhile."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    def on_reply(self, delivery: Delivery) -> None:
        """Take a delivery of a queue that brings nothing but answers."""
        self.tell(self.open(delivery, delivery.queue))
        delivery.ack()

    def tell(self, frame: Frame | None) -> None:
        """Tell all listeners, if this is a control frame."""
        if isinstance(frame, ControlFrame):
            for listener in tuple(self._listeners):
                listener(frame)

    def open(self, delivery: Delivery, queue: str) -> Frame | None:
        """The frame, or None where its signature for ``queue`` does not hold."""
        try:
            return decode(delivery.body, self._keyring, queue=queue, also=self.lost_queues)
        except FlameError as exc:
            self._refuse(exc)
            return None

    def _refuse(self, exc: FlameError) -> None:
        """Drop what is not signed by a key of ours; say so once for each kind of fault."""
        kind = type(exc).__name__
        self.refused[kind] += 1
        if self.refused[kind] == 1:
            level = _log.error if not isinstance(exc, MalformedMessage) else _log.warning
            level("reply.refused", kind=kind, reason=str(exc))
