"""The question "logs": what a call has printed, and what it will print next."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from functools import partial
from time import time
from typing import Any, Final, TypeVar

from flame_broker.keys import Key
from flame_broker.messages import Plain, parse_call_id
from flame_orchestrator.history import Facts, History
from flame_orchestrator.log_reader import LogReader, Reading
from flame_orchestrator.logs import Call
from flame_orchestrator.states import TERMINAL

__all__ = ["Following"]

_ANSWER_BYTES: Final = 512 * 1024
_LONGEST_WAIT_S: Final = 60.0
_ON_ITS_WAY_S: Final = 1.0
"""The history hears of a call some milliseconds after its worker."""

_LAST_WORDS_S: Final = 1.0
"""A call's last lines are written somewhat later than its end."""

_BEHIND_S: Final = 10.0
"""The same while more lines arrive than can be written at once."""

_LOOK_EVERY_S: Final = 0.5
"""Its end is not announced to us, and another orchestrator may write its lines."""

_ENDED: Final = {state.value for state in TERMINAL}

T = TypeVar("T")


class Following:
    """Answers from the logs.

    Args:
        reader: Of the lines.
        history: Knows which calls there are, and which have ended.
        thread: Where both are read.
        behind: Whether lines have arrived that are not written yet.
    """

    def __init__(
        self, reader: LogReader, history: History, thread: Executor, behind: Callable[[], bool]
    ) -> None:
        self._behind = behind
        self._reader = reader
        self._history = history
        self._thread = thread
        self._waiting: dict[Call, set[asyncio.Event]] = defaultdict(set)

    def tell(self, calls: Iterable[Call]) -> None:
        """Wake who waits for lines of these calls."""
        for call in calls:
            for news in self._waiting.get(call, ()):
                news.set()

    async def answer(self, asked: Mapping[str, Any], key: Key) -> dict[str, Plain]:
        """The lines from number ``since`` on; waited for up to ``wait_s`` while the call runs."""
        call = parse_call_id(str(asked.get("call")))
        since = max(0, int(asked.get("since", 0)))
        wait_s = min(float(asked.get("wait_s", 0)), _LONGEST_WAIT_S)
        news = asyncio.Event()
        self._waiting[call].add(news)
        try:
            return await self._look(call, since, wait_s, news)
        finally:
            self._waiting[call].discard(news)
            if not self._waiting[call]:
                del self._waiting[call]

    async def _look(
        self, call: Call, since: int, wait_s: float, news: asyncio.Event
    ) -> dict[str, Plain]:
        loop = asyncio.get_running_loop()
        began = loop.time()
        while True:
            news.clear()
            # Its state first: when it has said its last words, they are read after that is known.
            story = await self._read(partial(self._history.story, *call))
            left_s = self._speaks_s(story)
            over = left_s == 0
            reading = await self._read(
                partial(self._reader.read, *call, since, most_bytes=_ANSWER_BYTES)
            )
            if left_s is None:
                known = story is not None or reading.upto
                left_s = began + (wait_s if known else _ON_ITS_WAY_S) - loop.time()
            if reading.parts or left_s <= 0:
                return _answer(story, reading, over=over)
            await _heard(news, min(left_s, _LOOK_EVERY_S))

    def _speaks_s(self, story: Facts | None) -> float | None:
        """How long lines of an ended call may still be on their way; None if it has not ended."""
        if story is None or story["state"] not in _ENDED:
            return None
        ended_at: float | None = story.get("ended_at")
        if ended_at is None:
            return 0.0
        longest_s = _BEHIND_S if self._behind() else _LAST_WORDS_S
        return min(longest_s, max(0.0, ended_at + longest_s - time()))

    async def _read(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _answer(story: Facts | None, reading: Reading, *, over: bool) -> dict[str, Plain]:
    return {
        "known": story is not None or reading.upto > 0,
        "state": "" if story is None else str(story["state"]),
        "parts": tuple(
            (part.attempt, part.worker, part.run, tuple(tuple(line) for line in part.lines))
            for part in reading.parts
        ),
        "next": reading.upto,
        "more": reading.more,
        "ended": over and not reading.more,
    }


async def _heard(news: asyncio.Event, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await news.wait()
    except TimeoutError:
        return
