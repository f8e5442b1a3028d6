"""The end of the program: which calls it waits for, and when it does not."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from flame.waiting import wait_for_all
from flame_broker.logs import get_logger

if TYPE_CHECKING:
    from flame.futures import ObjectFuture

__all__ = ["Leaving", "leaving"]

_SILENT_S: Final = 2.0

_log = get_logger("flame.client")


class Leaving:
    """Waits, as the interpreter ends, for calls that would else be lost; Ctrl-C ends that."""

    def __init__(self) -> None:
        self._told = False
        self._interrupted = False

    def wait_for(self, futures: Iterable[ObjectFuture[Any]]) -> None:
        """Wait for those that do not end with their client, and say so if it takes a while."""
        if not self._interrupted and not _ended_by_ctrl_c():
            self.quietly(lambda: self._wait({f for f in futures if not f.ends_with_client}))

    def quietly(self, work: Callable[[], object]) -> None:
        """Do something of the end; Ctrl-C leaves it without a trace, and all waiting after it."""
        try:
            work()
        except KeyboardInterrupt:
            self._interrupted = True

    def say_how(self) -> None:
        """Have the exit status of a program that Ctrl-C has ended say so, whatever ran since.

        CPython keeps that in a flag, which code that is made from text clears, as libraries do
        when they are imported; such code that is interrupted sets it (``run_eval_code_obj``).
        """
        if _ended_by_ctrl_c():
            with suppress(KeyboardInterrupt):
                exec("raise KeyboardInterrupt")  # noqa: S102  # our own text

    def _wait(self, futures: set[ObjectFuture[Any]]) -> None:
        if not self._told and not wait_for_all(futures, _SILENT_S):
            self._told = True
            left = sum(not future.done() for future in futures)
            _log.warning(
                "program.waits", reason=f"{left} calls have not ended", remedy="Ctrl-C leaves them"
            )
        wait_for_all(futures)


def _ended_by_ctrl_c() -> bool:
    """Whether Ctrl-C has ended the program; at a prompt it ends a command only."""
    kind = getattr(sys, "last_type", None)
    return kind is KeyboardInterrupt and not hasattr(sys, "ps1")


leaving = Leaving()
