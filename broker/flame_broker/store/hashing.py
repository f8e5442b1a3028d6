"""sha256 of values and files, in one pass and without copies."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from flame_broker.errors import StoreError

if TYPE_CHECKING:
    from hashlib import _Hash

__all__ = ["check_content", "check_size", "sha256_of", "sha256_of_file", "update_from_file"]

_CHUNK_BYTES = 1024 * 1024


def sha256_of(segments: Iterable[memoryview]) -> str:
    """The sha256 of segments in order, as hex."""
    digest = hashlib.sha256()
    for segment in segments:
        digest.update(segment)
    return digest.hexdigest()


def sha256_of_file(path: Path) -> str:
    """The sha256 of a file's content, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def update_from_file(digest: _Hash, fd: int, start: int, end: int) -> None:
    """Add the bytes ``start`` to ``end`` of an open file to a digest."""
    chunk = memoryview(bytearray(_CHUNK_BYTES))
    while start < end:
        count = os.preadv(fd, [chunk[: end - start]], start)
        if count == 0:
            return
        digest.update(chunk[:count])
        start += count


def check_content(
    what: str, found: tuple[str, int], *, sha256: str | None, size: int | None
) -> None:
    """Compare what was read with what was asked for.

    Args:
        what: The object, for the message.
        found: sha256 and length of what was read.
        sha256: What it must have, if that is known.
        size: How long it must be in bytes, if that is known.

    Raises:
        StoreError: It is another content: damaged, cut short, or replaced.
    """
    check_size(what, found[1], sha256=sha256, size=size)
    if sha256 is not None and found[0] != sha256:
        raise StoreError(
            f"{what} has sha256 {found[0]} where {sha256} was put: it is damaged or was replaced"
        )


def check_size(what: str, found: int, *, sha256: str | None, size: int | None) -> None:
    """The part of ``check_content`` that needs no reading.

    Raises:
        StoreError: It has another length.
    """
    if size is not None and found != size:
        raise StoreError(
            f"{what} has {found} bytes where {size} were put (sha256 {sha256 or 'not known'}):"
            " it is cut short or was replaced"
        )
