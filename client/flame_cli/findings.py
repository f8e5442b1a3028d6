"""What ``flame doctor`` finds: one line each, with a verdict and a remedy."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from flame_broker.errors import FlameError
from flame_cli.exits import DONE, WORK_FAILED, exit_code

__all__ = ["Finding", "Verdict"]


class Verdict(StrEnum):
    """How well something is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: What was looked at, in one word.
        verdict: How well it is.
        text: What was found.
        remedy: What to do; ``""`` if it is well.
        code: What the command should exit with because of this.
    """

    check: str
    verdict: Verdict
    text: str
    remedy: str = ""
    code: int = DONE

    @classmethod
    def ok(cls, check: str, text: str) -> Self:
        """All is well."""
        return cls(check, Verdict.OK, text)

    @classmethod
    def warn(cls, check: str, text: str, remedy: str) -> Self:
        """It works, and something will not."""
        return cls(check, Verdict.WARN, text, remedy)

    @classmethod
    def fail(
        cls, check: str, problem: FlameError | str, remedy: str, code: int = WORK_FAILED
    ) -> Self:
        """It does not work; an error brings its exit code along."""
        if isinstance(problem, FlameError):
            code = exit_code(problem)
        return cls(check, Verdict.FAIL, str(problem), remedy, code)
