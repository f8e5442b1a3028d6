"""Lines of a log as bytes: packed one after another, so that a chunk grows at its end."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

import msgpack

__all__ = ["LINE_BYTES", "NOTE", "Line", "Part", "compress", "pack", "size_of", "unpack"]

NOTE: Final = "note"
"""The stream of a line that the orchestrator wrote: what is missing, and why."""

LINE_BYTES: Final = 16
"""What a line takes beyond its text."""

_LEVEL: Final = 1  # the open chunk of a call is compressed again with each tenth of a second
_STREAMS: Final = ("stdout", "stderr", NOTE)
_NUMBERS: Final = {stream: number for number, stream in enumerate(_STREAMS)}

_packer: Final = msgpack.Packer(use_bin_type=True, unicode_errors="replace")


class Line(NamedTuple):
    """One line of a log.

    Attributes:
        at: When the worker heard of it, in seconds since 1970.
        stream: ``stdout``, ``stderr`` or ``note``.
        text: Without its newline.
    """

    at: float
    stream: str
    text: str


class Part(NamedTuple):
    """Lines of one run of a call, in their order.

    Attributes:
        attempt: Of the call.
        worker: Where it ran.
        run: Among the runs of that worker.
        lines: One or more.
    """

    attempt: int
    worker: str
    run: int
    lines: list[Line]


def pack(line: Line) -> bytes:
    """A line as bytes that may follow those of others."""
    return _packer.pack((line.at, _NUMBERS[line.stream], line.text))  # type: ignore[no-any-return]


def size_of(line: Line) -> int:
    """What a line counts for."""
    return len(line.text) + LINE_BYTES


def compress(packed: Iterable[bytes]) -> bytes:
    """A chunk as it is stored, of lines that were packed."""
    return zlib.compress(b"".join(packed), _LEVEL)


def unpack(data: bytes) -> Iterator[Line]:
    """The lines of packed bytes."""
    reader: Any = msgpack.Unpacker(use_list=False, max_buffer_size=len(data))
    reader.feed(data)
    for at, number, text in reader:
        yield Line(at, _STREAMS[number], text)
