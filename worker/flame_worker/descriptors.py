"""Keeping a child's own descriptors out of the way of the calls it runs."""

from __future__ import annotations

import fcntl
import os
import resource
from typing import Final

__all__ = ["duplicate_high", "move_high"]

_HIGH: Final = 200
"""Beyond what ``os.closerange(3, 64)`` closes, and beyond what a call opens next."""


def duplicate_high(descriptor: int) -> int:
    """A copy of a descriptor with a high number, not inherited by sub-processes."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _HIGH if soft > 2 * _HIGH else 3)


def move_high(descriptor: int) -> int:
    """Give a descriptor a high number instead of its own."""
    moved = duplicate_high(descriptor)
    os.close(descriptor)
    return moved
