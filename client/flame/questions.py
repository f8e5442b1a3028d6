"""What can be asked of a cluster without making a call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from flame.inquiry import Enough, Facts, Inquiry
from flame_broker.messages import parse_call_id
from flame_broker.topology import DEFAULT_POOL

if TYPE_CHECKING:
    from flame.depths import QueueDepth
    from flame.logs import LogLine

__all__ = ["Questions"]

T = TypeVar("T")


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

    def drain_worker(self, name: str) -> None:
        """Tell a worker to finish what runs, hand back the rest and leave. Does not wait for it."""
        self._ask(lambda inquiry: inquiry.order("drain", {"worker": name}))

    def queues(self, pools: Sequence[str] = (DEFAULT_POOL,)) -> list[QueueDepth]:
        """How much waits in the queues of these pools, in the ledger and in our reply queue.

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
        found = answer.get("calls")
        return (
            [facts for facts in found if isinstance(facts, dict)]
            if isinstance(found, tuple)
            else []
        )

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
