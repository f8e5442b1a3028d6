"""Run timeouts that a worker does not enforce: the orchestrator ends the call, and says so."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TypeVar

import pytest

from flame_broker.connect import open_transport
from flame_broker.frames import decode, encode
from flame_broker.messages import (
    Call,
    CallFrame,
    CallSpec,
    Claim,
    ControlFrame,
    Frame,
    Plain,
    ResultFrame,
    Target,
)
from flame_broker.outcomes import describe
from flame_broker.topology import beats_exchange, control_queue
from flame_broker.transport import Delivery, QueueSpec, Transport
from flame_orchestrator import leases, silence
from flame_orchestrator.custodian import Custodian
from flame_orchestrator.custody import Run
from flame_orchestrator.schedules import Schedules
from flame_orchestrator.silence import OVERRUN_S, Silence
from lab.bench import KEYRING
from lab.desk import (
    AT_ONCE,
    CALLS,
    CUSTODY,
    Desk,
    cancel,
    claim,
    deposit,
    failed,
    good,
    outcome,
    overdue,
)
from lab.wait import eventually

KEY = KEYRING.signer
T = TypeVar("T")
_names = count()


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def start(desk: Desk) -> CallFrame:
    """The frame of the one call that is due, as a worker gets it."""
    (due,) = desk.start_due()
    return replace(due.frame, reply=CUSTODY, attempt=due.attempt)


# ── what it comes to ─────────────────────────────────────────────────────────


def test_a_run_that_goes_on_for_too_long_ends_as_a_timeout_which_its_client_is_told(
    desk: Desk,
) -> None:
    desk.take(deposit(1, timeout_s=5.0))
    desk.take(claim(frame=start(desk)))
    assert desk.custody.runs() == [Run("w/1", "c", frozenset({1}), 10.0)]
    said = overdue(1, epoch=desk.epoch)
    desk.take(said)
    (final,) = desk.told["c-1"]
    name, message = describe(final)
    assert name == "CallTimeout"
    assert "longer than its timeout of 5 s" in message
    assert "flame workers show w" in message
    assert desk.state(1) == "failed"
    assert desk.custody.runs() == []
    desk.take(said)  # it comes again: perhaps the client was never told
    assert desk.told["c-1"] == [final, final]


def test_the_worker_gets_no_lease_on_it_again_and_what_it_says_late_counts_no_more(
    desk: Desk,
) -> None:
    desk.take(deposit(1, timeout_s=5.0))
    frame = start(desk)
    desk.take(claim(frame=frame))
    desk.take(overdue(1, epoch=desk.epoch))
    (answer,) = desk.take(claim(frame=frame)).answers
    assert answer.refused == (1,)
    desk.take(outcome(good(1)), outcome(failed(1)), cancel(1))
    assert [describe(result)[0] for result in desk.told["c-1"]] == ["CallTimeout"]


def test_a_policy_that_retries_timeouts_starts_it_again(desk: Desk) -> None:
    timeouts = ("flame_broker.errors.CallTimeout",)
    desk.take(deposit(1, timeout_s=5.0, retry=AT_ONCE, on=timeouts))
    desk.take(claim(frame=start(desk)))
    said = overdue(1, epoch=desk.epoch)
    desk.take(said, said)
    assert not desk.told
    again = start(desk)
    assert again.attempt == 2
    desk.take(claim(frame=again, run="v/1"), said)  # which is of the first run
    assert [run.run for run in desk.custody.runs()] == ["v/1"]


def test_a_policy_for_other_errors_does_not(desk: Desk) -> None:
    desk.take(deposit(1, timeout_s=5.0, retry=AT_ONCE, on=("builtins.OSError",)))
    desk.take(claim(frame=start(desk)), overdue(1, epoch=desk.epoch))
    assert [describe(result)[0] for result in desk.told["c-1"]] == ["CallTimeout"]


def test_news_of_it_counts_while_its_writer_leads_and_its_run_has_the_lease(desk: Desk) -> None:
    desk.take(claim(1), overdue(1, run="v/1", epoch=desk.epoch))
    old = overdue(1, epoch=desk.epoch)
    desk.epoch = desk.custody.lead("another")
    desk.take(old)
    assert not desk.told
    desk.take(outcome(good(1)))
    desk.take(overdue(1, epoch=desk.epoch))
    assert desk.told["c-1"] == [good(1)]


# ── when ─────────────────────────────────────────────────────────────────────


class Ear:
    """A ``Silence`` that hears all, and a clock that the test moves."""

    def __init__(self, *runs: Run) -> None:
        self.now = 0.0
        self.silence = Silence(30.0, lambda: self.now)
        self.silence.start_anew(runs)
        self.runs = [run.run for run in runs]

    def pass_s(self, seconds: float, *, echo: bool = True) -> list[str]:
        """Time passes, in which all runs go on; those that are overdue then."""
        for _ in range(int(seconds)):
            self.now += 1
            if echo:
                self.silence.echo()
                self.silence.beat(self.runs)
        return [run.run for run in self.silence.overdue()]


def test_a_run_is_overdue_some_time_after_its_worker_should_have_ended_it() -> None:
    ear = Ear(Run("w/1", "c", frozenset({1}), 10.0), Run("w/2", "c", frozenset({2})))
    assert ear.pass_s(10 + OVERRUN_S) == []
    assert ear.pass_s(1) == ["w/1"]
    assert ear.pass_s(1) == ["w/1"]  # it was not reported yet
    ear.silence.forget("w/1")
    assert ear.pass_s(1000) == []
    assert ear.silence.beat(["w/1"]) == ["w/1"]  # so its worker is told that it has no lease


def test_a_claim_that_is_made_again_gives_a_run_no_more_time() -> None:
    run = Run("w/1", "c", frozenset({1}), 10.0)
    ear = Ear(run)
    ear.pass_s(60)
    ear.silence.add(run)
    assert ear.pass_s(10 + OVERRUN_S - 59) == ["w/1"]


def test_what_ended_while_we_heard_nothing_has_time_to_say_so() -> None:
    ear = Ear(Run("w/1", "c", frozenset({1}), 10.0))
    assert ear.pass_s(1000, echo=False) == []
    assert ear.pass_s(OVERRUN_S) == []
    assert ear.pass_s(2) == ["w/1"]


def test_a_run_that_has_ended_is_no_more_overdue() -> None:
    ear = Ear(Run("w/1", "c", frozenset({1}), 10.0))
    ear.runs = []
    for _ in range(200):
        assert ear.pass_s(1) == []
        ear.silence.take_lost()


# ── all of it ────────────────────────────────────────────────────────────────


class Hung:
    """A worker that claims a call and beats, and lets it run for ever."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.ear = control_queue(KEY.hex_id, "hung").name
        self.heard: list[Frame] = []
        self.told: list[ResultFrame] = []

    async def listen(self) -> None:
        for name, hear in ((self.ear, self._hear), ("reply.c", self._tell)):
            await self.transport.declare(QueueSpec(name))
            await self.transport.consume(name, hear, prefetch=0)

    async def claim(self, spec: CallSpec) -> None:
        frame = CallFrame(CALLS, "reply.c", "c", spec, (Call(1, b""),))
        wanted = Claim(CUSTODY, frame, "hung/1", "hung", self.ear)
        await self.transport.publish(CUSTODY, encode(wanted, KEY))

    def goes_on(self) -> bool:
        """Beat; whether its client was not told of an end yet."""
        exchange = beats_exchange(KEY.hex_id)
        said: dict[str, Plain] = {"worker": "hung", "reply": self.ear, "runs": ("hung/1",)}
        body = encode(ControlFrame(exchange, "beat", said), KEY)
        self.transport.publish("", body, exchange=exchange, mandatory=False)
        return not self.told

    def refused(self) -> list[Plain]:
        """What it was told that others have, or that is over."""
        leased = [f for f in self.heard if isinstance(f, ControlFrame) and f.verb == "leased"]
        return [frame.arguments["refused"] for frame in leased]

    def _hear(self, delivery: Delivery) -> None:
        self.heard.append(decode(delivery.body, KEYRING))
        delivery.ack()

    def _tell(self, delivery: Delivery) -> None:
        frame = decode(delivery.body, KEYRING)
        assert isinstance(frame, ResultFrame)
        self.told.append(frame)
        delivery.ack()


@asynccontextmanager
async def custodian(desk: Desk, transport: Transport) -> AsyncIterator[Custodian]:
    async def in_thread(work: Callable[[], T]) -> T:
        return work()

    made = Custodian(
        transport, KEYRING, KEY, desk.custody, in_thread, lambda _: None,
        schedules=Schedules(desk.engine, desk.custody, KEY),
    )  # fmt: skip
    await made.start()
    try:
        yield made
    finally:
        await made.stop()


async def test_a_worker_that_beats_and_does_not_end_its_call_is_told_to(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "ECHO_EVERY_S", 0.02)
    monkeypatch.setattr(silence, "OVERRUN_S", 0.2)
    transport = open_transport(f"memory://overdue-{next(_names)}", name="test")
    await transport.open()
    worker = Hung(transport)
    await worker.listen()
    async with custodian(desk, transport):
        await worker.claim(CallSpec(Target("m:f"), timeout_s=0.1, grace_s=0.0))
        await eventually(lambda: worker.refused() == [()], 10)
        await eventually(lambda: not worker.goes_on(), 30)
        await eventually(lambda: (1,) in worker.refused(), 10)
    ((final,),) = [frame.results for frame in worker.told]
    assert describe(final)[0] == "CallTimeout"
    await transport.close()
