"""What calls have printed, as the orchestrator keeps it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

from flame.inquiry import Inquiry
from flame_broker.errors import CallError, NoOrchestrator
from flame_broker.logs import get_logger
from flame_broker.messages import Plain, parse_call_id

__all__ = ["Ask", "LogLine", "log_of"]

_log = get_logger("flame.client")

_WAIT_S: Final = 2.0  # a question dies with the orchestrator that has it: it is put again soon
_PATIENCE_S: Final = 4.0
_FIRST_PATIENCE_S: Final = 10.0
_ATTEMPTS: Final = 10
_OVER: Final = frozenset({"succeeded", "failed", "cancelled", "expired", "quarantined"})

T = TypeVar("T")


class Ask(Protocol):
    """Puts a question and waits for the answer."""

    def __call__(self, question: Callable[[Inquiry], Coroutine[None, None, T]], /) -> T:
        """The answer."""


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line that a call printed.

    Args:
        at: When its worker heard of it, in seconds since 1970.
        stream: ``stdout`` or ``stderr``; ``note`` where the orchestrator says what is missing.
        text: Without its newline.
        attempt: Of the call.
        worker: Where that ran.
        run: Among the runs of that worker: a call may run again.
    """

    at: float
    stream: str
    text: str
    attempt: int
    worker: str
    run: int


def log_of(ask: Ask, call: str, *, follow: bool = False) -> Iterator[LogLine]:
    """The lines of a call, as far as they are kept.

    Args:
        ask: How to ask the orchestrator.
        call: Its id.
        follow: Go on with what it prints, until it has ended.

    Raises:
        ValueError: This is no call id.
        NoOrchestrator: No orchestrator keeps a history here, or it was away for too long.
        CallError: The history knows no such call.
    """
    parse_call_id(call)
    since = 0
    while True:
        answer = _asked(ask, call, since, follow=follow)
        if not answer.get("known"):
            raise CallError(
                f"the history knows no call {call}; `flame ps` lists those it knows", call
            )
        yield from _lines(answer.get("parts"))
        upto = answer.get("next")
        since = upto if isinstance(upto, int) else since
        goes_on = follow or answer.get("more") or answer.get("state") in _OVER
        if answer.get("ended") or not goes_on:
            return


def _asked(ask: Ask, call: str, since: int, *, follow: bool) -> Mapping[str, Plain]:
    """The next lines. Who follows a call does so while the orchestrator starts anew."""
    again = follow and since > 0
    wait_s, patience_s = (_WAIT_S if follow else 0.0), (_PATIENCE_S if again else _FIRST_PATIENCE_S)
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return ask(
                lambda inquiry: inquiry.ask(
                    "logs", call=call, since=since, wait_s=wait_s, patience_s=wait_s + patience_s
                )
            )
        except NoOrchestrator as problem:
            if not again or attempt == _ATTEMPTS:
                raise
            _log.warning("logs.not_answered", call=call, reason=str(problem), remedy="trying again")
    raise AssertionError("the last attempt returns or raises")


def _lines(parts: Plain) -> Iterator[LogLine]:
    for part in parts if isinstance(parts, tuple) else ():
        match part:
            case (int(attempt), str(worker), int(run), tuple(lines)):
                for line in lines:
                    match line:
                        case (float(at), str(stream), str(text)):
                            yield LogLine(at, stream, text, attempt, worker, run)
