"""What became of calls: asked by other processes, later, and after the orchestrator was away."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import flame
from flame.asking import Asker
from flame.errors import CallError, NoOrchestrator
from flame_broker.config import load
from flame_broker.topology import ledger_queue, questions_queue, reply_queue
from lab import Process, RabbitNode, TcpProxy
from lab.cluster import LabCluster
from lab.rabbit_client import through
from lab.wait import wait_until

FLAME = str(Path(sys.executable).with_name("flame"))

PROGRAM = """
import sys, time
import flame

def work(number):
    if number == 3:
        raise ValueError("three is wrong")
    print("working on", number)
    return number * 10

def slow(path):
    open(path + ".waited-for", "w").close()
    while not __import__("os").path.exists(path):
        time.sleep(0.01)
    return "at last"

runner = flame.Runner("program")
service = runner.service(work)
futures = [service(number) for number in range(5)]
runner.wait(futures, 30)
waits = runner.service(slow)(sys.argv[1])
print(*(future.id for future in [*futures, waits]), flush=True)
time.sleep(60)
"""


def listed_calls(cluster: LabCluster) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(cluster.command("ps", "--json").stdout)
    return found


def ledger_is_empty(cluster: LabCluster) -> bool:
    return cluster.depth(lambda key, _: ledger_queue(key)) == 0


def double(number: int) -> int:
    return number * 2


def note(folder: str, number: int) -> int:
    Path(folder, str(number)).touch()
    return number


def test_calls_of_a_killed_program_are_found_again_by_their_ids(
    cluster: LabCluster, tmp_path: Path
) -> None:
    def states() -> Counter[str]:
        return Counter(call["state"] for call in listed_calls(cluster))

    cluster.orchestrator()
    cluster.worker("--slots", "2")
    program, gate = tmp_path / "program.py", tmp_path / "gate"
    program.write_text(PROGRAM)
    doomed = Process([sys.executable, program, gate], env=cluster.environ)
    wait_until(lambda: len(doomed.output().splitlines()) >= 1 and "-6" in doomed.output(), 30)
    ids = next(line for line in doomed.output().splitlines() if "-6" in line).split()
    wait_until(gate.with_name("gate.waited-for").exists, 30)  # it has left the program
    doomed.kill()

    # The history hears of a call a tenth of a second later, which `flame ps` may be ahead of.
    ended = {"succeeded": 4, "failed": 1, "queued": 1}
    wait_until(lambda: states() == ended, 30, lambda: f"the calls in their states: {states()}")
    assert {call["id"] for call in listed_calls(cluster)} == {*ids}
    (failed,) = json.loads(cluster.command("ps", "--state", "failed", "--json").stdout)
    assert (failed["id"], failed["error"]) == (ids[3], "ValueError")
    plain = cluster.command("ps").stdout
    assert plain.splitlines()[0].split()[:3] == ["ID", "LABEL", "STATE"]
    shown = cluster.command("show", ids[3]).stdout
    assert "three is wrong" in shown

    assert cluster.command("result", ids[4]).stdout == "40\n"
    raised = cluster.command("result", ids[3])
    assert raised.returncode == 1
    assert "three is wrong" in raised.stderr
    told = cluster.command("result", ids[3], "--json")
    assert told.returncode == 1
    error = json.loads(told.stdout)["error"]
    assert error == {"type": "ValueError", "message": "three is wrong"}
    told = cluster.command("result", ids[4], "--json")
    assert json.loads(told.stdout) == {
        "id": ids[4], "label": failed["label"], "state": "succeeded", "error": None, "value": 40
    }  # fmt: skip

    late = cluster.command("wait", ids[5], "--timeout", "0.5")
    assert late.returncode == 1
    assert "has not ended" in late.stderr
    gate.touch()
    assert cluster.command("wait", ids[0], ids[5], "--timeout", "30").returncode == 0
    told = cluster.command("wait", ids[3], ids[0], "--json")
    assert told.returncode == 1
    assert [call["state"] for call in json.loads(told.stdout)] == ["failed", "succeeded"]
    saved = tmp_path / "result"
    assert cluster.command("result", ids[5], "-o", str(saved)).returncode == 0
    assert saved.read_text() == "at last"


def test_what_is_asked_wrongly_or_of_nobody_gets_a_clear_answer(cluster: LabCluster) -> None:
    for words in (["ps"], ["show", "abc-1"], ["result", "abc-1"]):
        alone = cluster.command(*words)
        assert alone.returncode == 1
        assert "start `flame-orchestrator`" in alone.stderr
        assert "Traceback" not in alone.stderr
    cluster.orchestrator()
    assert cluster.command("show", "nonsense").returncode == 2
    unknown = cluster.command("result", "abc-1")
    assert unknown.returncode == 1
    assert "the history knows no call abc-1" in unknown.stderr
    wrong = cluster.command("ps", "--state", "sleeping")
    assert wrong.returncode == 1
    assert "sleeping" in wrong.stderr


def test_attach_follows_a_call_that_runs_and_cancels_it(
    cluster: LabCluster, tmp_path: Path
) -> None:
    cluster.orchestrator()
    cluster.worker("--slots", "2")
    with cluster.client() as mine, cluster.client() as other:
        runner = flame.Runner("t", client=mine)
        done = runner.service(double)(21)
        twin = flame.attach(done.id, client=other)
        assert twin.get(timeout=30) == done.get(timeout=30) == 42
        assert twin.id == done.id
        stuck = runner.service(time.sleep)(60)
        follower = flame.attach(stuck.id, client=other)
        assert not follower.done()
        assert follower.cancel()
        with pytest.raises(CallError):
            stuck.get(timeout=30)
        with pytest.raises(CallError, match="knows no call"):
            flame.attach("nobody-1", client=other)


def test_what_happens_while_no_orchestrator_runs_is_in_the_history_later(
    cluster: LabCluster, tmp_path: Path
) -> None:
    first = cluster.orchestrator()
    cluster.worker("--slots", "2")
    with cluster.client() as client:
        runner = flame.Runner("t", client=client)
        before = runner.service(note)(str(tmp_path), 0)
        assert before.get(timeout=30) == 0
        first.kill()
        futures = [runner.service(note)(str(tmp_path), number) for number in range(1000)]
        assert runner.get(futures, timeout=60) == list(range(1000))
        cluster.orchestrator()
        wait_until(lambda: len(client.calls(state="succeeded", limit=2000)) == 1001, 30)
        known = {call["id"] for call in client.calls(limit=2000)}
        assert known == {future.id for future in (before, *futures)}


def test_untracked_calls_leave_no_trace(cluster: LabCluster) -> None:
    cluster.orchestrator()
    cluster.worker("--slots", "1")
    with cluster.client() as client:
        runner = flame.Runner("t", client=client)
        assert runner.service(double, track=False)(1).get(timeout=30) == 2
        kept = runner.service(double)(2)
        assert kept.get(timeout=30) == 4
        wait_until(lambda: client.story(kept.id), 10)
        assert [call["id"] for call in client.calls()] == [kept.id]


def test_results_that_were_lost_with_their_reply_queue_come_from_the_ledger(
    own_rabbit: RabbitNode, own_cluster: LabCluster, tmp_path: Path
) -> None:
    own_cluster.orchestrator()
    own_cluster.worker("--slots", "2")
    with (
        TcpProxy(own_rabbit.port) as proxy,
        own_cluster.client(through(proxy, own_cluster.broker_url)) as client,
    ):
        runner = flame.Runner("t", client=client)
        service = runner.service(note)
        assert service(str(tmp_path), 1000).get(timeout=30) == 1000
        proxy.stall()  # what is published reaches nobody yet
        proxy.resume()
        futures = [service(str(tmp_path), number) for number in range(50)]
        wait_until(lambda: len(list(tmp_path.glob("[0-9]*"))) > 5, 30)
        proxy.refuse()
        proxy.cut()
        wait_until(lambda: len(list(tmp_path.glob("[0-9]*"))) >= 50 or not futures, 30)
        queue = reply_queue(own_cluster.key_id, client.id, 0).name
        own_rabbit.ctl("delete_queue", queue)
        wait_until(lambda: ledger_is_empty(own_cluster), 30)
        proxy.accept()
        assert runner.get(futures, timeout=60) == list(range(50))


def test_an_answer_that_was_lost_with_its_connection_is_asked_for_again(
    cluster: LabCluster, rabbit: RabbitNode
) -> None:
    cluster.orchestrator().terminate()  # its queue stays
    with TcpProxy(rabbit.port) as proxy, ThreadPoolExecutor(1) as thread:
        settings = load(broker=through(proxy, cluster.broker_url), key=cluster.key)
        with Asker(settings) as asker:
            listed = thread.submit(asker._ask, lambda asks: asks.ask("calls", patience_s=60.0))
            wait_until(lambda: cluster.depth(lambda key, _: questions_queue(key)) == 1, 20)
            proxy.refuse()
            proxy.cut()
            answers = cluster.orchestrator()
            wait_until(lambda: "answer.not_sent" in answers.output(), 20, answers.output)
            proxy.accept()
            assert listed.result(30)["calls"] == ()


def test_two_orchestrators_share_the_work_and_one_answers(
    cluster: LabCluster, tmp_path: Path
) -> None:
    first, second = cluster.orchestrator(), cluster.orchestrator()
    cluster.worker("--slots", "2")
    with cluster.client() as client:
        runner = flame.Runner("t", client=client)
        futures = [runner.service(double)(number) for number in range(300)]
        assert runner.get(futures, timeout=30) == [2 * number for number in range(300)]
        wait_until(lambda: ledger_is_empty(cluster), 30)
        wait_until(lambda: len(client.calls(state="succeeded", limit=1000)) == 300, 10)
        first.kill()
        wait_until(lambda: len(client.calls(state="succeeded", limit=1000)) == 300, 30)
        second.signal(signal.SIGTERM)
        assert second.wait(20) == 0
        with pytest.raises(NoOrchestrator):
            client.calls()


def test_an_orchestrator_without_a_broker_or_database_says_so(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("flame-orchestrator")
    settings = {**os.environ, "FLAME_HOME": str(tmp_path)}
    for environ, status, words in (
        ({}, 22, "set FLAME_BROKER_URL"),
        ({"FLAME_BROKER_URL": "amqp://127.0.0.1:1/", "FLAME_KEY": "k" * 43}, 69, "127.0.0.1:1"),
        (
            {
                "FLAME_BROKER_URL": "amqp://127.0.0.1:1/",
                "FLAME_KEY": "k" * 43,
                "FLAME_DATABASE_URL": f"sqlite:///{tmp_path}",
            },
            22,
            "cannot be opened",
        ),
    ):
        done = subprocess.run(
            [program], env={**settings, **environ}, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == status, done.stderr
        assert words in done.stderr
        assert "Traceback" not in done.stderr
