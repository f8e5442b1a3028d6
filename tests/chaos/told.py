"""What the orchestrator's history tells of calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flame
from chaos.calls import VALUE, Seen
from flame.errors import FlameError

__all__ = ["SUCCEEDED", "Historian", "Told"]

SUCCEEDED = "succeeded"
_PATIENCE = 5


@dataclass(frozen=True, slots=True)
class Told:
    """The history's story of a call.

    Args:
        state: Where it says the call is; ``""`` if it knows none of that id.
        error: The error that it ended with.
        run: Which run the stored value is from; ``""`` if it was not asked for.
    """

    state: str = ""
    error: str = ""
    run: str = ""


class Historian:
    """Asks an orchestrator, again if the one that was asked is gone.

    Args:
        client: Who asks.
    """

    def __init__(self, client: flame.Client) -> None:
        self._client = client

    def tell(self, seen: Seen, *, with_value: bool) -> Told:
        """The story of a call.

        Args:
            seen: What its client saw.
            with_value: Have the stored value told too, where there is one.
        """
        story = self._ask(lambda: self._client.story(seen.id)) or {}
        state, error = str(story.get("state", "")), str(story.get("error", ""))
        run = ""
        if with_value and state == SUCCEEDED and seen.end == VALUE:
            value = self._ask(lambda: flame.attach(seen.id, client=self._client).result(30))
            run = value.run
        return Told(state, error, run)

    def queued(self) -> dict[str, int]:
        """How many messages wait, by the kind of their queue."""
        waiting: Counter[str] = Counter()
        for depth in self._ask(self._client.queues):
            waiting[depth.kind] += depth.messages
        return dict(+waiting)

    def _ask(self, question: Callable[[], Any]) -> Any:
        for _ in range(_PATIENCE):
            try:
                return question()
            except (TimeoutError, FlameError) as problem:
                unanswered = problem
        raise unanswered
