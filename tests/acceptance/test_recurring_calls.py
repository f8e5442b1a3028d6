"""Calls that are made again and again, and ended ones that run again, whoever is killed."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import flame
from flame.errors import FlameError, NoOrchestrator
from flame_cli.main import main
from lab.cluster import LabCluster
from lab.wait import wait_until

NEVER_NOW = "59 23 31 12 *"


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def command(
    cluster: LabCluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Said]:
    """The ``flame`` command in this process: a process for each would take most of the time."""
    for name, value in cluster.environ.items():
        monkeypatch.setenv(name, value)

    def run(*words: str) -> Said:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main(words)
        return Said(int(left.value.code or 0), *capsys.readouterr())

    return run


def total(numbers: list[int], extra: int = 0) -> int:
    return sum(numbers) + extra


def flaky() -> int:
    """Fail the first time that this call runs."""
    call = flame.current_call()
    assert call is not None
    if call.attempt == 1:
        raise ConnectionError("not yet")
    return call.attempt


def doubtful(folder: str) -> str:
    """Fail until somebody has put it right."""
    if not (Path(folder) / "right").exists():
        raise RuntimeError("something is wrong")
    return "right"


def rows(cluster: LabCluster, statement: str) -> list[Any]:
    """What stands in the orchestrators' database."""
    with closing(sqlite3.connect(cluster.folder / "home" / "ledger.sqlite")) as database:
        return database.execute(statement).fetchall()


def test_a_schedule_is_made_run_paused_changed_and_removed(
    cluster: LabCluster, command: Callable[..., Said]
) -> None:
    numbers = list(range(50_000))  # more than a message carries
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        service = runner.service(total, resreq="cpu=2", priority="high", timeout=60)
        with pytest.raises(NoOrchestrator, match="start `flame-orchestrator`"):
            service.schedule(NEVER_NOW, numbers, name="yearly")
        cluster.orchestrator()
        for cron, zone, words in (
            ("61 * * * *", "UTC", "cron '61"),
            ("0 0 30 2 *", "UTC", "no time that ever comes"),
            ("0 3 * * *", "Mars/Olympus", "knows no such zone"),
        ):
            with pytest.raises(FlameError, match=words):
                service.schedule(cron, [1], timezone=zone, name="yearly")
        assert client.schedules() == []

        schedule = service.schedule(
            NEVER_NOW, numbers, extra=7, timezone="Europe/Berlin", name="yearly"
        )
        due = schedule.next_at()
        assert due is not None
        assert (due.month, due.day, due.hour) == (12, 31, 22)
        cluster.worker("--slots", "1")
        first = schedule.run()
        assert first.get(timeout=30) == sum(numbers) + 7
        assert schedule.calls() == [first.id]
        second = command("schedule", "run", "yearly").out.strip()
        assert second == first.id.replace("-1", "-2")
        assert flame.attach(second, client=client).get(timeout=30) == sum(numbers) + 7
        (listed,) = json.loads(cluster.command("schedule", "--json").stdout)
        assert (listed["name"], listed["state"], listed["fired"]) == ("yearly", "active", 2)
        assert (listed["pool"], listed["resources"], listed["priority"]) == (
            "default",
            "c2",
            "high",
        )
        assert second in command("ps").out

        assert command("schedule", "pause", "yearly") == (0, "yearly is paused\n", "")
        service.schedule("0 4 * * *", numbers[:3], name="yearly")  # the program is started again
        assert json.loads(command("schedule", "list", "--json").out)[0]["next"] is None
        assert "yearly goes on, next 20" in command("schedule", "resume", "yearly").out
        changed = json.loads(command("schedule", "show", "yearly", "--json").out)
        assert changed["next"].endswith("T04:00:00Z")
        assert [call["state"] for call in changed["calls"]] == ["succeeded"] * 2
        assert schedule.run().get(timeout=30) == 3
        assert f"{second} succeeded" in command("schedule", "show", "yearly").out

        assert command("schedule", "remove", "yearly").code == 0
        gone = command("schedule", "show", "yearly")
        assert gone.code == 1
        assert "there is no schedule 'yearly'" in gone.err
        with pytest.raises(FlameError, match="there is no schedule"):
            schedule.run()
    assert "there are no schedules" in command("schedule").err


@pytest.mark.timeout(180)
def test_killed_orchestrators_lose_no_moment_and_meet_none_twice(cluster: LabCluster) -> None:
    leads, follows = cluster.orchestrator(), cluster.orchestrator()
    cluster.worker("--slots", "1")
    kept = "SELECT counter, state FROM kept ORDER BY counter"
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        again = flame.Retry(backoff=timedelta(milliseconds=10), on=ConnectionError)
        service = runner.service(flaky, retry=again)
        schedule = service.schedule("* * * * * *", name="secondly", catch_up="all")
        wait_until(lambda: len(rows(cluster, kept)) >= 2, 60)
        leads.kill()
        after = len(rows(cluster, kept))
        wait_until(lambda: len(rows(cluster, kept)) >= after + 2, 60)
        follows.kill()
        cluster.orchestrator()
        after = len(rows(cluster, kept))
        wait_until(lambda: len(rows(cluster, kept)) >= after + 2, 60)
        schedule.pause()
        wait_until(lambda: {state for _, state in rows(cluster, kept)} == {"succeeded"}, 60)
        assert flame.attach(schedule.calls()[0], client=client).get(timeout=30) == 2
    ((made, last_at, created_at),) = rows(
        cluster, "SELECT fired, fired_at, created_at FROM schedules"
    )
    assert [counter for counter, _ in rows(cluster, kept)] == [*range(1, made + 1)]
    assert last_at == int(created_at) + made  # a call for each second, and one only


def test_a_call_that_has_ended_runs_again_as_a_new_one(
    cluster: LabCluster, tmp_path: Path, command: Callable[..., Said]
) -> None:
    cluster.orchestrator()
    worker = cluster.worker("--slots", "1")
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        service = runner.service(doubtful)
        failed = service(str(tmp_path))
        with pytest.raises(RuntimeError, match="something is wrong"):
            failed.get(timeout=30)
        wait_until(lambda: (client.story(failed.id) or {}).get("state") == "failed", 15)
        (tmp_path / "right").touch()
        done = command("retry", failed.id)
        assert (done.code, done.err) == (0, "")
        new = done.out.strip()
        assert new != failed.id
        assert command("result", new, "--timeout", "30").out == "right\n"
        assert (client.story(failed.id) or {})["state"] == "failed"

        worker.terminate()
        waiting = service(str(tmp_path))
        wait_until(lambda: client.story(waiting.id), 15)
        refused = command("retry", new, waiting.id, "nobody-1", "--json")
        assert refused.code == 1
        said = json.loads(refused.out)
        assert said[0]["retry"]
        assert f"{waiting.id} has not ended, it is queued" in said[1]["problem"]
        assert "knows no call nobody-1" in said[2]["problem"]
    assert command("retry", "nonsense").code == 2
