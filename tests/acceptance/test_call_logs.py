"""What calls print: kept, and read by other processes, while they run and later."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import psutil
import pytest

import flame
from flame_broker.topology import kept_logs_queue
from lab import Process
from lab.cluster import LabCluster
from lab.wait import wait_until

FLAME = str(Path(sys.executable).with_name("flame"))


def talk(number: int) -> int:
    print("line", number)
    print("a warning", file=sys.stderr)
    print("half a line", end="")
    return number


def talk_when_told(folder: str, lines: int) -> str:
    """Print a line for each file that appears there."""
    for number in range(lines):
        wait_until(Path(folder, str(number)).exists, 100)
        print("line", number)
    return "done"


def stammer(folder: str) -> str:
    attempt = len(list(Path(folder).glob("attempt-*")))
    Path(folder, f"attempt-{attempt}").touch()
    print("try", attempt)
    if attempt < 2:
        raise ValueError("again")
    return "done"


def flood(lines: int) -> int:
    for number in range(lines):
        print("a line that says nothing of importance and is number", number)
    return lines


def double(number: int) -> int:
    return number * 2


def logged(cluster: LabCluster, call: str, *options: str) -> list[str]:
    done = cluster.command("logs", call, *options)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def nothing_waits(cluster: LabCluster) -> bool:
    return cluster.depth(lambda key, _: kept_logs_queue(key)) == 0


def test_what_a_call_has_printed_is_read_by_others_and_printed_here_only_if_wanted(
    cluster: LabCluster, capfd: pytest.CaptureFixture[str]
) -> None:
    cluster.orchestrator()
    cluster.worker("--slots", "1")
    with cluster.client() as client, cluster.client() as other:
        quiet = flame.Runner("quiet", client=client, echo=False)
        call = quiet.service(talk)(7)
        assert call.get(timeout=30) == 7
        said = ["line 7", "a warning", "half a line"]
        assert sorted(logged(cluster, call.id, "-f")) == sorted(said)
        (stamped,) = logged(cluster, call.id, "--stderr", "--timestamps")
        stamp, _, text = stamped.partition(" ")
        assert text == "a warning"
        assert abs(time.time() - flame_time(stamp)) < 600
        records = [json.loads(line) for line in logged(cluster, call.id, "--json")]
        said_on = {record["text"]: record["stream"] for record in records}
        assert said_on == dict(zip(said, ("stdout", "stderr", "stdout"), strict=True))
        assert {record["attempt"] for record in records} == {1}
        assert sorted(call.logs()) == sorted(said)
        assert sorted(flame.attach(call.id, client=other).logs()) == sorted(said)

        untracked = flame.Runner("t", client=client).service(talk, track=False)(8)
        assert untracked.get(timeout=30) == 8
        refused = cluster.command("logs", untracked.id)
        assert refused.returncode == 1
        assert f"the history knows no call {untracked.id}" in refused.stderr
        mute = quiet.service(double)(1)
        assert mute.get(timeout=30) == 2
        silent = cluster.command("logs", mute.id)
        assert (silent.returncode, silent.stdout) == (0, "")
        assert f"nothing is kept of what {mute.id} has printed" in silent.stderr
        silent = cluster.command("logs", mute.id, "--stderr")
        assert f"nothing is kept of what {mute.id} has printed to stderr" in silent.stderr
        assert cluster.command("logs", "nonsense").returncode == 2
    printed = capfd.readouterr()
    assert "line 7" not in printed.out
    assert "[talk] line 8" in printed.out


def flame_time(stamp: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(stamp).timestamp()


def test_a_running_call_is_followed_until_it_ends_also_over_a_restart_of_the_orchestrator(
    cluster: LabCluster, tmp_path: Path
) -> None:
    first = cluster.orchestrator()
    cluster.worker("--slots", "1")
    (told := tmp_path / "told").mkdir()
    with cluster.client() as client:
        call = flame.Runner("t", client=client, echo=False).service(talk_when_told)(str(told), 6)
        following = Process([FLAME, "logs", call.id, "-f"], env=cluster.environ)
        left = Process([FLAME, "logs", call.id, "--follow"], env=cluster.environ)
        with following, left:
            for number in range(2):
                (told / str(number)).touch()
                for process in (following, left):
                    wait_until(lambda: f"line {number}" in process.output(), 20, process.output)  # noqa: B023
            left.signal(signal.SIGINT)
            assert left.wait(20) == 130
            assert left.output() == "line 0\nline 1\n"
            first.kill()
            (told / "2").touch()
            wait_until(lambda: not nothing_waits(cluster), 20)
            cluster.orchestrator()
            (told / "3").touch()
            wait_until(lambda: "line 3" in following.output(), 60, following.output)
            assert logged(cluster, call.id) == [f"line {number}" for number in range(4)]
            for number in (4, 5):
                (told / str(number)).touch()
            assert call.get(timeout=30) == "done"
            assert following.wait(30) == 0
            lines = [line for line in following.output().splitlines() if line.startswith("line")]
            assert lines == [f"line {number}" for number in range(6)]


def test_each_attempt_of_a_call_that_is_tried_again_is_in_its_log(
    cluster: LabCluster, tmp_path: Path
) -> None:
    cluster.orchestrator()
    worker = cluster.worker("--slots", "1").health["worker"]
    with cluster.client() as client:
        retry = flame.Retry(attempts=3, backoff=timedelta(seconds=0.01))
        service = flame.Runner("t", client=client).service(stammer, retry=retry)
        call = service(str(tmp_path))
        followed = cluster.command("logs", call.id, "-f")
        assert call.get(timeout=30) == "done"
    assert followed.returncode == 0, followed.stderr
    assert followed.stdout.splitlines() == [
        "try 0",
        f"… attempt 2 on {worker}",
        "try 1",
        f"… attempt 3 on {worker}",
        "try 2",
    ]


def test_a_flood_of_lines_is_cut_with_a_note_and_holds_up_neither_ledger_nor_memory(
    cluster: LabCluster, tmp_path: Path
) -> None:
    keeper = cluster.orchestrator("--keep-log", "2m")
    cluster.worker("--slots", "2")
    with cluster.client() as client:
        runner = flame.Runner("t", client=client, echo=False)
        assert runner.service(double)(1).get(timeout=30) == 2
        before = psutil.Process(keeper.pid).memory_info().rss
        flooding = runner.service(flood)(200_000)
        calls = [runner.service(double)(number) for number in range(300)]
        assert runner.get([flooding, *calls], timeout=90)[1:] == [2 * n for n in range(300)]
        wait_until(lambda: len(client.calls(state="succeeded", limit=1000)) == 302, 30)
        lines = logged(cluster, flooding.id, "-f")
        assert lines[-1] == "… the log ends here: it may hold 2,097,152 bytes"
        kept = [line for line in lines if not line.startswith("…")]
        assert len(kept) > 10_000
        assert len({*kept}) == len(kept)
        objects = cluster.folder / "store" / "logs" / flooding.id
        wait_until(lambda: [*objects.iterdir()] if objects.exists() else [], 20)
        assert logged(cluster, flooding.id) == lines
    grown = psutil.Process(keeper.pid).memory_info().rss - before
    assert grown < 200 * 2**20, f"{grown / 2**20:.0f} MiB"


def test_while_the_database_refuses_lines_wait_and_calls_go_on(cluster: LabCluster) -> None:
    keeper = cluster.orchestrator()
    cluster.worker("--slots", "1")
    database = cluster.folder / "home" / "ledger.sqlite"
    with cluster.client() as client:
        service = flame.Runner("t", client=client, echo=False).service(talk)
        with closing(sqlite3.connect(database, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            call = service(1)
            assert call.get(timeout=30) == 1
            wait_until(lambda: "logs.write_failed" in keeper.output(), 30, keeper.output)
            other.execute("ROLLBACK")
        wait_until(lambda: "logs.written_again" in keeper.output(), 30, keeper.output)
        assert "line 1" in logged(cluster, call.id, "-f")
    assert "database is locked" in keeper.output()
    assert "Traceback" not in keeper.output()


def test_without_an_orchestrator_the_command_says_what_to_start(
    cluster: LabCluster, tmp_path: Path
) -> None:
    alone = cluster.command("logs", "abc-1", "-f")
    assert alone.returncode == 1
    assert "start `flame-orchestrator`" in alone.stderr
    environ = {**cluster.environ, "FLAME_HOME": str(tmp_path), "FLAME_BROKER_URL": ""}
    embedded = subprocess.run(
        [FLAME, "logs", "abc-1"], env=environ, capture_output=True, text=True, timeout=60
    )
    assert embedded.returncode == 1
    assert "the history knows no call abc-1" in embedded.stderr
