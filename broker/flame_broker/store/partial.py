"""Files that appear under their name only when they are complete."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["PARTIAL_SUFFIX", "PartialFile", "copy_content", "write_all"]

PARTIAL_SUFFIX = ".part"
"""How the name of an unfinished file ends; what a killed process leaves is known by it."""

_FICLONE = 0x40049409
"""Linux ``ioctl``: share another file's extents (``FICLONE`` in linux/fs.h)."""


class PartialFile:
    """A file under construction; it is gone at the end of the ``with`` unless it was placed.

    Args:
        folder: Where it is built; the same file system as where it is placed.
        name: For the reader of a folder listing; a random part is added.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._prefix = f".{name[:80]}."

    def __enter__(self) -> Self:
        fd, name = tempfile.mkstemp(PARTIAL_SUFFIX, self._prefix, self._folder)
        self.fd, self.path = fd, Path(name)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self.fd)
        with suppress(FileNotFoundError):
            self.path.unlink()

    def become_link_to(self, source: Path) -> bool:
        """Turn into another name of ``source``; False where the file system will not have it."""
        # `link` does not replace, and the name must stay ours: hence the second name.
        link = self.path.with_suffix(".link" + PARTIAL_SUFFIX)
        try:
            os.link(source, link)
        except FileNotFoundError:
            raise
        except OSError:
            return False
        link.replace(self.path)
        return True


def copy_content(source: Path, fd: int) -> None:
    """Copy a file into an open empty one, sharing the blocks where the file system can."""
    with source.open("rb") as reader:
        if not _cloned(reader.fileno(), fd):
            with os.fdopen(os.dup(fd), "wb") as writer:
                shutil.copyfileobj(reader, writer, 1024 * 1024)


def _cloned(source_fd: int, fd: int) -> bool:
    try:
        fcntl.ioctl(fd, _FICLONE, source_fd)
    except OSError:
        return False
    return True


def write_all(fd: int, data: memoryview | bytes, position: int) -> int:
    """Write at a position until all is written (the kernel takes 2 GiB at a time).

    Returns:
        The position after the data.
    """
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, position)
        view = view[count:]
        position += count
    return position
