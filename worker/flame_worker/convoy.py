"""What one call sends while a large result of it is on its way to the store."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from flame_broker.messages import Result, Status

__all__ = ["Convoy"]


class Convoy:
    """Results of one call, let go in the order in which the call gave them.

    A large one is a future until it is stored, and holds up what follows. If it could not be
    stored, the call has failed: nothing follows that failure.

    Args:
        advance: What is done when a large one is stored, or never will be.

    Attributes:
        advance: The same; the call may have gone to another holding meanwhile.
        failed: The failure is out; what else the call gives is for nobody.
        ended: The call has given its outcome.
    """

    __slots__ = ("_line", "advance", "ended", "failed")

    def __init__(self, advance: Callable[[], None]) -> None:
        self.advance = advance
        self._line: deque[Result | asyncio.Future[Result]] = deque()
        self.failed = self.ended = False

    @property
    def over(self) -> bool:
        """Nothing waits here, and nothing that is still to come must be kept back."""
        return self.ended if self.failed else not self._line

    def add(self, result: Result | asyncio.Future[Result]) -> None:
        """Put a result, or a large one on its way to the store, behind those before it."""
        self._line.append(result)

    def take(self) -> list[Result]:
        """The results that wait for nothing any more."""
        taken: list[Result] = []
        while self._line and not self.failed:
            result = self._line[0]
            if isinstance(result, asyncio.Future):
                if not result.done():
                    break
                result = result.result()
                self.failed = result.status is Status.FAILED
            taken.append(result)
            self._line.popleft()
        if self.failed:
            self._line.clear()
        return taken
