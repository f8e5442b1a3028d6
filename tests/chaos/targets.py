"""What the calls do, in the workers' children: leave traces, take their time, succeed or fail."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path
from random import Random
from typing import NamedTuple

import flame

__all__ = ["SEAT", "Value", "body", "work"]

SEAT = "CHAOS_SEAT"
"""Names a worker's place in the environment of its children."""


class Value(NamedTuple):
    """What a call returns.

    Attributes:
        number: The number of the call in the plan.
        run: Which of its runs this is from.
        body: What its number and size make of it.
    """

    number: int
    run: str
    body: bytes


def body(number: int, size_bytes: int) -> bytes:
    """The one right body of a call's result."""
    return Random(number).randbytes(size_bytes)


def work(folder: str, number: int, seconds: float, size_bytes: int, failures: int) -> Value:
    """Run for a while, note the beginning and the end, and fail on the first attempts.

    Args:
        folder: Where traces are left.
        number: The number of the call in the plan.
        seconds: How long.
        size_bytes: Of the body of the result.
        failures: How many attempts fail.

    Raises:
        ConnectionResetError: This attempt is one of those that fail.
    """
    call = flame.current_call()
    attempt = 1 if call is None else call.attempt
    run = f"{os.environ.get(SEAT, '-')} {os.getpid()} {attempt} {secrets.token_hex(6)}"
    busy = Path(folder, "busy", str(os.getpid()))
    busy.write_text(f"{os.getppid()}")
    _note(folder, number, f"began {run}")
    try:
        time.sleep(seconds)
        _note(folder, number, f"ended {run}")
    finally:
        busy.unlink(missing_ok=True)
    if attempt <= failures:
        raise ConnectionResetError(f"attempt {attempt} of call {number} is one that fails")
    return Value(number, run.rsplit(maxsplit=1)[-1], body(number, size_bytes))


def _note(folder: str, number: int, words: str) -> None:
    # One write to a file that is open for appending: lines of two runs do not mix.
    with Path(folder, "runs", str(number)).open("a") as file:
        file.write(f"{words} {time.time():.6f}\n")
