"""Finding the programs that the lab's services are made of."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

__all__ = ["MissingService", "program"]


class MissingService(Exception):
    """A program that the lab needs is not on this machine; the message says what to install."""


def program(candidates: Sequence[str], *, package: str) -> str:
    """Return the path of the first of these programs that exists.

    Args:
        candidates: Names to look up on ``PATH``, or absolute paths.
        package: What to install when none is there, for the message.

    Raises:
        MissingService: None of them exists.
    """
    system_folders = "/usr/local/sbin:/usr/sbin:/sbin"  # a plain user's PATH lacks them
    for candidate in candidates:
        found = shutil.which(candidate) or shutil.which(candidate, path=system_folders)
        if found:
            return found
    raise MissingService(f"none of {', '.join(candidates)} is installed: install {package}")
