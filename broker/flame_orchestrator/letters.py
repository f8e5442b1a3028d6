"""What arrives in the custody queue."""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

from flame_broker.messages import Claim, ControlFrame, Deposit, ResultFrame, is_plain, parse_call_id
from flame_orchestrator.schema import HIGHEST

__all__ = ["Letter", "Writing"]


Writing = Deposit | ResultFrame | ControlFrame | Claim
"""What a letter may say."""


class Letter(NamedTuple):
    """A message for the custody queue that was verified.

    Attributes:
        frame: What it says.
        mark: Its signature, by which it is known again.
    """

    frame: Writing
    mark: bytes

    @property
    def client(self) -> str:
        """Whose calls it is about."""
        frame = self.frame
        if isinstance(frame, Deposit | Claim):
            return frame.frame.client
        return frame.client if isinstance(frame, ResultFrame) else str(_of(frame, "client"))

    @property
    def counters(self) -> set[int]:
        """Which of them."""
        frame = self.frame
        if isinstance(frame, Deposit | Claim):
            return {call.counter for call in frame.frame.calls}
        if isinstance(frame, ResultFrame):
            return {result.counter for result in frame.results}
        numbers = _of(frame, "counters")
        found = numbers if isinstance(numbers, tuple) else ()
        return {n for n in found if isinstance(n, int)}

    @property
    def can_be_kept(self) -> bool:
        """Whether any database takes its texts and numbers; nobody of ours sends others."""
        frame, texts = self.frame, [self.client]
        if isinstance(frame, Deposit):
            texts += [frame.frame.reply, *frame.keys, *chain.from_iterable(frame.after)]
            texts += [limit.key for limit in frame.limits if limit is not None]
        elif isinstance(frame, Claim):
            texts += [frame.frame.reply, frame.run, frame.worker]
        elif isinstance(frame, ControlFrame):
            texts.append(str(_of(frame, "run")))
        numbers = self.counters
        if isinstance(frame, Deposit):
            numbers |= {parse_call_id(call)[1] for call in chain.from_iterable(frame.after)}
        return all(map(is_plain, texts)) and all(0 <= n <= HIGHEST for n in numbers)


def _of(frame: ControlFrame, name: str) -> object:
    return frame.arguments.get(name)
