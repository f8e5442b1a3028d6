"""A frame in hand: from its delivery to its ack."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from flame_broker.keys import Key
from flame_broker.messages import Call, CallFrame
from flame_broker.store.cache import Pin
from flame_worker.convoy import Convoy
from flame_worker.lease import Lease

__all__ = ["Ack", "Holding"]

Ack = Callable[[], None]


@dataclass(slots=True, eq=False)
class Holding:
    """Custody of one frame's calls. The frame is acked when every call is somewhere else.

    Attributes:
        acks: Take the message off its queue, and its copies if it is delivered again meanwhile.
        frame: What was delivered.
        key: What it was signed with; signs its results.
        on_settled: Told when the frame is acked.
        waiting: Calls that no slot has been given yet.
        unsettled: Calls whose outcome (or hand-back) is not confirmed yet, and items of theirs.
        since: When its oldest waiting call began to wait here, in loop time.
        suspect: Runs alone (PROTOCOL.md, rule 4).
        target_path: The target by value, on this node.
        pins: Keep the objects that its calls need on this node.
        convoys: Of calls whose results wait for a large one, by counter.
        born: When it came, in loop time.
        lease: A claim on calls of it that waits for its answer, or was refused.
        run: The lease that its calls have: they are in the orchestrator's custody; ``""`` if not.
    """

    acks: list[Ack]
    frame: CallFrame
    key: Key
    on_settled: Callable[[Holding], None]
    waiting: deque[Call] = field(init=False)
    unsettled: int = field(init=False)
    since: float = 0.0
    suspect: bool = False
    target_path: Path | None = None
    pins: list[Pin] = field(default_factory=list)
    convoys: dict[int, Convoy] = field(default_factory=dict)
    born: float = 0.0
    lease: Lease | None = None
    run: str = ""

    def __post_init__(self) -> None:
        self.waiting = deque(self.frame.calls)
        self.unsettled = len(self.frame.calls)

    def settle(self, calls: int) -> None:
        """Note that so many calls or items are safe elsewhere; with the last the frame is acked."""
        self.unsettled -= calls
        if self.unsettled <= 0:
            for ack in self.acks:
                ack()
            for pin in self.pins:
                pin.release()
            self.on_settled(self)

    def take_waiting(self) -> list[Call]:
        """Take all calls that no slot has been given."""
        calls = list(self.waiting)
        self.waiting.clear()
        return calls
