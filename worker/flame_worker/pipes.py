"""The pipes between the daemon and one child, seen from both ends.

==========  =============  ====================================================================
pipe        direction      carries
==========  =============  ====================================================================
commands    to the child   the settings, then chunks of calls, each one msgpack array
claims      to the child   one token a call; taking it is starting the call
cancels     to the child   serial numbers of calls to interrupt, followed by SIGINT
records     to the daemon  results and notices, each one msgpack array
bells       to the daemon  one byte: look at the records now
==========  =============  ====================================================================

**Claims.** For each call of a chunk the daemon writes one token into the claims pipe before it
sends the chunk; the child takes one before it starts each call. The daemon keeps the read end, so
it can take tokens back: that revokes calls which have not started, in order and atomically,
whatever the child is doing. A token carries the epoch of its chunk. Each revocation begins a new
epoch, so a token of a later chunk never starts a revoked call. When a child dies, the tokens left
say which calls it had started.

**Bells.** A child writes each result to the records pipe at once, where its death can't undo it,
but the daemon does not wait on that pipe: waking it for each of thousands of short calls would
cost more than the calls. The child rings when a chunk ends, when ``RING_BYTES`` are unread, or
when it last rang ``RING_AFTER_S`` ago. What was written within ``RING_AFTER_S`` of the last ring
and not rung for, the daemon finds by looking once more ``LOOK_AGAIN_S`` after each ring.
"""

from __future__ import annotations

import os
import select
import struct
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    import asyncio

__all__ = [
    "ATOMIC_BYTES",
    "DESCRIPTORS_CLOSED",
    "LOADED",
    "LOOK_AGAIN_S",
    "MAX_OUTSTANDING",
    "NOTICE",
    "PROGRESS",
    "READY",
    "RING_AFTER_S",
    "RING_BYTES",
    "SERIAL",
    "TOKEN",
    "ChildEnds",
    "Claims",
    "DaemonEnds",
    "Outbox",
    "open_pipes",
    "read_available",
]

TOKEN: Final = struct.Struct("<I")
"""An epoch number. Four bytes written and read as one never tear in a pipe."""

SERIAL: Final = struct.Struct("<Q")

ATOMIC_BYTES: Final = select.PIPE_BUF
"""Writes up to this size are never mixed with those of another thread (POSIX, ``write``)."""

RING_BYTES: Final = min(4096, select.PIPE_BUF)
"""Below the smallest pipe a kernel gives (one page, once a user has many pipes: ``pipe(7)``)."""

RING_AFTER_S: Final = 0.002
LOOK_AGAIN_S: Final = 0.003

MAX_OUTSTANDING: Final = 8192
"""Calls given to one child and not finished; their tokens fit a pipe of 64 KiB."""

DESCRIPTORS_CLOSED: Final = 70
"""Exit code of a child whose pipes were closed by a call."""

NOTICE: Final = -1
"""First field of a record that is no result."""
READY: Final = 0
LOADED: Final = 1
PROGRESS: Final = 2

_READ_BYTES: Final = 256 * 1024


class ChildEnds(NamedTuple):
    """The descriptors that a child inherits."""

    commands: int
    claims: int
    cancels: int
    records: int
    bells: int


class DaemonEnds(NamedTuple):
    """The descriptors that the daemon keeps for one child."""

    commands: int
    claims: int
    claims_left: int
    cancels: int
    records: int
    bells: int

    def close(self) -> None:
        """Close all of them."""
        for descriptor in self:
            os.close(descriptor)


def open_pipes() -> tuple[DaemonEnds, ChildEnds]:
    """Open the five pipes of a child. The daemon's ends never block, nor do claims and cancels."""
    commands, claims, cancels, records, bells = (os.pipe() for _ in range(5))
    left = os.dup(claims[0])
    mine = DaemonEnds(commands[1], claims[1], left, cancels[1], records[0], bells[0])
    theirs = ChildEnds(commands[0], claims[0], cancels[0], records[1], bells[1])
    for descriptor in (*mine, theirs.cancels):
        os.set_blocking(descriptor, False)
    return mine, theirs


def read_available(descriptor: int, limit: int = _READ_BYTES) -> bytes | None:
    """What lies in a non-blocking pipe, up to a limit.

    Returns:
        ``b""`` at the end of the pipe, None while there is nothing in it.
    """
    try:
        return os.read(descriptor, limit)
    except BlockingIOError:
        return None


class Claims:
    """The daemon's side of the claims pipe."""

    def __init__(self, ends: DaemonEnds) -> None:
        self._write, self._read = ends.claims, ends.claims_left
        self._epoch = 0

    @property
    def token(self) -> bytes:
        """What calls given now are started with."""
        return TOKEN.pack(self._epoch & 0xFFFFFFFF)

    def allow(self, count: int) -> None:
        """Let the child start so many more calls. Room is there: see ``MAX_OUTSTANDING``."""
        os.write(self._write, self.token * count)

    def take_back(self) -> int:
        """Revoke every call that has not started; returns how many those are."""
        taken = 0
        while tokens := read_available(self._read):
            taken += len(tokens) // TOKEN.size
        self._epoch += bool(taken)
        return taken


class Outbox:
    """Writes to a non-blocking pipe, and keeps what does not fit until there is room."""

    def __init__(self, loop: asyncio.AbstractEventLoop, descriptor: int) -> None:
        self._loop = loop
        self._descriptor = descriptor
        self._waiting: deque[memoryview] = deque()
        self._on_empty: Callable[[], None] | None = None

    def send(self, message: bytes) -> None:
        """Send, now or as soon as the other end reads."""
        self._waiting.append(memoryview(message))
        if len(self._waiting) == 1:
            self._flush()

    def finish(self, then: Callable[[], None]) -> None:
        """Call back once everything is sent."""
        if self._waiting:
            self._on_empty = then
        else:
            then()

    def stop(self) -> None:
        """Forget what is not sent."""
        if self._waiting:
            self._loop.remove_writer(self._descriptor)
        self._waiting.clear()

    def _flush(self) -> None:
        while self._waiting:
            try:
                sent = os.write(self._descriptor, self._waiting[0])
            except BlockingIOError:
                self._loop.add_writer(self._descriptor, self._resume)
                return
            except BrokenPipeError:  # the child is dead; its exit is handled where it is noticed
                self._waiting.clear()
                return
            if sent == len(self._waiting[0]):
                self._waiting.popleft()
            else:
                self._waiting[0] = self._waiting[0][sent:]

    def _resume(self) -> None:
        self._loop.remove_writer(self._descriptor)
        self._flush()
        if not self._waiting and self._on_empty is not None:
            self._on_empty()
