"""Who asks for a log gets its lines at once, those to come as they come, and the last words."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from flame_broker.frames import encode
from flame_broker.messages import (
    Call,
    CallFrame,
    CallSpec,
    Event,
    EventFrame,
    EventKind,
    Result,
    ResultFrame,
    Status,
    Target,
)
from flame_orchestrator import following
from flame_orchestrator.database import open_database
from flame_orchestrator.following import Following
from flame_orchestrator.history import History
from flame_orchestrator.ledger import Arrival, Ledger
from flame_orchestrator.log_reader import LogReader
from flame_orchestrator.logs import Logs
from lab.bench import KEYRING

KEY = KEYRING.signer


class Desk:
    """A history and its logs, written by hand."""

    def __init__(self, engine: Engine, threads: ThreadPoolExecutor) -> None:
        self._ledger, self._logs = Ledger(engine), Logs(engine, limit_bytes=10**6)
        self.behind = False
        self.following = Following(
            LogReader(engine, None), History(engine), threads, lambda: self.behind
        )

    def queue(self) -> None:
        frame = CallFrame("q", "r", "c", CallSpec(Target("m:f")), (Call(1, b""),))
        self._ledger.record([Arrival(frame, encode(frame, KEY))])

    def end(self) -> None:
        frame = ResultFrame("r", "c", "w", (Result(1, Status.OK, b""),))
        self._ledger.record([Arrival(frame, encode(frame, KEY))])

    def print(self, text: str, index: int) -> None:
        said = Event(1, EventKind.STDOUT, text, 0.0, 1, index)
        self.following.tell(self._logs.write([EventFrame("l", "c", "w", "f", (said,))]).calls)

    async def ask(self, since: int = 0, wait_s: float = 0.0) -> dict[str, Any]:
        asked = {"call": "c-1", "since": since, "wait_s": wait_s}
        return await self.following.answer(asked, KEY)


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    engine = open_database(f"sqlite:///{tmp_path}/ledger.sqlite")
    with ThreadPoolExecutor(2) as threads:
        yield Desk(engine, threads)
    engine.dispose()


def lines(answer: dict[str, Any]) -> list[str]:
    return [text for _, _, _, part in answer["parts"] for _, _, text in part]


async def test_lines_that_are_there_come_at_once_and_others_when_they_are_written(
    desk: Desk,
) -> None:
    desk.queue()
    desk.print("a", 0)
    there = await desk.ask(wait_s=60)
    assert (lines(there), there["next"], there["more"], there["ended"]) == (["a"], 1, False, False)
    coming = asyncio.ensure_future(desk.ask(since=1, wait_s=60))
    await asyncio.sleep(0)
    assert not coming.done()
    desk.print("b", 1)
    assert lines(await coming) == ["b"]
    nothing = await desk.ask(since=2)
    assert (nothing["parts"], nothing["known"], nothing["state"]) == ((), True, "queued")


async def test_the_last_words_of_a_call_are_waited_for_and_then_it_is_over(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "_LAST_WORDS_S", 60.0)
    desk.queue()
    desk.end()
    asking = asyncio.ensure_future(desk.ask(wait_s=60))
    await asyncio.sleep(0)
    desk.print("late", 0)
    last = await asking
    assert (lines(last), last["state"], last["ended"]) == (["late"], "succeeded", False)
    monkeypatch.setattr(following, "_LAST_WORDS_S", 0.0)
    assert (await desk.ask(since=1, wait_s=60))["ended"]
    monkeypatch.setattr(following, "_BEHIND_S", 60.0)
    desk.behind = True
    more = asyncio.ensure_future(desk.ask(since=1, wait_s=60))
    await asyncio.sleep(0)
    desk.print("later still", 1)
    assert lines(await more) == ["later still"]


async def test_a_call_that_nobody_knows_is_waited_for_a_moment_only(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "_ON_ITS_WAY_S", 0.0)
    assert not (await desk.ask(wait_s=60))["known"]
    desk.print("heard before the call itself", 0)
    assert (await desk.ask())["known"]
