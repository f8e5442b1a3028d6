"""Exit codes of the ``flame`` command, and which error ends with which.

They are part of the public contract: scripts and schedulers branch on them. 22 is ``EINVAL``, 69
is ``EX_UNAVAILABLE`` of sysexits.h, 130 is what a shell reports for SIGINT (128 + 2).
"""

from __future__ import annotations

from typing import Final

from flame_broker.errors import (
    BrokerUnavailable,
    ConfigError,
    FlameError,
    ObjectNotFound,
    ResourceError,
    StoreError,
)

__all__ = [
    "CONFIG_ERROR",
    "DONE",
    "INTERRUPTED",
    "UNREACHABLE",
    "USAGE",
    "WORK_FAILED",
    "exit_code",
]

DONE: Final = 0
WORK_FAILED: Final = 1
USAGE: Final = 2
CONFIG_ERROR: Final = 22
UNREACHABLE: Final = 69
INTERRUPTED: Final = 130

# The first that fits counts, so a special case stands before its parent.
_CODES: Final[tuple[tuple[type[FlameError], int], ...]] = (
    (ConfigError, CONFIG_ERROR),
    (ResourceError, CONFIG_ERROR),
    (BrokerUnavailable, UNREACHABLE),
    (ObjectNotFound, WORK_FAILED),  # the store answered
    (StoreError, UNREACHABLE),
)


def exit_code(error: FlameError) -> int:
    """The code that a command ends with when this error reaches its top."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), WORK_FAILED)
