"""``flame.Retry``: what is tried again when it fails, how often, and after how long."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from flame_broker.messages import RetryPolicy

__all__ = ["Retry"]


@dataclass(frozen=True, slots=True)
class Retry:
    """A retry policy, for ``Runner.service(retry=…)``; the orchestrator carries it out.

    The pause before attempt *n + 1* is a random part of ``backoff * factor ** (n - 1)``, at most a
    day: "full jitter", so that calls which failed together do not come back together
    (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).

    Args:
        attempts: In all, the first included.
        backoff: The longest pause before the second attempt.
        factor: By how much it grows with each attempt more.
        jitter: False pauses for the whole of it.
        on: After which exceptions; also those that Flame raises for a call, as
            ``flame.errors.WorkerLost`` or ``CallTimeout``. What was cancelled, has expired or is
            quarantined is never tried again.
        exit_codes: After which exit codes of a call that ends with ``sys.exit``.

    Raises:
        TypeError: An argument is of a wrong type.
        ValueError: It has a value that it cannot have.

    >>> Retry(attempts=5, backoff=timedelta(seconds=2), on=(ConnectionError,)).attempts
    5
    """

    attempts: int = 3
    backoff: timedelta = timedelta(seconds=1)
    factor: float = 2
    jitter: bool = True
    on: type[BaseException] | tuple[type[BaseException], ...] = (Exception,)
    exit_codes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check("attempts", self.attempts, int, "a number such as 3")
        _check("backoff", self.backoff, timedelta, "a timedelta")
        _check("factor", self.factor, (int, float), "a number such as 2")
        kinds: tuple[object, ...] = self._kinds()
        for kind in kinds:
            if not isinstance(kind, type) or not issubclass(kind, BaseException):
                raise TypeError(f"on={self.on!r}: expected exception classes such as (OSError,)")
        for code in self.exit_codes:
            _check("exit_codes", code, int, "numbers such as (75,)")
        if self.attempts < 1:
            raise ValueError(f"attempts={self.attempts}: expected 1 or more, the first included")
        if self.backoff < timedelta(0):
            raise ValueError(f"backoff={self.backoff}: expected no less than 0 seconds")
        if not 1 <= self.factor < float("inf"):
            raise ValueError(f"factor={self.factor}: expected 1 or more")

    def _kinds(self) -> tuple[type[BaseException], ...]:
        return self.on if isinstance(self.on, tuple) else (self.on,)

    @property
    def names(self) -> tuple[str, ...]:
        """The exceptions as workers compare them, ``module.qualname``."""
        return tuple(f"{kind.__module__}.{kind.__qualname__}" for kind in self._kinds())

    @property
    def policy(self) -> RetryPolicy:
        """What the orchestrator is told."""
        seconds = self.backoff.total_seconds()
        return RetryPolicy(self.attempts, seconds, float(self.factor), bool(self.jitter))


def _check(name: str, value: object, kind: type | tuple[type, ...], expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name}={value!r}: expected {expected}")
