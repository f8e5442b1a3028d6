"""``flame.attach``: the future of a call that another process has made, perhaps long ago."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from flame.client import default_client
from flame.desk import Desk
from flame.futures import ObjectFuture
from flame.logs import log_of
from flame_broker.errors import CallError, FlameError, NoOrchestrator
from flame_broker.logs import get_logger
from flame_broker.messages import Result, Status, call_id, parse_call_id
from flame_broker.objects import ObjectRef

if TYPE_CHECKING:
    from flame.client import Client, Session
    from flame.inquiry import Inquiry

__all__ = ["attach"]

_log = get_logger("flame.client")

_ON_ITS_WAY_S: Final = 1.0  # the history hears of a call some milliseconds after its worker
_LOOK_S: Final = 20.0
_PATIENCE_S: Final = 40.0
_ATTEMPTS: Final = 5


def attach(call: str, *, client: Client | None = None) -> ObjectFuture[Any]:
    """Follow a call from another process, after a restart, or on another machine.

    Args:
        call: Its id, as ``future.id`` or ``flame ps`` show it.
        client: Who asks; by default the client that was connected last.

    Returns:
        A future like that of the process that made the call. Cancelling it cancels the call, but
        for one of another program's embedded cluster, which only that program can reach.

    Raises:
        ValueError: This is no call id.
        NoOrchestrator: No orchestrator keeps a history here.
        CallError: The history knows no such call.
    """
    owner, counter = parse_call_id(call)
    session = (client or default_client()).session
    known = session.courier.ask(
        lambda inquiry: inquiry.ask("story", call=call, known_in_s=_ON_ITS_WAY_S)
    ).get("call")
    if not isinstance(known, dict):
        raise CallError(f"the history knows no call {call}; `flame ps` lists those it knows", call)
    elsewhere = session.courier.embedded and known.get("key_id") != session.key_id
    desk = _ForeignDesk(owner, session, elsewhere=elsewhere)
    future: ObjectFuture[Any] = ObjectFuture(desk, counter, str(known.get("label", "")))
    session.courier.follow(lambda inquiry: _follow(inquiry, future))
    return future


class _ForeignDesk(Desk):
    """The desk of a call that this process has not made, perhaps of a cluster out of reach."""

    def __init__(self, owner: str, session: Session, *, elsewhere: bool) -> None:
        self._elsewhere = elsewhere
        super().__init__(owner, session.courier, session.values)
        self.lines_of = self._lines_kept

    def withdraw(self, future: ObjectFuture[Any]) -> bool:
        """Give up on the call; it is cancelled where it waits or runs.

        False if its outcome is here already, or its cluster out of reach.
        """
        if self._elsewhere or future.done():
            return False
        self._courier.cancel_foreign(self.client_id, future.counter)
        return True

    def _lines_kept(self, counter: int) -> list[str]:
        lines = log_of(self._courier.ask, call_id(self.client_id, counter))
        return [line.text for line in lines if line.stream != "note"]


async def _follow(inquiry: Inquiry, future: ObjectFuture[Any]) -> None:
    """Ask for the outcome until it is there."""
    failures = 0
    while not future.done():
        try:
            answer = await inquiry.ask(
                "outcome", call=future.id, wait_s=_LOOK_S, patience_s=_PATIENCE_S
            )
            failures = 0
        except NoOrchestrator as problem:
            failures += 1
            _log.info("attached.not_answered", call=future.id, reason=str(problem))
            if failures >= _ATTEMPTS:
                future.fail_call(future.counter, problem)
            continue
        except FlameError as problem:
            future.fail_call(future.counter, problem)
            return
        results = answer.get("results")
        if isinstance(results, tuple) and not future.done():
            _settle(future, [_result(wire) for wire in results])


def _settle(future: ObjectFuture[Any], results: list[Result]) -> None:
    for result in results:
        outcome: Result | None = result
        if result.status is Status.ITEM or result.index:
            outcome = future.follow(result)
        if outcome is not None and outcome.status is not Status.ITEM:
            future.settle(outcome)


def _result(wire: Any) -> Result:
    counter, status, payload, ref, index = wire
    loaded = None if ref is None else ObjectRef.from_wire(ref)
    return Result(counter, Status(status), payload, loaded, index)
