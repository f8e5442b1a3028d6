"""Progress bars: on a terminal only, only for what takes a while, never in the way."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from flame.waiting import wait_for_all

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from flame.futures import ObjectFuture

__all__ = ["Bar", "on_terminal", "watch"]

_PATIENCE_S: Final = 0.5  # what is over sooner shows no bar
_TICK_S: Final = 0.1

_screen = threading.Lock()  # held by the bar that is shown


def on_terminal() -> bool:
    """Whether a person is watching."""
    return sys.stderr is not None and sys.stderr.isatty()


class Bar:
    """A bar that appears after half a second, if at all; never below another one.

    Args:
        label: What is going on.
        total: How many steps it has, if that is known.
    """

    def __init__(self, label: str, total: float | None) -> None:
        self._label = label
        self._total = total
        self._done = 0.0
        self._shown = on_terminal()
        self._since = monotonic()
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def advance(self, steps: float) -> None:
        """Some more is done."""
        self.update(self._done + steps)

    def update(self, done: float, text: str = "") -> None:
        """So much is done."""
        self._done = done
        if not self._shown:
            return
        if self._progress is None and monotonic() - self._since > _PATIENCE_S:
            if not _screen.acquire(blocking=False):
                return
            self._appear()
        if self._progress is not None and self._task is not None:
            label = f"{self._label} {text}".rstrip()
            self._progress.update(self._task, completed=done, description=label)

    def wait(self, wait: Callable[[float | None], bool], timeout: float | None = None) -> bool:
        """Wait for something, drawing meanwhile; False if it took longer than ``timeout``."""
        if not self._shown:
            return wait(timeout)
        deadline = None if timeout is None else monotonic() + timeout
        while not wait(_tick(deadline)):
            if deadline is not None and monotonic() >= deadline:
                return False
            self.update(self._done)
        return True

    def close(self) -> None:
        """Leave the finished bar on the screen and give the terminal back."""
        self._shown = False
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            _screen.release()

    def _appear(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task(self._label, total=self._total)
        self._progress.start()


def watch(futures: Sequence[ObjectFuture[Any]], timeout: float | None) -> bool:
    """Wait for all; with a bar on a terminal.

    Returns:
        False if they were not all done in time.
    """
    if not on_terminal():
        return wait_for_all(futures, timeout)
    deadline = None if timeout is None else monotonic() + timeout
    bar = Bar(_label_of(futures), len(futures))
    try:
        for future in futures:
            while not future.wait(_tick(deadline)):
                if deadline is not None and monotonic() >= deadline:
                    return False
                _draw(bar, futures)
        _draw(bar, futures)
    finally:
        bar.close()
    return True


def _tick(deadline: float | None) -> float:
    return _TICK_S if deadline is None else max(0.0, min(_TICK_S, deadline - monotonic()))


def _draw(bar: Bar, futures: Sequence[ObjectFuture[Any]]) -> None:
    if len(futures) == 1:
        fraction, text = futures[0].progress
        bar.update(fraction, text)
    else:
        bar.update(sum(future.done() for future in futures))


def _label_of(futures: Sequence[ObjectFuture[Any]]) -> str:
    labels = {future.label for future in futures}
    return labels.pop() if len(labels) == 1 else f"{len(futures)} calls"
