"""Makes the calls of a plan, and notes what the client sees of each."""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import CancelledError
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import flame
from chaos.plan import ATTEMPTS, CallKind, PlannedCall
from chaos.targets import Value, body, work
from flame.errors import FlameError, WorkerLost

__all__ = ["CANCELLED", "VALUE", "Caller", "Seen"]

VALUE = "value"
CANCELLED = "cancelled"

_BACKOFF = timedelta(seconds=0.3)


@dataclass(frozen=True, slots=True)
class Seen:
    """What the client saw of a call.

    Args:
        id: The call's.
        made: When it was made, in seconds since 1970.
        resolved: When its future was; 0.0 if it never was.
        times: How often.
        end: ``value``, ``cancelled``, or the name of an error; ``""`` if it never ended.
        run: Which run its value is from.
        right: Whether the value, or the message of its own error, is the right one.
        detail: The message of an error, or what is wrong with the value.
        cancelled: When a cancel was asked for; 0.0 if it was not.
    """

    id: str
    made: float
    resolved: float = 0.0
    times: int = 0
    end: str = ""
    run: str = ""
    right: bool = True
    detail: str = ""
    cancelled: float = 0.0


class Caller:
    """Makes calls and watches their futures.

    Args:
        runner: Whose services they are calls of.
        folder: Where the calls leave their traces.
    """

    def __init__(self, runner: flame.Runner, folder: Path) -> None:
        self._folder = str(folder)
        self._plain = runner.service(work)
        policy = flame.Retry(
            ATTEMPTS, backoff=_BACKOFF, factor=1.5, on=(ConnectionError, WorkerLost)
        )
        self._retried = runner.service(work, retry=policy)
        self._once = runner.service(work, delivery="at_most_once")
        self._futures: dict[int, flame.ObjectFuture[Value]] = {}
        self._made: dict[int, float] = {}
        self._cancelled: dict[int, float] = {}
        self._resolved: dict[int, float] = {}
        self._times: Counter[int] = Counter()

    @property
    def made(self) -> int:
        """How many calls were made."""
        return len(self._futures)

    @property
    def done(self) -> int:
        """How many of them have ended."""
        return len(self._resolved)

    def make(self, call: PlannedCall) -> None:
        """Make a call now."""
        service: Any = self._plain
        if call.attempts:
            service = self._retried
        elif call.kind is CallKind.AT_MOST_ONCE:
            service = self._once
        elif call.delay_s:
            service = self._plain.options(not_before=call.delay_s)
        self._made[call.number] = time.time()
        future = service(self._folder, call.number, call.seconds, call.size_bytes, call.failures)
        self._futures[call.number] = future
        future.add_done_callback(lambda _: self._ended(call.number))

    def cancel(self, call: PlannedCall) -> None:
        """Cancel a call, unless it has ended."""
        at = time.time()
        if self._futures[call.number].cancel():
            self._cancelled[call.number] = at

    def _ended(self, number: int) -> None:
        self._times[number] += 1
        self._resolved.setdefault(number, time.time())

    def seen(self, call: PlannedCall) -> Seen:
        """What came of a call, once."""
        number = call.number
        future = self._futures.pop(number)
        facts: dict[str, Any] = {
            "id": future.id,
            "made": self._made[number],
            "resolved": self._resolved.get(number, 0.0),
            "times": self._times[number],
            "cancelled": self._cancelled.get(number, 0.0),
        }
        return Seen(**facts, **(_end(call, future) if future.done() else {}))


def _end(call: PlannedCall, future: flame.ObjectFuture[Value]) -> dict[str, Any]:
    try:
        value = future.result(0)
    except CancelledError:
        return {"end": CANCELLED}
    except ConnectionResetError as error:
        last = f"attempt {max(1, call.attempts)} of call {call.number} is one that fails"
        right = str(error) == last
        return {"end": type(error).__name__, "right": right, "detail": str(error)}
    except FlameError as error:
        return {"end": type(error).__name__, "detail": str(error)}
    right = tuple(value) == (call.number, value.run, body(call.number, call.size_bytes))
    return {"end": VALUE, "run": value.run, "right": right}
