"""A child's output, as lines of calls: the daemon's end of ``capture``."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from typing import Final

from flame_worker.capture import MARK_END, MARK_START

__all__ = ["LastWords", "OutputSplitter"]

_MARK: Final = re.compile(re.escape(MARK_START) + rb"(\d{1,20})" + re.escape(MARK_END))
_LONGEST_MARK: Final = len(MARK_START) + 20 + len(MARK_END)
_LINE_BYTES: Final = 64 * 1024
_LAST_LINES: Final = 40
_LAST_BYTES: Final = 8 * 1024
_UNMARKED: Final = -1
_DROPPED: Final = b"... output dropped: the call wrote more than its limit"

Emit = Callable[[int, list[str]], None]


class OutputSplitter:
    """Splits one stream into lines by call, within bounds.

    Args:
        emit: Takes the serial number of a call and its lines.
        running: Which call runs now, for bytes that carry no mark.
        max_bytes: Of one call; what exceeds it is dropped, and a last line says so.
        max_lines: Likewise.
    """

    def __init__(
        self, emit: Emit, running: Callable[[], int], max_bytes: int, max_lines: int
    ) -> None:
        self._emit, self._running = emit, running
        self._max_bytes, self._max_lines = max_bytes, max_lines
        self._marked = _UNMARKED
        self._current = _UNMARKED
        self._partial = b""
        self._half_mark = b""
        self._bytes_left, self._lines_left = max_bytes, max_lines

    def feed(self, data: bytes) -> None:
        """Take bytes as they came from the pipe."""
        if self._half_mark:
            data, self._half_mark = self._half_mark + data, b""
        cut = _half_mark_at(data)
        if cut >= 0:
            data, self._half_mark = data[:cut], data[cut:]
        if MARK_START not in data:
            self._write(data)
            return
        before, *rest = _MARK.split(data)
        self._write(before)
        for serial, text in zip(rest[::2], rest[1::2], strict=True):
            self._marked = int(serial)
            self._write(text)

    def end_call(self) -> None:
        """The running call is over: its last line counts without a newline."""
        if self._half_mark:
            data, self._half_mark = self._half_mark, b""
            self._write(data)
        self._flush()

    def _write(self, data: bytes) -> None:
        if not data:
            return
        # A mark holds until its call has ended; then it is whoever runs now.
        serial = max(self._marked, self._running())
        if serial != self._current:
            self._flush()
            self._current = serial
            self._bytes_left, self._lines_left = self._max_bytes, self._max_lines
        if self._lines_left > 0:
            self._split(data)

    def _split(self, data: bytes) -> None:
        *whole, self._partial = (self._partial + data[: self._bytes_left]).split(b"\n")
        while len(self._partial) > _LINE_BYTES:
            whole.append(self._partial[:_LINE_BYTES])
            self._partial = self._partial[_LINE_BYTES:]
        self._send(whole[: self._lines_left])
        self._lines_left -= len(whole)
        self._bytes_left -= len(data)
        if self._lines_left <= 0 or self._bytes_left < 0:
            self._lines_left = 0
            self._partial = b""
            self._send([_DROPPED])

    def _flush(self) -> None:
        if self._partial:
            line, self._partial = self._partial, b""
            self._send([line])

    def _send(self, lines: list[bytes]) -> None:
        if lines:
            self._emit(self._current, [piece for line in lines for piece in _pieces(line)])


class LastWords:
    """The end of what a process wrote: 40 lines of it, and no more than 8 KiB.

    It becomes part of a message that must fit a frame, whatever the process wrote.
    """

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=_LAST_LINES)

    def hear(self, lines: list[str]) -> None:
        """Take lines as they come."""
        self._lines.extend(line[-_LAST_BYTES:] for line in lines[-_LAST_LINES:])

    def __str__(self) -> str:
        """They, cut at the front."""
        data = "\n".join(self._lines).encode()[-_LAST_BYTES:]
        return data.decode(errors="ignore")  # without the rest of a character that was cut


def _pieces(line: bytes) -> list[str]:
    text = line.removesuffix(b"\r").decode("utf-8", "replace")
    if len(line) <= _LINE_BYTES:
        return [text]
    return [text[i : i + _LINE_BYTES] for i in range(0, len(text), _LINE_BYTES)]


def _half_mark_at(data: bytes) -> int:
    """Where a mark begins whose end is still to come; -1 if none does."""
    start = data.rfind(MARK_START[:1], -_LONGEST_MARK)
    if start < 0 or _MARK.match(data, start):
        return -1
    tail = data[start:]
    if MARK_START.startswith(tail):
        return start
    digits = tail.removeprefix(MARK_START)
    return start if digits != tail and digits.isdigit() else -1
