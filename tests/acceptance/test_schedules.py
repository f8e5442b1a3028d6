"""Calls that are made again and again, and ended ones that run again, whoever is killed."""

from __future__ import annotations

import json
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import flame
from flame.errors import CallCancelled, FlameError, NoOrchestrator
from lab.cluster import LabCluster
from lab.wait import wait_until

NEVER_NOW = "59 23 31 12 *"


def total(numbers: list[int], extra: int = 0) -> int:
    return sum(numbers) + extra


def flaky(folder: str) -> int:
    """Fail the first time that this call runs."""
    call = flame.current_call()
    assert call is not None
    with (Path(folder) / call.id).open("a") as file:
        file.write("x")
    if call.attempt == 1:
        raise ConnectionError("not yet")
    return call.attempt


def doubtful(folder: str) -> str:
    """Fail until somebody has put it right."""
    if not (Path(folder) / "right").exists():
        raise RuntimeError("something is wrong")
    return "right"


def shown(cluster: LabCluster, name: str) -> dict[str, Any]:
    done = cluster.command("schedule", "show", name, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def made(cluster: LabCluster) -> list[tuple[int, float, str]]:
    """Number, due time and state of every call that the orchestrators keep."""
    with closing(sqlite3.connect(cluster.folder / "home" / "ledger.sqlite")) as database:
        return database.execute(
            "SELECT counter, due_at, state FROM kept ORDER BY counter"
        ).fetchall()


def test_a_schedule_is_listed_run_paused_resumed_changed_and_removed(
    cluster: LabCluster,
) -> None:
    cluster.orchestrator()
    cluster.worker("--slots", "1")
    numbers = list(range(50_000))  # more than a message carries
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        service = runner.service(total, resreq="cpu=2")
        schedule = service.schedule(
            NEVER_NOW, numbers, extra=7, timezone="Europe/Berlin", name="yearly"
        )
        due = schedule.next_at()
        assert due is not None
        assert (due.month, due.day, due.hour) == (12, 31, 22)
        first = schedule.run()
        assert first.get(timeout=30) == sum(numbers) + 7
        assert schedule.calls() == [first.id]

        again = cluster.command("schedule", "run", "yearly").stdout.strip()
        assert again == first.id.replace("-1", "-2")
        assert cluster.command("result", again, "--timeout", "30").stdout == f"{sum(numbers) + 7}\n"
        assert again in cluster.command("ps").stdout
        (listed,) = json.loads(cluster.command("schedule", "--json").stdout)
        assert (listed["name"], listed["state"], listed["fired"]) == ("yearly", "active", 2)

        assert cluster.command("schedule", "pause", "yearly").returncode == 0
        assert shown(cluster, "yearly")["next"] is None
        service.schedule("0 4 * * *", numbers[:3], name="yearly")  # the program is started again
        assert shown(cluster, "yearly")["state"] == "paused"
        assert "next" in cluster.command("schedule", "resume", "yearly").stdout
        changed = shown(cluster, "yearly")
        assert changed["next"].endswith("T04:00:00Z")
        assert [call["state"] for call in changed["calls"]] == ["succeeded"] * 2
        assert schedule.run().get(timeout=30) == 3

        assert cluster.command("schedule", "remove", "yearly").returncode == 0
        gone = cluster.command("schedule", "show", "yearly")
        assert gone.returncode == 1
        assert "there is no schedule 'yearly'" in gone.stderr
        with pytest.raises(FlameError, match="there is no schedule"):
            schedule.run()
    assert "there are no schedules" in cluster.command("schedule", "list").stderr


def test_what_can_be_no_schedule_is_refused_with_a_reason(cluster: LabCluster) -> None:
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        service = runner.service(total)
        with pytest.raises(NoOrchestrator, match="start one"):
            service.schedule(NEVER_NOW, [1], name="x")
        cluster.orchestrator()
        for cron, zone, words in (
            ("61 * * * *", "UTC", "cron '61"),
            ("0 0 30 2 *", "UTC", "no time that ever comes"),
            ("0 3 * * *", "Mars/Olympus", "knows no such zone"),
        ):
            with pytest.raises(FlameError, match=words):
                service.schedule(cron, [1], timezone=zone, name="x")
        assert client.schedules() == []


@pytest.mark.timeout(180)
def test_killed_orchestrators_lose_no_moment_and_meet_none_twice(
    cluster: LabCluster, tmp_path: Path
) -> None:
    orchestrators = [cluster.orchestrator(), cluster.orchestrator()]
    cluster.worker("--slots", "2")
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        retry = flame.Retry(backoff=flame.Retry().backoff / 100, on=ConnectionError)
        service = runner.service(flaky, retry=retry)
        started = time.time()
        schedule = service.schedule("* * * * * *", str(tmp_path), name="secondly", catch_up="all")
        for share in (2, 4):
            wait_until(lambda: len(made(cluster)) >= share, 60)  # noqa: B023
            orchestrators.pop(0).kill()
            orchestrators.append(cluster.orchestrator())
        wait_until(lambda: len(made(cluster)) >= 8, 60)
        schedule.pause()
        wait_until(lambda: {state for _, _, state in made(cluster)} == {"succeeded"}, 60)
        first = schedule.calls()[-1]
        assert flame.attach(first, client=client).get(timeout=30) == 2
    rows = made(cluster)
    numbers = [counter for counter, _, _ in rows]
    assert numbers == list(range(1, len(rows) + 1))
    with closing(sqlite3.connect(cluster.folder / "home" / "ledger.sqlite")) as database:
        (last,) = database.execute("SELECT fired_at FROM schedules").fetchone()
    assert 0 <= last - started <= len(rows) + 1, "a moment without a call"


def test_a_call_that_has_ended_runs_again_as_a_new_one(cluster: LabCluster, tmp_path: Path) -> None:
    cluster.orchestrator()
    worker = cluster.worker("--slots", "1")
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        service = runner.service(doubtful)
        failed = service(str(tmp_path))
        with pytest.raises(RuntimeError, match="something is wrong"):
            failed.get(timeout=30)
        wait_until(lambda: (client.story(failed.id) or {}).get("state") == "failed", 15)
        (tmp_path / "right").touch()
        done = cluster.command("retry", failed.id)
        assert done.returncode == 0, done.stderr
        new = done.stdout.strip()
        assert new != failed.id
        assert cluster.command("result", new, "--timeout", "30").stdout == "right\n"
        assert (client.story(failed.id) or {})["state"] == "failed"

        worker.terminate()
        waiting = service(str(tmp_path))
        wait_until(lambda: client.story(waiting.id), 15)
        refused = cluster.command("retry", new, waiting.id, "nobody-1", "--json")
        assert refused.returncode == 1
        rows = json.loads(refused.stdout)
        assert rows[0]["retry"]
        assert f"{waiting.id} has not ended, it is queued" in rows[1]["problem"]
        assert "knows no call nobody-1" in rows[2]["problem"]
        waiting.cancel()
        with pytest.raises(CallCancelled):
            raise CallCancelled("x")
    assert cluster.command("retry", "nonsense").returncode == 2
