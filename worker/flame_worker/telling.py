"""What calls say while they run: whose it is, and how its lines are numbered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from flame_broker.keys import Key
from flame_broker.messages import Event, EventKind
from flame_broker.topology import custody_queue, kept_output
from flame_worker.batches import Batch
from flame_worker.holding import Holding

__all__ = ["Numbering", "Voice"]


class Voice(NamedTuple):
    """What events have in common that travel in one frame.

    Attributes:
        key: Which key signs.
        client: Who made the calls.
        label: The name of the service.
        attempt: Of the calls.
        echo: The client prints it.
        kept: An orchestrator keeps it, if there is one.
    """

    key: Key
    client: str
    label: str = ""
    attempt: int = 1
    echo: bool = True
    kept: bool = False

    @classmethod
    def of(cls, holding: Holding, *, output: bool) -> Voice:
        """The voice of a frame's calls, for output or for progress."""
        key, frame, spec = holding.key, holding.frame, holding.frame.spec
        # What is in custody is tracked there, and not once more on its way.
        kept = output and (spec.track or frame.reply == custody_queue(key.hex_id).name)
        return cls(key, frame.client, spec.label, frame.attempt, spec.echo, kept)

    @property
    def heard(self) -> bool:
        """Whether anybody prints or keeps it."""
        return self.echo or self.kept

    @property
    def routing_key(self) -> str:
        """Who hears it on the logs exchange."""
        return kept_output(self.client) if self.kept else self.client


class Numbering:
    """Counts the lines of each run, so that who keeps them sees what is missing or came twice."""

    def __init__(self) -> None:
        self._runs = 0

    def events(
        self, batch: Batch, counter: int, kind: EventKind, lines: Sequence[str]
    ) -> Iterator[Event]:
        """The next lines of a call, of both its streams, in the order in which they came."""
        if batch.printed is None:
            batch.printed = {}
        run, said = batch.printed.get(counter, (0, 0))
        if not run:
            self._runs += 1
            run = self._runs
        batch.printed[counter] = run, said + len(lines)
        for index, line in enumerate(lines, said):
            yield Event(counter, kind, line, 0.0, run, index)
