"""What the orchestrator is asked, and what it answers.

A question is a control frame ``ask``; the answer a control frame ``answer`` with the same token. A
question may wait: for the end of a call, for as long as the asker says.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Final, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from flame_broker.errors import FlameError
from flame_broker.frames import encode
from flame_broker.keys import Key
from flame_broker.logs import get_logger
from flame_broker.messages import ControlFrame, Plain, Result, parse_call_id
from flame_broker.transport import Transport
from flame_orchestrator.database import in_words
from flame_orchestrator.history import History, Outcome
from flame_orchestrator.states import CallState
from flame_orchestrator.threads import in_thread

__all__ = ["Answers", "Question"]

_log = get_logger("flame.orchestrator")

_MOST_ROWS: Final = 10_000
_LONGEST_WAIT_S: Final = 60.0
_MOST_CANCELLED: Final = 100_000  # as many as a worker remembers

T = TypeVar("T")
Arguments = Mapping[str, Any]
Question = Callable[[Arguments, Key], Awaitable[dict[str, Plain]]]


class Answers:
    """Answers questions from the history.

    Args:
        transport: Where the answers go.
        history: What is known.
        thread: Where it is read.
        look_every_s: How soon to see an outcome that another process has written.
    """

    def __init__(
        self,
        transport: Transport,
        history: History,
        thread: Executor,
        *,
        look_every_s: float = _LONGEST_WAIT_S,
    ) -> None:
        self._look_every_s = look_every_s
        self._transport = transport
        self._history = history
        self._thread = thread
        self._news = asyncio.Event()
        self._waiters: dict[tuple[str, int], set[asyncio.Event]] = defaultdict(set)
        self._questions: dict[str, Question] = {
            "calls": self._calls,
            "story": self._story,
            "outcome": self._outcome,
            "again": self._again,
            "cancelled": self._cancelled,
        }

    def add(self, question: str, answer: Question) -> None:
        """Have questions of this name answered by somebody else."""
        self._questions[question] = answer

    def tell(self, ended: Mapping[str, set[int]]) -> None:
        """Frames were written: wake who waits for them, or for the end of calls."""
        news, self._news = self._news, asyncio.Event()
        news.set()
        if self._waiters:
            for client, counters in ended.items():
                for counter in counters:
                    for event in self._waiters.get((client, counter), ()):
                        event.set()

    async def answer(self, frame: ControlFrame, key: Key) -> None:
        """Answer one question; what is wrong with it is the answer too."""
        asked = frame.arguments
        reply, token = str(asked.get("reply", "")), asked.get("token")
        question = self._questions.get(str(asked.get("question")), self._unknown)

        def say(answer: dict[str, Plain]) -> bytes:
            return encode(ControlFrame(reply, "answer", {**answer, "token": token}), key)

        try:
            said = say(await question(asked, key))
        except (FlameError, LookupError, ValueError, TypeError) as problem:
            said = say({"problem": str(problem)})
        except SQLAlchemyError as problem:
            said = say({"problem": f"its database cannot be read: {in_words(problem)}"})
        try:
            await self._transport.publish(reply, said)
        except FlameError as problem:
            _log.info("answer.not_sent", reason=str(problem))

    async def _unknown(self, asked: Arguments, key: Key) -> dict[str, Plain]:
        raise FlameError(f"this orchestrator knows no question {asked.get('question')!r}")

    async def _calls(self, asked: Arguments, key: Key) -> dict[str, Plain]:
        named = str(asked.get("state", ""))
        if named and named not in [*CallState]:
            raise FlameError(f"state {named!r}: expected one of {', '.join(CallState)}")
        state = CallState(named) if named else None
        limit = min(int(asked.get("limit", 50)), _MOST_ROWS)
        label = str(asked.get("label", ""))
        read = partial(self._history.calls, state=state, label=label, limit=limit)
        return {"calls": tuple(await self._read(read))}

    async def _story(self, asked: Arguments, key: Key) -> dict[str, Plain]:
        """The story of a call; one that is on its way to us may be waited for."""
        read = partial(self._history.story, *parse_call_id(str(asked.get("call"))))
        loop = asyncio.get_running_loop()
        until = loop.time() + min(float(asked.get("known_in_s", 0)), _LONGEST_WAIT_S)
        news = self._news
        while (story := await self._read(read)) is None and loop.time() < until:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await news.wait()
            news = self._news
        return {"call": story}

    async def _outcome(self, asked: Arguments, key: Key) -> dict[str, Plain]:
        """The outcome of a call, waited for; ``state`` alone if it has not ended by then."""
        call = parse_call_id(str(asked.get("call")))
        ended = asyncio.Event()
        self._waiters[call].add(ended)
        try:
            outcome = await self._look_until(call, ended, asked)
        finally:
            self._waiters[call].discard(ended)
            if not self._waiters[call]:
                del self._waiters[call]
        if outcome is None:
            return await self._story(asked, key)
        every = (*outcome.items, outcome.final)
        return {"results": tuple(_wire(result) for result in every)}

    async def _look_until(
        self, call: tuple[str, int], ended: asyncio.Event, asked: Arguments
    ) -> Outcome | None:
        """The outcome, waited for as long as the asker says."""
        loop = asyncio.get_running_loop()
        until = loop.time() + min(float(asked.get("wait_s", 0)), _LONGEST_WAIT_S)
        while (outcome := await self._look(call)) is None and loop.time() < until:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(min(until, loop.time() + self._look_every_s)):
                    await ended.wait()
            ended.clear()
        return outcome

    async def _look(self, call: tuple[str, int]) -> Outcome | None:
        return await self._read(partial(self._history.outcome, *call))

    async def _again(self, asked: Arguments, key: Key) -> dict[str, Plain]:
        """Send results again that a client's lost reply queue may have held."""
        client, reply = str(asked.get("client")), str(asked.get("reply"))
        counters = [int(counter) for counter in asked["counters"]]
        frames = await self._read(partial(self._history.frames_about, client, counters))
        for frame in frames:
            await self._transport.publish(reply, encode(replace(frame, queue=reply), key))
        return {"frames": len(frames)}

    async def _cancelled(self, asked: Arguments, key: Key) -> dict[str, Plain]:
        """What a worker must not start that was not there when it was cancelled."""
        found = await self._read(self._history.cancelled)
        room, told = _MOST_CANCELLED, list[Plain]()
        for client, counters in found.items():
            told.append((client, tuple(sorted(counters)[:room])))
            room = max(0, room - len(counters))
        return {"cancelled": tuple(told)}

    async def _read(self, work: Callable[[], T]) -> T:
        return await in_thread(self._thread, work)


def _wire(result: Result) -> tuple[Plain, ...]:
    ref = None if result.ref is None else result.ref.to_wire()
    return result.counter, int(result.status), result.payload, ref, result.index
