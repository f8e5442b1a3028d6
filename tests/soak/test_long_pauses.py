"""What only happens when nothing happens for a long time. ``make soak`` runs it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

import flame
from lab.cluster import LabCluster
from lab.wait import wait_until

PAUSE_S = float(os.environ.get("LAB_PAUSE_S", "300"))
PATIENCE_S = 120.0

pytestmark = [pytest.mark.soak, pytest.mark.timeout(PAUSE_S + 3 * PATIENCE_S)]


def note(folder: str, number: int, seconds: float) -> int:
    """Leave a trace of every run."""
    with Path(folder, str(number)).open("a") as file:
        file.write("x")
    time.sleep(seconds)
    return number


def counted(future: flame.ObjectFuture[int], ends: list[int]) -> flame.ObjectFuture[int]:
    future.add_done_callback(lambda done: ends.append(done.result()))
    return future


def test_a_worker_stopped_for_minutes_goes_on_and_each_result_arrives_once(
    cluster: LabCluster, tmp_path: Path
) -> None:
    worker = cluster.worker("--slots", "2")
    ends: list[int] = []
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        service = runner.service(note)
        futures = [counted(service(str(tmp_path), i, 1.0), ends) for i in range(10)]
        wait_until(lambda: len(ends) >= 2, 30)
        worker.pause()
        time.sleep(PAUSE_S)  # the pause itself is the fault
        worker.resume()
        assert runner.get(futures, timeout=PATIENCE_S) == list(range(10))
        assert service(str(tmp_path), 10, 0.0).get(timeout=PATIENCE_S) == 10
    assert sorted(ends) == list(range(10))
    assert {len((tmp_path / str(i)).read_text()) for i in range(11)} <= {1, 2}


def test_others_do_the_work_of_a_worker_that_is_stopped_for_minutes(
    cluster: LabCluster, tmp_path: Path
) -> None:
    stalled = cluster.worker("--slots", "2")
    ends: list[int] = []
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        service = runner.service(note)
        futures = [counted(service(str(tmp_path), i, 1.0), ends) for i in range(10)]
        wait_until(lambda: len(ends) >= 2, 30)
        stalled.pause()
        cluster.worker("--slots", "2")
        time.sleep(PAUSE_S)  # the pause itself is the fault
        stalled.resume()
        assert runner.get(futures, timeout=PATIENCE_S) == list(range(10))
        assert service(str(tmp_path), 10, 0.0).get(timeout=PATIENCE_S) == 10
    assert sorted(ends) == list(range(10))
