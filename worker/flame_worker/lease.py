"""One claim on calls of a frame, from the question to its answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from flame_broker.messages import Result, Status

__all__ = ["Lease"]


@dataclass(slots=True, eq=False)
class Lease:
    """Results wait here until it is known who takes them: the client, or the custodian.

    Attributes:
        run: The start that it is for.
        claimed: Counters of the calls.
        look: It only asks whether another run has them.
        asked_at: When it was sent last, in loop time.
        refused: Calls that are another run's: what ours still gives is for nobody.
        parked: Results that came before the answer, with the seconds that they took.
        copy: Gives results to the custodian too: nobody has answered, so they go to the client.
    """

    run: str
    claimed: frozenset[int]
    look: bool = False
    asked_at: float = 0.0
    refused: frozenset[int] = frozenset()
    parked: list[tuple[list[Result], float]] = field(default_factory=list)
    copy: Callable[[list[Result]], None] | None = None

    def sift(
        self, results: Iterable[Result], seconds: float, settle: Callable[[int], None]
    ) -> list[Result]:
        """Those results that may be sent now.

        Args:
            results: What calls of the frame gave.
            seconds: That they took together.
            settle: Told how many calls are over whose outcome is for nobody.
        """
        wanted, dropped = list[Result](), 0
        for result in results:
            if result.counter not in self.refused:
                wanted.append(result)
            elif result.status is not Status.ITEM:
                dropped += 1
        if dropped:
            settle(dropped)
        if self.copy is not None:
            ours = [result for result in wanted if result.counter in self.claimed]
            if ours:
                self.copy(ours)
            return wanted
        passed = [result for result in wanted if result.counter not in self.claimed - self.refused]
        kept = [result for result in wanted if result.counter in self.claimed - self.refused]
        if kept:
            self.parked.append((kept, seconds))
        return passed
