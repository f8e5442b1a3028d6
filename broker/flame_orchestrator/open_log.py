"""The end of a call's log, where lines are added: numbered, within bounds, in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import Row

from flame_broker.messages import Event, EventFrame
from flame_orchestrator.chunks import NOTE, Line, compress, pack, size_of

__all__ = ["CHUNK_BYTES", "Chunk", "OpenLog"]

CHUNK_BYTES: Final = 32 * 1024
"""A chunk takes no more lines when it has reached this size."""

_RUNS: Final = 16  # a line of an older run than these does not come twice any more


@dataclass(slots=True)
class Chunk:
    """Lines of one run, as one row holds them.

    Args:
        start: The number of its first line in the log of the call.
        worker: Where the run was.
        run: Among the runs of that worker.
        attempt: Of the call.
        upto: The number of the run's next line.
        lines: How many it holds.
        size: Of their text, with a little for each line.
        packed: They.
        stored: How many of them its row holds; 0: it has none.
        cut: The log ends with it.
    """

    start: int
    worker: str
    run: int
    attempt: int
    upto: int = 0
    lines: int = 0
    size: int = 0
    packed: list[bytes] = field(default_factory=list)
    stored: int = 0
    cut: bool = False

    def takes(self, frame: EventFrame, run: int) -> bool:
        """Whether lines of this run may be added."""
        here = self.worker, self.run, self.attempt
        return self.size < CHUNK_BYTES and here == (frame.worker, run, frame.attempt)

    def add(self, line: Line) -> None:
        """Take one more line."""
        self.packed.append(pack(line))
        self.lines += 1
        self.size += size_of(line)

    def row(self, now: float) -> dict[str, Any]:
        """What is stored of it."""
        body = compress(self.packed)
        self.packed = [b"".join(self.packed)]
        return {
            "start": self.start,
            "lines": self.lines,
            "size": self.size,
            "worker": self.worker,
            "run": self.run,
            "attempt": self.attempt,
            "upto": self.upto,
            "cut": self.cut,
            "at": now,
            "body": body,
        }


class OpenLog:
    """Takes the lines of one call in the order in which they arrive.

    A line that came before is not taken again; one that never came is told of in a note.

    Args:
        limit_bytes: What the log may hold; then it ends with a note.

    Attributes:
        closed_bytes: What its full chunks hold that are in the database.
        changed: Chunks that have lines which are not stored.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.closed_bytes = 0
        self.changed: list[Chunk] = []
        self._limit = limit_bytes
        self._lines = self._size = 0
        self._cut = False
        self._upto: dict[tuple[str, int], int] = {}
        self._chunk: Chunk | None = None

    def recall(self, rows: Sequence[Row[Any]]) -> None:
        """Go on behind chunks that are stored, given in their order without their lines."""
        for row in rows:
            self._note_run((row.worker, row.run), row.upto)
            self._lines = row.start + row.lines
            self._size += row.size
            self._cut = self._cut or row.cut
            if not row.moved:
                self.closed_bytes += row.size

    def reopen(self, row: Row[Any], packed: bytes) -> None:
        """Add to the last chunk that is stored, after ``recall``."""
        self.closed_bytes -= row.size
        self._chunk = Chunk(
            row.start, row.worker, row.run, row.attempt, row.upto, row.lines, row.size, [packed]
        )
        self._chunk.stored = row.lines

    def add(self, frame: EventFrame, event: Event) -> None:
        """Take a line of output."""
        run = frame.worker, event.run
        expected = self._upto.get(run, 0) if event.run else event.index
        if self._cut or event.index < expected:
            return
        chunk = self._chunk_for(frame, event.run)
        if event.index > expected:
            self._put(chunk, Line(frame.at, NOTE, _dropped(event.index - expected)))
        line = Line(frame.at, event.kind.value, event.text)
        if self._size + size_of(line) > self._limit:
            self._cut = chunk.cut = True
            line = Line(frame.at, NOTE, f"the log ends here: it may hold {self._limit:,} bytes")
        self._put(chunk, line)
        chunk.upto = event.index + 1
        self._note_run(run, chunk.upto)

    def _note_run(self, run: tuple[str, int], upto: int) -> None:
        self._upto.pop(run, None)
        self._upto[run] = upto
        if len(self._upto) > _RUNS:
            del self._upto[next(iter(self._upto))]

    def _chunk_for(self, frame: EventFrame, run: int) -> Chunk:
        chunk = self._chunk
        if chunk is None or not chunk.takes(frame, run):
            if chunk is not None:
                self.closed_bytes += chunk.size
            chunk = self._chunk = Chunk(self._lines, frame.worker, run, frame.attempt)
        if not self.changed or self.changed[-1] is not chunk:
            self.changed.append(chunk)
        return chunk

    def _put(self, chunk: Chunk, line: Line) -> None:
        chunk.add(line)
        self._lines += 1
        self._size += size_of(line)


def _dropped(lines: int) -> str:
    return f"{lines:,} lines were dropped on their way" if lines > 1 else "a line was dropped here"
