"""Questions to the cluster that are no calls: who works here, how far is the broker, what waits.

Every method is a coroutine of the loop that the transport lives in.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from time import perf_counter, time
from typing import TYPE_CHECKING, Final

from flame.answers import Answers
from flame_broker.errors import BrokerUnavailable, ConfigError, FlameError, NoOrchestrator
from flame_broker.frames import encode
from flame_broker.keys import Key, Keyring
from flame_broker.messages import ControlFrame, Plain
from flame_broker.topology import control_exchange, questions_queue
from flame_broker.transport import Transport, Unroutable

if TYPE_CHECKING:
    from flame.depths import QueueDepth

__all__ = ["Enough", "Facts", "Inquiry"]

Facts = Mapping[str, Plain]
"""What a worker says about itself, and ``clock_skew_s``: how far its clock is from ours."""

Enough = Callable[[Sequence[Facts]], bool]

_PATIENCE_S: Final = 10.0
_NO_ORCHESTRATOR: Final = (
    "no orchestrator has ever run on this broker with this key, and it keeps the history, the logs "
    "and the schedules: start `flame-orchestrator` beside it"
)
_RUNNING_ANSWER_S: Final = 1.0
_COUNTERS_A_FRAME: Final = 10_000


class Inquiry:
    """Asks, and waits for the answers on the client's reply queue.

    Args:
        transport: Where the cluster is.
        keyring: The first key signs and names the queues.
        answers: Tells of control frames that arrive.
        reply_queue: Where the answers come to.
    """

    def __init__(
        self,
        transport: Transport,
        keyring: Keyring,
        answers: Answers,
        reply_queue: Callable[[], str],
    ) -> None:
        self._transport = transport
        self._keyring = keyring
        self._key: Key = keyring.signer
        self._answers = answers
        self._reply_queue = reply_queue

    @property
    def reaches_workers(self) -> bool:
        """Whether there is a way to ask all workers at all."""
        return self._transport.capabilities.fanout

    async def workers(self, timeout_s: float, enough: Enough | None) -> list[Facts]:
        """Collect what the workers of this key say, until enough have or the time is over."""
        found: dict[str, Facts] = {}
        complete = asyncio.Event()
        asked_at = time()

        def take(frame: ControlFrame) -> None:
            if frame.verb == "here":
                name = str(frame.arguments.get("worker"))
                found[name] = _with_skew(frame.arguments, asked_at)
                if enough is not None and enough([*found.values()]):
                    complete.set()

        with self._answers.listening(take):
            await self.order("hello", {"reply": self._reply_queue()})
            await _wait(complete, timeout_s)
        return [found[name] for name in sorted(found)]

    async def expire(self, client: str, counters: Sequence[int]) -> set[int]:
        """Have calls of ours dropped that have not started; those that have, as workers say.

        Raises:
            BrokerUnavailable: The workers could not be told, or no answer could have come.
        """
        running: set[int] = set()

        def take(frame: ControlFrame) -> None:
            started = frame.arguments.get("counters")
            if frame.verb == "running" and isinstance(started, tuple):
                running.update(n for n in started if isinstance(n, int))

        with self._answers.listening(take):
            for first in range(0, len(counters), _COUNTERS_A_FRAME):
                part = tuple(counters[first : first + _COUNTERS_A_FRAME])
                told: dict[str, Plain] = {"client": client, "counters": part}
                await self.order("expire", {**told, "reply": self._reply_queue()})
            await asyncio.sleep(_RUNNING_ANSWER_S)
            await self.echo()  # it comes behind answers, and results, that are here but unread
        return running

    async def order(self, verb: str, arguments: Mapping[str, Plain]) -> None:
        """Say something to all workers of this key.

        Raises:
            ConfigError: The broker has no way to reach all of them.
        """
        if not self.reaches_workers:
            raise ConfigError(
                f"this broker ({self._transport.server}) has no fan-out: its workers cannot be "
                "asked who they are or told to leave; see their logs and health files"
            )
        exchange = control_exchange(self._key.hex_id)
        body = encode(ControlFrame(exchange, verb, arguments), self._key)
        async with _patience():
            await self._transport.publish("", body, exchange=exchange, mandatory=False)

    async def ask(
        self, question: str, *, patience_s: float = _PATIENCE_S, **arguments: Plain
    ) -> Mapping[str, Plain]:
        """Put a question to the orchestrator.

        Args:
            question: As ``flame_orchestrator.answers`` knows it.
            patience_s: How long to wait for the answer.
            arguments: What belongs to the question.

        Raises:
            NoOrchestrator: None has ever run for this key, or none answered in time.
            FlameError: It said what was wrong with the question.
        """
        token, answered = secrets.token_hex(8), asyncio.Event()
        answer: dict[str, Plain] = {}

        def take(frame: ControlFrame) -> None:
            if frame.verb == "answer" and frame.arguments.get("token") == token:
                answer.update(frame.arguments)
                answered.set()

        queue = questions_queue(self._key.hex_id).name
        asked = {**arguments, "question": question, "token": token, "reply": self._reply_queue()}
        body = encode(ControlFrame(queue, "ask", asked), self._key)
        with self._answers.listening(take):
            try:
                async with _patience():
                    await self._transport.publish(queue, body)
            except Unroutable as exc:
                raise NoOrchestrator(_NO_ORCHESTRATOR) from exc
            if not await _wait(answered, patience_s):
                raise NoOrchestrator(f"no answer within {patience_s:g} s: {_NO_ORCHESTRATOR}")
        absent = answer.get("absent")
        if isinstance(absent, str):
            raise NoOrchestrator(absent)
        problem = answer.get("problem")
        if isinstance(problem, str):
            raise FlameError(f"the orchestrator refused: {problem}")
        return answer

    async def echo(self) -> float:
        """Send a message to ourselves; the seconds until it was back.

        Raises:
            BrokerUnavailable: It was not back within 10 s.
        """
        token, back = secrets.token_hex(8), asyncio.Event()

        def take(frame: ControlFrame) -> None:
            if frame.arguments.get("token") == token:
                back.set()

        with self._answers.listening(take):
            queue, started_s = self._reply_queue(), perf_counter()
            body = encode(ControlFrame(queue, "echo", {"token": token}), self._key)
            async with _patience():
                await self._transport.publish(queue, body)
                await back.wait()
            return perf_counter() - started_s

    async def queues(self, pools: Sequence[str]) -> list[QueueDepth]:
        """How much waits in the queues of these pools and in our own; those that exist."""
        from flame.depths import depths

        return await depths(self._transport, self._keyring, pools, self._reply_queue())


def _with_skew(facts: Facts, asked_at: float) -> Facts:
    """A clock that shows a moment between question and answer is right."""
    clock = facts.get("clock")
    if not isinstance(clock, (int, float)):
        return facts
    skew_s = min(clock - asked_at, 0.0) + max(clock - time(), 0.0)
    return {**facts, "clock_skew_s": round(skew_s, 3)}


@asynccontextmanager
async def _patience() -> AsyncIterator[None]:
    """A deadline of our own: that of a publish does not run while the broker has an alarm."""
    try:
        async with asyncio.timeout(_PATIENCE_S):
            yield
    except TimeoutError as exc:
        raise BrokerUnavailable(
            f"the broker is connected and took no message within {_PATIENCE_S:g} s; a memory or "
            "disk alarm does that, its log and its management page tell"
        ) from exc


async def _wait(event: asyncio.Event, timeout_s: float) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return False
    return True
