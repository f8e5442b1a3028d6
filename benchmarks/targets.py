"""The functions that every measured system calls; each system gets exactly these.

They live in a module of their own because most systems send a function by name: the worker
processes import this file too, through `PYTHONPATH`.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any


def noop(value: int) -> int:
    """Return the argument: a call that is nothing but its own overhead."""
    return value


def noop_cold(value: int) -> int:
    """Return the argument; never called before the cold burst, so nothing about it is cached."""
    return value


def echo(payload: bytes) -> bytes:
    """Return the payload: both directions carry its size."""
    return payload


def nap(seconds: float) -> float:
    """Sleep for `seconds`, the stand-in for work that does not compete for a core."""
    time.sleep(seconds)
    return seconds


def started_late(due: float) -> float:
    """How many seconds after `due` (since 1970) this call has started."""
    return time.time() - due


def noted(path: str, seconds: float) -> int:
    """Note when and under which worker this runs; wait in the first run, so that it is lost."""
    with Path(path).open("a") as file:
        file.write(f"{time.time()} {os.getppid()}\n")
    runs = len(Path(path).read_text().splitlines())
    if runs == 1:
        time.sleep(seconds)
    return runs


def column_sum(array: Any, column: int) -> float:
    """Sum one column of a 2-D NumPy array, so that the call really touches the array."""
    return float(array[:, column].sum())
