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
from functools import cached_property
from typing import TYPE_CHECKING, Final, cast

if TYPE_CHECKING:
    import structlog

__all__ = ["Logger", "get_logger", "show_logs"]

_ORDER: Final = ["timestamp", "level", "event"]


class Logger:
    """Lines of ``event key=value …``.

    structlog takes 40 ms to load (it loads rich), so it comes with the first line that is shown.

    Args:
        name: Below ``flame``, as ``flame.worker``.
    """

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def debug(self, event: str, **fields: object) -> None:
        """What helps to find a fault."""
        self._write(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: object) -> None:
        """What happens in a life without faults."""
        self._write(logging.INFO, event, fields)

    def warning(self, event: str, **fields: object) -> None:
        """What somebody should look at."""
        self._write(logging.WARNING, event, fields)

    def error(self, event: str, **fields: object) -> None:
        """What failed."""
        self._write(logging.ERROR, event, fields)

    def exception(self, event: str, **fields: object) -> None:
        """What failed, with the trace of the exception that is being handled."""
        self._write(logging.ERROR, event, {"exc_info": True, **fields})

    def _write(self, level: int, event: str, fields: dict[str, object]) -> None:
        if self._logger.isEnabledFor(level):
            self._renderer.log(level, event, **fields)

    @cached_property
    def _renderer(self) -> structlog.stdlib.BoundLogger:
        import structlog

        return cast(
            structlog.stdlib.BoundLogger,
            structlog.wrap_logger(
                self._logger,
                processors=[
                    structlog.stdlib.add_log_level,
                    structlog.processors.TimeStamper(fmt="iso", utc=True),
                    structlog.processors.format_exc_info,
                    structlog.processors.LogfmtRenderer(key_order=_ORDER),
                ],
                wrapper_class=structlog.stdlib.BoundLogger,
                cache_logger_on_first_use=True,
            ),
        )


def get_logger(name: str) -> Logger:
    """A logger.

    Args:
        name: Below ``flame``, as ``flame.worker``.
    """
    return Logger(name)


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
