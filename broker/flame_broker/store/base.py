"""What every store does, and the values that the backends share."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from flame_broker.errors import StoreError
from flame_broker.objects import is_key

__all__ = ["Buffer", "Data", "ObjectStat", "SegmentReader", "Store", "check_key"]
__all__ += ["mapped", "segments_of"]

Buffer = bytes | bytearray | memoryview
Data = Buffer | Sequence[Buffer]
"""A value, or its segments in order; segments are never joined in memory."""


@dataclass(frozen=True, slots=True)
class ObjectStat:
    """What a store knows of an object.

    Attributes:
        key: Its key, below the store's prefix.
        size_bytes: Its length.
        etag: Names this very content; what ``if_match`` takes. ``""`` where the store has none.
        sha256: As recorded when it was put; None where the store keeps no such record.
        modified_s: When it was put, in seconds since 1970 (UTC); None if the store does not say.
    """

    key: str
    size_bytes: int
    etag: str
    sha256: str | None = None
    modified_s: float | None = None


@runtime_checkable
class Store(Protocol):
    """Bytes by key. Every method blocks, and may be called from any thread, also after a fork.

    All raise ``StoreError`` when the store fails beyond its retries, or for a key that is none.
    """

    def put(
        self,
        key: str,
        data: Data,
        *,
        sha256: str | None = None,
        if_absent: bool = False,
        if_match: str | None = None,
    ) -> ObjectStat:
        """Write an object, wholly or not at all.

        Args:
            key: Where to.
            data: The bytes, or segments of them.
            sha256: Of the data, if it is known already; otherwise it is computed.
            if_absent: Only if there is no object of this key.
            if_match: Only if the object there still has this etag.

        Raises:
            PreconditionFailed: ``if_absent`` or ``if_match`` does not hold.
        """

    def put_file(
        self,
        key: str,
        path: Path,
        *,
        sha256: str | None = None,
        if_absent: bool = False,
        if_match: str | None = None,
        frozen: bool = False,
    ) -> ObjectStat:
        """Write a file's content as ``put`` does.

        Args:
            key: Where to.
            path: The file.
            sha256: Of the content, if it is known already.
            if_absent: As for ``put``.
            if_match: As for ``put``.
            frozen: The content of this file never changes again, so it may be hard-linked.
        """

    def get(self, key: str, *, sha256: str | None = None) -> bytes:
        """Read an object into memory; for large ones take ``get_file``.

        Raises:
            ObjectNotFound: There is none.
            StoreError: It is not the one that ``sha256`` names.
        """

    def get_file(
        self,
        key: str,
        path: Path,
        *,
        sha256: str | None = None,
        size: int | None = None,
        frozen: bool = False,
    ) -> ObjectStat:
        """Read an object into a file, which appears under its name complete and checked.

        Args:
            key: What to read.
            path: The file; an existing one is replaced.
            sha256: What the content must have; else what the store recorded, if it did.
            size: What the length must be.
            frozen: The caller will never change the file, so it may be a hard link.

        Raises:
            ObjectNotFound: There is none.
            StoreError: It is not the one that ``sha256`` and ``size`` name, or changed meanwhile.
        """

    def stat(self, key: str) -> ObjectStat | None:
        """What is known of an object; None if there is none."""

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is fine."""

    def list(self, prefix: str = "") -> Iterator[ObjectStat]:
        """The objects whose keys start with ``prefix`` (any text), in the order of their keys."""

    def describe(self) -> str:
        """The URL of this store without its secrets."""

    def close(self) -> None:
        """Let go of connections and end the waits between retries. Safe to call twice."""


def check_key(key: str) -> str:
    """The key itself, if every store takes it.

    Raises:
        StoreError: It is empty, too long, absolute, or has a part that is empty, ``.`` or ``..``.
    """
    if not is_key(key):
        raise StoreError(
            f"{key!r} is not an object key: relative, up to 1,024 bytes, "
            "no control characters, no part that is empty, '.' or '..'"
        )
    return key


def segments_of(data: Data) -> list[memoryview]:
    """Any data as segments of plain bytes, without copying."""
    parts = [data] if isinstance(data, (bytes, bytearray, memoryview)) else data
    return [memoryview(part).cast("B") for part in parts]


@contextmanager
def mapped(path: Path) -> Iterator[memoryview]:
    """A file's content, mapped for reading (``mmap`` cannot map an empty file).

    Raises:
        StoreError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            content = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b""
    except OSError as exc:
        raise StoreError(f"cannot read {path}: {exc.strerror}") from exc
    with memoryview(content) as view:
        yield view


class SegmentReader:
    """A stretch of segments as the readable, seekable file that HTTP clients take as a body."""

    def __init__(self, segments: Sequence[memoryview], start: int, end: int) -> None:
        self._slices = _stretch(segments, start, end)
        self._length = sum(len(piece) for piece in self._slices)
        self.seek(0)

    def __len__(self) -> int:
        return self._length

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move as in any file; HTTP clients do so to send a body again."""
        position = offset + (0 if whence == 0 else self.tell() if whence == 1 else self._length)
        self._left = _stretch(self._slices, position, self._length)[::-1]
        return self.tell()

    def tell(self) -> int:
        """Bytes read so far."""
        return self._length - sum(len(piece) for piece in self._left)

    def read(self, size: int | None = -1) -> bytes:
        """Up to ``size`` bytes (fewer at the border of a segment), none at the end, or all."""
        if size is None or size < 0:
            rest, self._left = b"".join(reversed(self._left)), []
            return rest
        if not self._left:
            return b""
        piece = self._left.pop()
        if len(piece) > size:
            self._left.append(piece[size:])
        return bytes(piece[:size])


def _stretch(segments: Sequence[memoryview], start: int, end: int) -> list[memoryview]:
    """The parts of segments that lie between two offsets, without empty ones."""
    pieces = []
    offset = 0
    for segment in segments:
        piece = segment[max(start - offset, 0) : max(end - offset, 0)]
        offset += len(segment)
        if piece:
            pieces.append(piece)
    return pieces
