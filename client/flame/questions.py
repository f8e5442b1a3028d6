"""What can be asked of a cluster without making a call."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, Final, TypeVar

from flame.inquiry import Enough, Facts, Inquiry
from flame_broker.errors import CallError
from flame_broker.messages import Plain, parse_call_id
from flame_broker.topology import DEFAULT_POOL

if TYPE_CHECKING:
    from flame.depths import QueueDepth
    from flame.logs import LogLine

__all__ = ["Questions"]

T = TypeVar("T")

_MARK_BYTES: Final = 5  # as a client's id, which the mark of a retry becomes


class Questions(ABC):
    """The questions, in the thread of who asks; how they are put is up to the connection."""

    @abstractmethod
    def _ask(self, question: Callable[[Inquiry], Coroutine[None, None, T]]) -> T:
        """Put a question to the cluster and wait for the answer."""

    @property
    @abstractmethod
    def key_id(self) -> str:
        """Which key signs, as queue names show it; it reveals nothing of the key."""

    @property
    @abstractmethod
    def server(self) -> str:
        """What the broker says it is, such as ``RabbitMQ 4.0.5``."""

    @property
    @abstractmethod
    def reaches_workers(self) -> bool:
        """Whether workers can be asked and told; not on a broker without fan-out (SQS)."""

    def workers(self, timeout_s: float = 1.0, *, enough: Enough | None = None) -> list[Facts]:
        """What the workers of this cluster say about themselves, sorted by their names.

        Args:
            timeout_s: How long to wait for answers.
            enough: Stop waiting as soon as this holds for the answers so far.

        Raises:
            ConfigError: The broker has no fan-out, so workers cannot be asked.
        """
        return self._ask(lambda inquiry: inquiry.workers(timeout_s, enough))

    def roll_call(self, timeout_s: float = 1.0, *, name: str = "") -> list[Facts]:
        """The same, and of those that do not answer what an orchestrator has heard last.

        Each has ``answers``, ``heard_at`` (its last heartbeat, in seconds since 1970; None where no
        orchestrator has heard it) and ``running``: calls with ``id``, ``label`` and ``since_at``.

        Args:
            timeout_s: How long to wait for answers.
            name: Only this worker; then without waiting for others.

        Raises:
            ConfigError: The broker has no fan-out, so workers cannot be asked.
        """
        from flame.roll_call import roll_call

        return self._ask(lambda inquiry: roll_call(inquiry, timeout_s, name))

    def drain_worker(self, name: str) -> None:
        """Tell a worker to finish what runs, hand back the rest and leave. Does not wait for it."""
        self._ask(lambda inquiry: inquiry.order("drain", {"worker": name}))

    def queues(self, pools: Sequence[str] = (DEFAULT_POOL,)) -> list[QueueDepth]:
        """How much waits in these pools, for the orchestrator, and in our reply queue.

        Queues that do not exist (yet) are left out.
        """
        return self._ask(lambda inquiry: inquiry.queues(pools))

    def calls(self, *, state: str = "", label: str = "", limit: int = 50) -> list[Facts]:
        """The newest calls that the history knows, of every client of this key.

        Args:
            state: Only those in this state: ``waiting``, ``queued``, ``succeeded``, ``failed``,
                ``cancelled``, ``expired`` or ``quarantined``.
            label: Only those of the service with this name.
            limit: At most so many.

        Raises:
            NoOrchestrator: No orchestrator keeps a history here.
        """
        answer = self._ask(
            lambda inquiry: inquiry.ask("calls", state=state, label=label, limit=limit)
        )
        return _listed(answer.get("calls"))

    def story(self, call: str) -> Facts | None:
        """All that the history knows of a call; None if it knows none of that id.

        Raises:
            ValueError: This is no call id.
            NoOrchestrator: No orchestrator keeps a history here.
        """
        parse_call_id(call)
        found = self._ask(lambda inquiry: inquiry.ask("story", call=call, known_in_s=1.0)).get(
            "call"
        )
        return found if isinstance(found, dict) else None

    def schedules(self) -> list[Facts]:
        """What is known of every schedule of this key, by name.

        Raises:
            NoOrchestrator: No orchestrator runs here.
        """
        return _listed(self._ask(lambda inquiry: inquiry.ask("schedules")).get("schedules"))

    def schedule(self, name: str) -> Facts:
        """All that is known of one schedule, with its latest calls and its next times.

        Raises:
            FlameError: There is none of this name.
            NoOrchestrator: No orchestrator runs here.
        """
        found = self._order("schedule.show", name=name)["schedule"]
        return found if isinstance(found, dict) else {}

    def pause_schedule(self, name: str) -> None:
        """Have a schedule make no more calls; errors are those of ``schedule``."""
        self._order("schedule.pause", name=name)

    def resume_schedule(self, name: str) -> None:
        """Have a schedule go on with its next time from now; errors as ``schedule``."""
        self._order("schedule.resume", name=name)

    def remove_schedule(self, name: str) -> None:
        """Have a schedule forgotten; errors are those of ``schedule``."""
        self._order("schedule.remove", name=name)

    def run_schedule(self, name: str) -> str:
        """Have a schedule make a call now; its id. Errors are those of ``schedule``."""
        return str(self._order("schedule.run", name=name)["call"])

    def retry(self, call: str) -> str:
        """Have a call run again that has ended, as a new one; the id of that.

        Raises:
            ValueError: This is no call id.
            CallError: It is unknown, has not ended, or its arguments are not known.
            NoOrchestrator: No orchestrator runs here.
        """
        parse_call_id(call)
        answer = self._order("retry", call=call)
        if isinstance(refusal := answer.get("refusal"), str):
            raise CallError(refusal, call)
        return str(answer["call"])

    def _order(self, order: str, *, name: str = "", call: str = "") -> Facts:
        """Give an order; said twice on its way, it is carried out once."""
        mark = secrets.token_hex(_MARK_BYTES)
        return self._ask(lambda inquiry: inquiry.ask(order, order=mark, name=name, call=call))

    def log(self, call: str, *, follow: bool = False) -> Iterator[LogLine]:
        """What a tracked call has printed, as far as it is kept, line by line.

        Args:
            call: Its id.
            follow: Go on with what it prints, until it has ended.

        Raises:
            ValueError: This is no call id.
            NoOrchestrator: No orchestrator keeps a history here.
            CallError: The history knows no such call.
        """
        from flame.logs import log_of

        return log_of(self._ask, call, follow=follow)

    def ping_broker(self) -> float:
        """Seconds of one round trip to the broker: published, confirmed, delivered to us.

        Raises:
            BrokerUnavailable: The message was not back within 10 s.
        """
        return self._ask(lambda inquiry: inquiry.echo())


def _listed(found: Plain) -> list[Facts]:
    every = found if isinstance(found, tuple) else ()
    return [facts for facts in every if isinstance(facts, dict)]
