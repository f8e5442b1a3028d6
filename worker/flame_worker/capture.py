"""A child's standard output and error, marked with the call that writes.

Descriptors 1 and 2 are pipes to the daemon. Python's streams write a marker with the serial
number of the call before the first bytes of each call, so its lines are attributed exactly. What
C code and sub-processes write has no marker; the daemon attributes it to the call that runs when
it arrives, which is right unless many short calls follow one another.
"""

from __future__ import annotations

import errno
import faulthandler
import io
import os
import sys
from typing import Any, BinaryIO, Final, cast

from flame_worker.descriptors import duplicate_high
from flame_worker.interrupts import Interrupts

__all__ = ["MARK_END", "MARK_START", "Capture"]

_LINE_BUFFER_BYTES: Final = 64 * 1024

MARK_START: Final = b"\x00\x02flame-call "
MARK_END: Final = b"\x03"


class _MarkedFile(io.FileIO):
    """A descriptor that announces the call before its first bytes, and comes back when closed."""

    def __init__(self, descriptor: int, interrupts: Interrupts) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._spare, self._interrupts = duplicate_high(descriptor), interrupts
        self._marked = -1

    def write(self, data: Any) -> int:
        """Write, after the marker where one is due."""
        try:
            return self._write(data)
        except OSError as exc:
            if exc.errno != errno.EBADF:
                raise
        self.restore()
        return self._write(data)

    def _write(self, data: Any) -> int:
        serial = self._interrupts.serial
        if serial != self._marked:
            os.write(self.fileno(), b"%b%d%b" % (MARK_START, serial, MARK_END))
            self._marked = serial
        return os.write(self.fileno(), data)

    def restore(self) -> None:
        """Make the descriptor the pipe again if the call closed or replaced it."""
        try:
            same = os.path.samestat(os.fstat(self.fileno()), os.fstat(self._spare))
        except OSError:
            same = False
        if not same:
            os.dup2(self._spare, self.fileno())


class _Buffer(io.BufferedWriter):
    """Remembers that something was written, so that only calls which print are flushed."""

    printed = False

    def write(self, data: Any) -> int:
        """Write to the buffer."""
        self.printed = True
        return super().write(data)


class _Stream(io.TextIOWrapper):
    """A text stream that cannot be closed for the calls after this one."""

    def close(self) -> None:
        """Only flush: the stream belongs to the process, and the next call needs it."""
        self.flush()

    def detach(self) -> BinaryIO:
        """Give the buffer without losing it, for the same reason."""
        self.flush()
        return cast(BinaryIO, self.buffer)


class _Captured:
    """One standard stream."""

    def __init__(self, name: str, descriptor: int, interrupts: Interrupts) -> None:
        self._name = name
        self._file = _MarkedFile(descriptor, interrupts)
        self.buffer = _Buffer(self._file, _LINE_BUFFER_BYTES)
        self.stream = _Stream(
            self.buffer,
            encoding="utf-8",
            errors="backslashreplace",
            line_buffering=True,
            write_through=True,
        )
        self.install()

    def install(self) -> None:
        setattr(sys, self._name, self.stream)
        setattr(sys, f"__{self._name}__", self.stream)

    def restore(self) -> None:
        self._file.restore()

    def flush(self) -> None:
        self.buffer.printed = False
        try:
            self.buffer.flush()
        except ValueError:  # the call closed or detached the buffer itself
            self.buffer = _Buffer(self._file, _LINE_BUFFER_BYTES)


class Capture:
    """Both standard streams of a child."""

    def __init__(self, interrupts: Interrupts) -> None:
        out = self._out = _Captured("stdout", 1, interrupts)
        err = self._err = _Captured("stderr", 2, interrupts)
        self._out_buffer, self._err_buffer = out.buffer, err.buffer
        self._out_stream, self._err_stream = out.stream, err.stream
        faulthandler.enable(2, all_threads=False)

    def end_call(self) -> bool:
        """Bring out what the call wrote and put the streams back; True if it wrote anything."""
        if sys.stdout is not self._out_stream or sys.stderr is not self._err_stream:
            self._out.install()
            self._err.install()
        if not self._out_buffer.printed and not self._err_buffer.printed:
            return False
        self._out.flush()
        self._err.flush()
        return True

    def restore(self) -> None:
        """Put back descriptors that a call closed or replaced."""
        self._out.restore()
        self._err.restore()
