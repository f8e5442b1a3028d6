"""Workers and children that die, drain and stall: no call is lost, none is blamed wrongly."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

import flame
from flame.errors import Quarantined, WorkerLost
from flame_broker.topology import dead_queue
from lab.cluster import LabCluster, LabWorker
from lab.wait import wait_until


def work(number: int, seconds: float = 0.0) -> int:
    time.sleep(seconds)
    return number


def note(folder: str, number: int, seconds: float = 0.0) -> int:
    """Leave a trace of every run."""
    with Path(folder, str(number)).open("a") as file:
        file.write("x")
    time.sleep(seconds)
    return number


def child_pid() -> int:
    return os.getpid()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_worker(number: int, killer: int) -> int:
    if number == killer:
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    return number


def test_a_killed_child_fails_its_call_alone_and_the_slot_comes_back(
    cluster: LabCluster, tmp_path: Path
) -> None:
    cluster.worker("--slots", "1")
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        pid = runner.service(child_pid)().get(timeout=30)
        stuck = runner.service(note)(str(tmp_path), 1, 60)
        neighbours = [runner.service(work)(i) for i in range(20)]
        # Not sooner: a call that has not started is run again, as it should be.
        wait_until((tmp_path / "1").exists, 30, "the call to start")
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerLost, match="SIGKILL"):
            stuck.get(timeout=30)
        assert runner.get(neighbours, timeout=30) == list(range(20))
        assert runner.service(child_pid)().get(timeout=30) != pid


def test_when_a_worker_is_killed_another_finishes_all_it_had(
    cluster: LabCluster, tmp_path: Path
) -> None:
    first = cluster.worker("--slots", "2")
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        service = runner.service(note)
        futures = [service(str(tmp_path), i, 0.002) for i in range(1000)]
        wait_until(lambda: sum(f.done() for f in futures) > 50, 30)
        first.kill()
        cluster.worker("--slots", "2")
        assert runner.get(futures, timeout=60) == list(range(1000))
    runs = [len((tmp_path / str(i)).read_text()) for i in range(1000)]
    assert min(runs) == 1
    assert max(runs) <= 2


def test_a_call_that_kills_its_worker_is_quarantined_and_its_neighbours_are_not(
    cluster: LabCluster,
) -> None:
    worker = cluster.start_worker("--slots", "2")
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        service = runner.service(kill_worker)
        futures = [service(i, 30) for i in range(65)]
        deaths = 0
        while not all(f.done() for f in futures) and deaths < 8:
            wait_until(partial(_gone_or_done, worker, futures), 60)
            if not worker.running:
                deaths += 1
                worker = cluster.start_worker("--slots", "2")
        with pytest.raises(Quarantined, match="3 times"):
            futures[30].get(timeout=30)
        good = [f for i, f in enumerate(futures) if i != 30]
        assert runner.get(good, timeout=30) == [i for i in range(65) if i != 30]
        assert deaths == 5  # once among its neighbours, once beside them, three times alone
        assert cluster.depth(dead_queue) == 1


def test_a_drain_finishes_what_runs_and_hands_back_the_rest(
    cluster: LabCluster, tmp_path: Path
) -> None:
    first = cluster.worker("--slots", "2")
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        service = runner.service(note)
        futures = [service(str(tmp_path), i, 0.3) for i in range(40)]
        wait_until(lambda: sum(f.done() for f in futures) >= 2, 30)
        first.signal(signal.SIGTERM)
        second = cluster.worker("--slots", "2")
        assert first.wait(30) == 0
        assert runner.get(futures, timeout=60) == list(range(40))
        assert "count_suspects" not in second.health
    runs = [len((tmp_path / str(i)).read_text()) for i in range(40)]
    assert set(runs) == {1}


def test_a_second_sigterm_ends_at_once(cluster: LabCluster) -> None:
    worker = cluster.worker("--slots", "1")
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        future = runner.service(work)(1, 60)
        wait_until(lambda: worker.health.get("busy"), 15)
        worker.signal(signal.SIGTERM)
        wait_until(lambda: "worker.draining" in worker.output(), 10)
        worker.signal(signal.SIGTERM)
        wait_until(lambda: not worker.running, 5)
        future.cancel()


def test_a_worker_stopped_for_ten_seconds_goes_on_and_nothing_is_lost(
    cluster: LabCluster, tmp_path: Path
) -> None:
    stalled = cluster.worker("--slots", "2")
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        service = runner.service(note)
        futures = [service(str(tmp_path), i, 0.01) for i in range(300)]
        wait_until(lambda: any(f.done() for f in futures), 30)
        os.kill(stalled.pid, signal.SIGSTOP)
        cluster.worker("--slots", "2")
        time.sleep(10)  # the pause itself is the fault
        os.kill(stalled.pid, signal.SIGCONT)
        assert runner.get(futures, timeout=60) == list(range(300))


def _gone_or_done(worker: LabWorker, futures: list[flame.ObjectFuture]) -> bool:
    return not worker.running or all(future.done() for future in futures)


def test_a_call_that_outlives_the_drain_of_its_worker_runs_elsewhere(
    cluster: LabCluster, tmp_path: Path
) -> None:
    first = cluster.worker("--slots", "1", "--drain-timeout", "0.5")
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        future = runner.service(note)(str(tmp_path), 7, 3.0)
        trace = tmp_path / "7"
        wait_until(trace.exists, 10, first.output)
        os.kill(first.pid, signal.SIGTERM)
        wait_until(lambda: not first.running, 10, first.output)
        cluster.worker("--slots", "1")
        assert future.get(timeout=30) == 7
    assert trace.read_text() == "xx"
