"""Calls that need time: tried again, later, or once, whoever is killed meanwhile."""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest

import flame
from flame.errors import NoOrchestrator, WorkerLost
from lab import RabbitNode
from lab.cluster import LabCluster
from lab.rabbit_client import drop_connection
from lab.wait import wait_until

SOON = timedelta(milliseconds=20)


def note(folder: str, name: object) -> int:
    """Leave a mark of this run; how many there are."""
    marks = Path(folder) / str(name)
    with marks.open("a") as file:
        file.write("x")
    return marks.stat().st_size


def flaky(folder: str, name: object, good_at: int) -> tuple[int, int]:
    """Fail until the run of that number."""
    runs = note(folder, name)
    if runs < good_at:
        raise ConnectionResetError(f"run {runs} is not good enough")
    call = flame.current_call()
    assert call is not None
    return runs, call.attempt


def leave(folder: str, name: object, code: int) -> int:
    """End the program at first."""
    runs = note(folder, name)
    if runs == 1:
        sys.exit(code)
    return runs


def die(folder: str, name: object) -> int:
    """Kill the child at first."""
    runs = note(folder, name)
    if runs == 1:
        os._exit(7)
    return runs


def started_at(folder: str, name: object) -> float:
    note(folder, name)
    return time.time()


def hold(release: str) -> bool:
    """Run until told."""
    Path(release).with_name("held").touch()
    wait_until(Path(release).exists, 60)
    return True


def _tombstones(client: flame.Client) -> object:
    """What the orchestrator tells a new worker not to start."""
    return client.session.courier.ask(lambda inquiry: inquiry.ask("cancelled"))["cancelled"]


def _state(client: flame.Client, call: str) -> object:
    story = client.story(call)
    return None if story is None else story["state"]


def runs_of(folder: Path, name: object) -> int:
    marks = folder / str(name)
    return marks.stat().st_size if marks.exists() else 0


def test_a_failed_call_is_tried_again_by_its_policy(cluster: LabCluster, tmp_path: Path) -> None:
    cluster.orchestrator()
    cluster.worker("--slots", "2")
    marks = str(tmp_path)
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        retry = flame.Retry(attempts=3, backoff=SOON, on=(ConnectionError,))
        service = runner.service(flaky, retry=retry)
        good, bad = service(marks, "good", 3), service(marks, "bad", 9)
        assert good.get(timeout=30) == (3, 3)
        with pytest.raises(ConnectionResetError, match="run 3 is not good enough"):
            bad.get(timeout=30)
        picky = runner.service(flaky, retry=flame.Retry(backoff=SOON, on=(KeyError,)))
        with pytest.raises(ConnectionResetError, match="run 1"):
            picky(marks, "picky", 2).get(timeout=30)
        story = client.story(bad.id)
        assert story is not None
        assert (story["state"], story["attempt"]) == ("failed", 3)
        assert [*service.map([marks] * 50, range(50), [2] * 50)] == [(2, 2)] * 50


def test_exits_and_lost_children_are_tried_again_where_the_policy_says_so(
    cluster: LabCluster, tmp_path: Path
) -> None:
    cluster.orchestrator()
    cluster.worker("--slots", "2")
    marks = str(tmp_path)
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        coded = runner.service(leave, retry=flame.Retry(backoff=SOON, on=(), exit_codes=(75,)))
        assert coded(marks, "75", 75).get(timeout=30) == 2
        with pytest.raises(SystemExit):
            coded(marks, "76", 76).get(timeout=30)
        lost = runner.service(die, retry=flame.Retry(backoff=SOON, on=WorkerLost))
        assert lost(marks, "lost").get(timeout=30) == 2
        with pytest.raises(WorkerLost):
            runner.service(die, retry=flame.Retry(backoff=SOON, on=OSError))(marks, "b").get(30)


def test_a_delayed_call_is_shown_as_waiting_and_starts_in_time(
    cluster: LabCluster, tmp_path: Path
) -> None:
    cluster.orchestrator()
    cluster.worker("--slots", "1")
    marks = str(tmp_path)
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        service = runner.service(started_at)
        distant = service.options(not_before=timedelta(days=2))(marks, "distant")
        due = time.time() + 1.5
        soon = service.options(not_before=1.5)(marks, "soon")
        at_once = service(marks, "at once")
        assert at_once.get(timeout=30) < due
        assert soon.get(timeout=30) >= due - 0.01
        listed = cluster.command("ps", "--state", "waiting", "--json")
        assert [facts["id"] for facts in json.loads(listed.stdout)] == [distant.id]
        shown = json.loads(cluster.command("show", distant.id, "--json").stdout)
        assert shown["state"] == "waiting"
        assert shown["due"] > shown["queued"]
        ended = cluster.command("cancel", distant.id, soon.id)
        assert ended.returncode == 1
        assert f"{distant.id} (started_at) is cancelled" in ended.stdout
        assert f"{soon.id} (started_at) had ended before: succeeded" in ended.stdout
        wait_until(lambda: client.story(distant.id)["state"] == "cancelled", 15)  # type: ignore[index]
    assert runs_of(tmp_path, "distant") == 0


def test_what_has_a_key_is_done_once_for_all_clients(cluster: LabCluster, tmp_path: Path) -> None:
    cluster.orchestrator()
    cluster.worker("--slots", "2")
    marks = str(tmp_path)
    with cluster.client() as one, cluster.client() as two:
        services = [flame.Runner("t", client=client).service(note) for client in (one, two)]
        futures = [s.options(key="report")(marks, "report") for s in services for _ in range(5)]
        assert {future.get(timeout=30) for future in futures} == {1}
        assert services[1].options(key="report")(marks, "report").get(timeout=30) == 1
        assert services[1].options(key="other")(marks, "report").get(timeout=30) == 2


def test_without_an_orchestrator_what_needs_time_is_refused_and_says_why(
    cluster: LabCluster, tmp_path: Path
) -> None:
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        future = runner.service(note, retry=flame.Retry())(str(tmp_path), "x")
        with pytest.raises(NoOrchestrator, match="start `flame-orchestrator`"):
            future.get(timeout=30)


def test_what_needs_time_waits_for_an_orchestrator_that_is_down_and_the_rest_goes_on(
    cluster: LabCluster, tmp_path: Path
) -> None:
    orchestrator = cluster.orchestrator()
    cluster.worker("--slots", "1")
    marks = str(tmp_path)
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        service = runner.service(flaky, retry=flame.Retry(backoff=SOON))
        assert service(marks, "before", 2).get(timeout=30) == (2, 2)
        orchestrator.kill()
        kept = service(marks, "kept", 2)
        assert runner.service(note)(marks, "plain").get(timeout=30) == 1
        assert not kept.done()
        cluster.orchestrator()
        assert kept.get(timeout=30) == (2, 2)


def test_a_cancel_holds_for_workers_that_come_later_and_for_those_that_come_back(
    cluster: LabCluster, rabbit: RabbitNode, tmp_path: Path
) -> None:
    cluster.orchestrator()
    marks = str(tmp_path)
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        service = runner.service(note)
        cancelled, kept = service(marks, "cancelled"), service(marks, "kept")
        wait_until(lambda: client.story(cancelled.id), 15)
        ours = service.options(key="ours")(marks, "ours")
        wait_until(lambda: _state(client, ours.id) == "queued", 15)
        assert cancelled.cancel()
        assert ours.cancel()
        wait_until(lambda: _state(client, ours.id) == "cancelled", 15)
        cluster.worker("--slots", "1")
        assert kept.get(timeout=30) == 1
        wait_until(lambda: _state(client, cancelled.id) == "cancelled", 15)
        # What a worker has ended needs none; ours may still be in a queue, for all we know.
        assert _tombstones(client) == ((ours.id.partition("-")[0], (3,)),)

        release = tmp_path / "release"
        busy = runner.service(hold)(str(release))
        wait_until((tmp_path / "held").exists, 15)
        behind = service(marks, "behind")
        drop_connection(rabbit, "consumer", of='flame-worker [^"]+', url=cluster.broker_url)
        assert behind.cancel()
        wait_until(lambda: _state(client, behind.id) == "cancelled", 15)
        release.touch()
        assert busy.get(timeout=30) is True
        assert service(marks, "last").get(timeout=30) == 1
    assert [runs_of(tmp_path, name) for name in ("cancelled", "ours")] == [0, 0]
    assert runs_of(tmp_path, "behind") == 0


@pytest.mark.timeout(180)
def test_killed_orchestrators_lose_no_call_and_no_time(cluster: LabCluster, tmp_path: Path) -> None:
    orchestrators = [cluster.orchestrator(), cluster.orchestrator()]
    cluster.worker("--slots", "2")
    marks, calls = str(tmp_path), 300
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        retry = flame.Retry(attempts=10, backoff=timedelta(seconds=0.5), on=ConnectionError)
        service = runner.service(flaky, retry=retry)
        futures = [
            service.options(not_before=number / 30)(marks, number, 1 + number % 3)
            for number in range(calls)
        ]
        for share in (60, 140, 220):
            wait_until(lambda: sum(f.done() for f in futures) >= share, 60)  # noqa: B023
            orchestrators.pop(0).kill()
            more = min(calls, sum(f.done() for f in futures) + 5)
            wait_until(lambda: sum(f.done() for f in futures) >= more, 10)  # noqa: B023
            orchestrators.append(cluster.orchestrator())
        results = runner.get(futures, timeout=60)
    for number, (runs, attempt) in enumerate(results):
        assert runs >= 1 + number % 3
        assert attempt <= runs
