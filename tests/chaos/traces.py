"""The runs of calls, as their traces tell."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

__all__ = ["Run", "Traces"]


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a call.

    Args:
        seat: Where: the place of the worker.
        pid: The child.
        attempt: As the call was told.
        name: Unique.
        began: When, in seconds since 1970.
        ended: When; None if it never came to its end.
    """

    seat: str
    pid: int
    attempt: int
    name: str
    began: float
    ended: float | None = None


class Traces:
    """A folder in which each call has a file, and each child at work another.

    Args:
        folder: It is made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "runs").mkdir(parents=True)
        (folder / "busy").mkdir()

    def runs(self, number: int) -> tuple[Run, ...]:
        """The runs of a call, in the order in which they began."""
        path = self.folder / "runs" / str(number)
        return _read(path.read_text()) if path.exists() else ()

    def at_work(self, worker: int) -> list[int]:
        """The children of a worker process that run a call now."""
        found = [int(path.name) for path in (self.folder / "busy").iterdir()]
        return sorted(pid for pid in found if _parent(pid) == worker)


def _read(text: str) -> tuple[Run, ...]:
    begun: dict[str, Run] = {}
    for line in text.splitlines():
        event, seat, pid, attempt, name, at = line.split()
        ended = float(at) if event == "ended" else None
        began = begun[name].began if ended is not None else float(at)
        begun[name] = Run(seat, int(pid), int(attempt), name, began, ended)
    return tuple(begun.values())


def _parent(pid: int) -> int | None:
    try:
        return int(psutil.Process(pid).ppid())
    except psutil.NoSuchProcess:
        return None
