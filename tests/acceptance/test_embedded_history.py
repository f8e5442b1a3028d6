"""What programs on the embedded cluster leave behind, whichever way they end."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

import flame
from flame.asking import Asker
from flame.client import Client
from flame.errors import CallCancelled
from flame.testing import embedded
from flame_broker.config import load
from flame_broker.messages import parse_call_id
from flame_orchestrator.history import Facts
from lab.desk import Desk
from lab.processes import Process
from lab.wait import wait_until

Start = Callable[[str], Process]

_PATIENCE_S = 60.0
_WORK = """
import time
from datetime import timedelta
import flame

def double(number):
    print(f"doubles {number}")
    return 2 * number

def fail():
    raise ValueError("as it should")

def sleep():
    time.sleep(600)

def second_time(path):
    with open(path, "a") as file:
        file.write("x")
    if len(open(path).read()) < 2:
        raise OSError("not yet")
    return "at last"

def say(*words):
    print(*words, flush=True)

client = flame.connect()
runner = flame.Runner(client=client)
"""


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """The history of a new home, which is this test's."""
    monkeypatch.setenv("FLAME_HOME", str(tmp_path))
    (tmp_path / "embedded").mkdir(mode=0o700)
    return Desk(tmp_path / "embedded")  # migrated already


@pytest.fixture
def start(desk: Desk, tmp_path: Path) -> Iterator[Start]:
    """Start a program that has all of ``_WORK``."""
    started: list[Process] = []

    def start_program(text: str) -> Process:
        script = tmp_path / f"program{len(started)}.py"
        script.write_text(_WORK + textwrap.dedent(text))
        started.append(Process([sys.executable, script], env=os.environ, cwd=tmp_path))
        return started[-1]

    yield start_program
    for program in started:
        program.close()


def end_of(program: Process) -> str:
    """What it has said, once it has ended by itself."""
    wait_until(lambda: not program.running, _PATIENCE_S, program.output)
    assert program.returncode == 0, program.output()
    return program.output()


def ids(program: Process, count: int) -> list[str]:
    """The ids of calls that it has printed."""

    def found() -> list[str]:
        lines = program.output().splitlines()
        return [line.removeprefix("id ") for line in lines if line.startswith("id ")]

    wait_until(lambda: len(found()) == count or not program.running, _PATIENCE_S, program.output)
    assert len(found()) == count, program.output()
    return found()


def story(desk: Desk, call: str) -> Facts:
    return desk.history.story(*parse_call_id(call)) or {"state": "unknown"}


def test_the_history_survives_the_program_for_commands_and_for_other_programs(
    start: Start,
) -> None:
    program = start("""
        good, bad = runner.service(double)(21), runner.service(fail)()
        say("id", good.id)
        say("id", bad.id)
        good.wait(), bad.wait()
    """)
    end_of(program)
    good, bad = ids(program, 2)
    with Asker(load()) as asker:
        listed = {facts["id"]: facts["state"] for facts in asker.calls()}
        assert listed == {good: "succeeded", bad: "failed"}
        assert [line.text for line in asker.log(good)] == ["doubles 21"]
    with Client(load(), works=False) as client:
        assert flame.attach(good, client=client).result(_PATIENCE_S) == 42
        with pytest.raises(ValueError, match="as it should"):
            flame.attach(bad, client=client).result(_PATIENCE_S)
    with Process([Path(sys.executable).parent / "flame", "result", good]) as command:
        assert "42" in end_of(command)


def test_calls_of_a_killed_program_are_cancelled_by_whoever_comes_next(
    start: Start, desk: Desk
) -> None:
    program = start("""
        calls = [runner.service(sleep)(), runner.service(sleep, retry=flame.Retry(3))()]
        calls.append(runner.service(double).options(not_before=timedelta(hours=1))(1))
        for call in calls:
            say("id", call.id)
        time.sleep(600)
    """)
    calls = ids(program, 3)
    for call in calls:
        wait_until(
            lambda call=call: story(desk, call)["state"] in ("queued", "waiting"),
            _PATIENCE_S,
            program.output,
        )
    with Client(load(), works=False) as client:  # it lives, and nobody touches its calls
        assert not flame.attach(calls[2], client=client).cancel()
        assert story(desk, calls[2])["state"] == "waiting"
    program.kill()
    with Asker(load()) as asker:
        reasons = {facts["id"]: facts["reason"] for facts in asker.calls(state="cancelled")}
    assert reasons.keys() == set(calls)
    assert all("was killed before the call ended" in reason for reason in reasons.values())


def test_whoever_waits_for_a_call_of_another_program_hears_that_it_was_killed(
    start: Start, desk: Desk
) -> None:
    program = start("""
        say("id", runner.service(sleep)().id)
        time.sleep(600)
    """)
    (call,) = ids(program, 1)
    wait_until(lambda: story(desk, call)["state"] == "queued", _PATIENCE_S, program.output)
    with Client(load(), works=False) as client:
        waiting = flame.attach(call, client=client)
        program.kill()
        with pytest.raises(CallCancelled, match="was killed before the call ended"):
            waiting.result(_PATIENCE_S)


def test_a_program_that_ends_in_the_middle_of_calls_says_so_in_the_history(
    start: Start, desk: Desk
) -> None:
    program = start("""
        calls = [runner.service(sleep)(), runner.service(sleep, retry=flame.Retry(3))()]
        calls.append(runner.service(double).options(not_before=timedelta(hours=1))(1))
        done = runner.service(double)(4)
        for call in (*calls, done):
            say("id", call.id)
        done.wait()
        client.close()
    """)
    end_of(program)
    *cancelled, done = [story(desk, call) for call in ids(program, 4)]
    assert done["state"] == "succeeded"
    assert {facts["state"] for facts in cancelled} == {"cancelled"}
    assert {facts["reason"] for facts in cancelled} == {
        "the program that made it ended before the call did"
    }


def test_programs_that_run_at_once_keep_their_own_calls(start: Start) -> None:
    text = """
        soon = flame.Retry(3, backoff=timedelta(seconds=0.5))
        again = runner.service(second_time, retry=soon)(PATH)
        later = runner.service(double).options(not_before=timedelta(seconds=1))(4)
        say(again.result(), later.result())
    """
    programs = [start(text.replace("PATH", f"'{name}'")) for name in ("one", "other")]
    for program in programs:
        said = end_of(program)
        assert "at last 8" in said
        assert "custody" not in said, "one has led the other's calls"


def test_calls_that_need_time_work_on_the_embedded_cluster(desk: Desk, tmp_path: Path) -> None:
    with embedded() as client, flame.Runner(client=client) as runner:
        service = runner.service(abs)
        later = service.options(not_before=timedelta(seconds=0.5))(-1)
        follower = service.options(after=[later])(-2)
        same = [service.options(key="one")(number) for number in (-3, -30)]
        limited = service.options(limit=flame.Limit("narrow", 1))(-4)
        once = runner.service(abs, delivery="at_most_once")(-5)
        calls = [later, follower, *same, limited, once]
        assert [call.result(_PATIENCE_S) for call in calls] == [1, 2, 3, 3, 4, 5]
        service.schedule("0 3 * * *", -6, name="nightly")
        fired = client.run_schedule("nightly")
        assert flame.attach(fired, client=client).result(_PATIENCE_S) == 6
        again = client.retry(later.id)
        assert flame.attach(again, client=client).result(_PATIENCE_S) == 1
    with Asker(load()) as asker:
        assert asker.schedules() == []  # it went with its program
        assert {facts["state"] for facts in asker.calls()} == {"succeeded"}
