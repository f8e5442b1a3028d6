"""What calls print, on the local console: ``[name] line``.

Lines arrive in the courier's thread and are written in one of their own, so that a slow terminal
never holds up results. Under a live progress bar they go above it, because rich replaces
``sys.stdout`` while a bar is shown and this looks it up for each line.
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict, deque
from queue import Empty, SimpleQueue

from flame_broker.messages import EventKind

__all__ = ["Console", "LogBook"]

_CALLS_KEPT = 4096
_LINES_KEPT = 1000
_LINES_WAITING = 10_000


class LogBook:
    """The last lines of the last calls, for ``ObjectFuture.logs``."""

    def __init__(self) -> None:
        self._lines: OrderedDict[int, deque[str]] = OrderedDict()

    def add(self, counter: int, text: str) -> None:
        """Note a line of a call."""
        lines = self._lines.get(counter)
        if lines is None:
            lines = self._lines[counter] = deque(maxlen=_LINES_KEPT)
            if len(self._lines) > _CALLS_KEPT:
                self._lines.popitem(last=False)
        lines.append(text)

    def lines_of(self, counter: int) -> list[str]:
        """The lines of a call."""
        return [*self._lines.get(counter, ())]


class Console:
    """Writes lines to ``sys.stdout`` and ``sys.stderr`` from a thread of its own."""

    def __init__(self) -> None:
        self._lines: SimpleQueue[tuple[str, str, EventKind] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._dropped = 0

    def write(self, label: str, text: str, kind: EventKind) -> None:
        """Queue a line; never blocks. A console that is far behind loses lines and says so."""
        if self._lines.qsize() > _LINES_WAITING:
            self._dropped += 1
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="flame-console", daemon=True)
            self._thread.start()
        self._lines.put((label, text, kind))

    def close(self, timeout_s: float = 2.0) -> None:
        """Write what is queued and stop."""
        if self._thread is not None:
            self._lines.put(None)
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            self._print(*line)
            if self._dropped and self._lines.empty():
                dropped, self._dropped = self._dropped, 0
                self._print("flame", f"{dropped} lines of output dropped", EventKind.STDERR)

    def _print(self, label: str, text: str, kind: EventKind) -> None:
        stream = sys.stderr if kind is EventKind.STDERR else sys.stdout
        try:
            stream.write(f"[{label}] {text}\n" if label else f"{text}\n")
            stream.flush()
        except (OSError, ValueError):
            # The console was closed or its reader went away; results matter more than echo.
            self._drain()

    def _drain(self) -> None:
        try:
            while True:
                self._lines.get_nowait()
        except Empty:
            return
