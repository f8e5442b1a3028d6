"""Workers that do not answer are known by their heartbeats, if an orchestrator has heard them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
from typer.testing import CliRunner

import flame
from flame_broker.errors import FlameError, MalformedMessage
from flame_broker.facts import MAX_FACTS_BYTES, fold, unfold
from flame_broker.frames import decode, encode
from flame_broker.messages import ControlFrame, Plain
from flame_broker.topology import questions_queue
from flame_broker.transport import Delivery
from flame_cli import workers
from flame_orchestrator import roll
from flame_orchestrator.roll import Roll
from lab.fake_worker import FakeWorker

DAY_S = 24 * 3600
FACTS = {"worker": "w1", "pool": "gpu", "slots": 2, "busy": 1, "running": (("c-1", "train", 60.0),)}


class Time:
    now = 1000.0


@pytest.fixture
def clock() -> Time:
    return Time()


@pytest.fixture
def called(clock: Time) -> Roll:
    return Roll(lambda: clock.now)


def names(answer: dict[str, Plain]) -> list[str]:
    rows: Any = answer["workers"]
    return [name for name, _, _ in rows]


# ── what an orchestrator remembers ───────────────────────────────────────────


def test_a_worker_is_remembered_with_its_last_heartbeat(clock: Time, called: Roll) -> None:
    called.hear("w1", b"before")
    clock.now += 3
    called.hear("w1", b"then")
    clock.now += 60.5
    assert called.answer({}) == {"workers": (("w1", 60.5, b"then"),), "more": False}


def test_it_is_forgotten_a_day_after_its_last_heartbeat_and_when_it_leaves(
    clock: Time, called: Roll
) -> None:
    for name in ("old", "kept", "left"):
        called.hear(name, b"")
    clock.now += DAY_S
    called.hear("kept", b"")
    called.forget("left")
    called.forget("never seen")
    clock.now += 1
    assert names(called.answer({})) == ["kept"]


def test_of_too_many_those_are_forgotten_that_were_silent_longest(
    called: Roll, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roll, "_MOST_WORKERS", 2)
    for name in ("a", "b", "a", "c"):
        called.hear(name, b"")
    assert names(called.answer({})) == ["a", "c"]


def test_what_is_too_much_is_not_kept(called: Roll) -> None:
    called.hear("w1", bytes(MAX_FACTS_BYTES + 1))
    assert called.answer({})["workers"] == (("w1", 0.0, b""),)


def test_many_workers_are_told_of_page_by_page_and_one_alone(
    called: Roll, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roll, "_PAGE_BYTES", 25)
    for number in range(5):
        called.hear(f"w{number}", bytes(10))
    pages, answer = [], called.answer({})
    while answer["more"]:
        pages.append(names(answer))
        answer = called.answer({"after": pages[-1][-1]})
    assert [*pages, names(answer)] == [["w0", "w1"], ["w2", "w3"], ["w4"]]
    assert names(called.answer({"worker": "w3"})) == ["w3"]


def test_facts_are_folded_and_unfolded_and_nothing_else_is_taken_for_them() -> None:
    assert unfold(fold(FACTS)) == FACTS
    for wrong in (b"", b"\xc1", b"\x01", b"\x81\x01\x02"):
        with pytest.raises(MalformedMessage):
            unfold(wrong)


# ── who asks ─────────────────────────────────────────────────────────────────


class Orchestrator:
    """Answers the question ``workers`` from a roll."""

    def __init__(self, worker: FakeWorker, called: Roll) -> None:
        self.worker, self.called = worker, called
        worker.run(self._listen())

    async def _listen(self) -> None:
        transport, queue = self.worker.transport, questions_queue(self.worker.keyring.signer.hex_id)
        await transport.declare(queue)
        await transport.consume(queue.name, self._answer, prefetch=0)

    def _answer(self, delivery: Delivery) -> None:
        frame = decode(delivery.body, self.worker.keyring)
        assert isinstance(frame, ControlFrame)
        asked, reply = frame.arguments, str(frame.arguments["reply"])
        said = {**self.called.answer(asked), "token": asked["token"]}
        if asked["question"] != "workers":
            said["problem"] = f"this orchestrator knows no question {asked['question']!r}"
        body = encode(ControlFrame(reply, "answer", said), self.worker.keyring.signer)
        self.worker.transport.publish(reply, body)
        delivery.ack()


def test_without_an_orchestrator_those_are_listed_that_answer(client: flame.Client) -> None:
    (facts,) = client.roll_call(0.3)
    assert (facts["worker"], facts["answers"], facts["heard_at"]) == ("fake", True, None)


def test_a_silent_worker_is_listed_with_what_it_said_last(
    client: flame.Client, worker: FakeWorker, clock: Time, called: Roll
) -> None:
    called.hear("w1", fold(FACTS))
    called.hear("strange", b"\xc1")
    clock.now += 600
    called.hear("fake", fold({"worker": "fake", "pool": "as it was"}))
    Orchestrator(worker, called)
    fake, strange, silent = client.roll_call(0.3)
    assert (fake["pool"], fake["answers"]) == ("default", True)
    heard_at: Any = fake["heard_at"]
    assert abs(time.time() - heard_at) < 10
    assert strange["answers"] is False
    assert (silent["answers"], silent["pool"], silent["slots"]) == (False, "gpu", 2)
    (running,) = as_list(silent["running"])
    assert (running["id"], running["label"]) == ("c-1", "train")
    assert abs(time.time() - 660 - running["since_at"]) < 10


def as_list(calls: Any) -> list[dict[str, Any]]:
    return [*calls]


def test_every_page_of_the_roll_is_read(
    client: flame.Client, worker: FakeWorker, called: Roll, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roll, "_PAGE_BYTES", 1)
    for number in range(3):
        called.hear(f"w{number}", fold({"worker": f"w{number}"}))
    Orchestrator(worker, called)
    assert [facts["worker"] for facts in client.roll_call(0.3)] == ["fake", "w0", "w1", "w2"]
    assert [facts["worker"] for facts in client.roll_call(0.3, name="w1")] == ["fake", "w1"]


# ── what is shown ────────────────────────────────────────────────────────────


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs ``flame workers`` with a roll call of the test's."""

    class Cluster:
        key_id = "0a1b2c3d"

        def roll_call(self, timeout_s: float, *, name: str = "") -> list[dict[str, Any]]:
            calls = [{"id": f"c-{n}", "label": "train", "since_at": 0.0} for n in range(5)]
            quiet = {"worker": "w1", "slots": 4, "answers": False, "heard_at": 86400.0}
            well = {"worker": "w2", "started_at": 0, "answers": True, "heard_at": None}
            return [{**quiet, "running": calls}, {**well, "running": ()}]

    monkeypatch.setattr(workers, "asking", lambda _: nullcontext(Cluster()))
    return lambda *words: CliRunner().invoke(workers.app, [*words]).output


def test_the_table_shows_since_when_a_worker_is_silent_and_what_runs(
    show: Callable[..., str],
) -> None:
    header, silent, well = show().splitlines()
    assert header.split()[-5:] == ["DRAINING", "HEARTBEAT", "SILENT", "SINCE", "RUNS"]
    assert "1970-01-02 00:00:00Z" in silent
    assert silent.endswith("train c-0, train c-1, train c-2, and 2 more")
    assert well.split()[0] == "w2"
    assert well.split()[-2:] == ["-", "-"]


def test_json_holds_times_and_calls(show: Callable[..., str]) -> None:
    silent, well = json.loads(show("--json"))
    assert silent["silent_since"] == silent["last_heartbeat"] == "1970-01-02T00:00:00Z"
    assert silent["running"][0] == {"id": "c-0", "label": "train", "since": "1970-01-01T00:00:00Z"}
    assert (well["silent_since"], well["last_heartbeat"], well["running"]) == (None, None, [])
    assert json.loads(show("show", "w1", "--json")) == silent


def test_one_worker_is_shown_in_words(show: Callable[..., str]) -> None:
    lines = dict(line.split(maxsplit=1) for line in show("show", "w1").splitlines())
    assert lines["running"].startswith("train c-0 since 1970-01-01 00:00:00Z, train c-1 since")
    assert lines["silent_since"] == "1970-01-02 00:00:00Z"


def test_a_silent_worker_cannot_be_drained(show: Callable[..., str]) -> None:
    with pytest.raises(FlameError, match="w1 does not answer: nothing was heard of it since 1970"):
        workers.drain("w1")
