"""Logs: a stable event name plus fields, through the standard library's loggers.

A library never prints on its own: the program that uses it decides. So every line goes to a
``logging`` logger under ``flame``; by default only warnings show, on standard error.

Example:
    >>> log = get_logger("flame.worker")
    >>> log.warning("child.lost", slot=1, reason="killed by SIGKILL")
"""

from __future__ import annotations

import logging
import sys
from typing import Final, cast

import structlog

__all__ = ["get_logger", "show_logs"]

_ORDER: Final = ["timestamp", "level", "event"]


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger whose lines are ``event key=value …``.

    Args:
        name: Below ``flame``, as ``flame.worker``.
    """
    return cast(
        structlog.stdlib.BoundLogger,
        structlog.wrap_logger(
            logging.getLogger(name),
            processors=[
                structlog.stdlib.filter_by_level,
                structlog.stdlib.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.processors.format_exc_info,
                structlog.processors.LogfmtRenderer(key_order=_ORDER),
            ],
            wrapper_class=structlog.stdlib.BoundLogger,
            cache_logger_on_first_use=True,
        ),
    )


def show_logs(*, verbose: bool = False) -> None:
    """Show this program's logs on standard error: from INFO on, or all of them.

    For programs (a daemon, a command); a library leaves it to its user.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("flame")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
