"""Calls that wait for others or for a place under a limit, as a program sees them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import flame
from flame.errors import CallCancelled
from lab.cluster import LabCluster


def add(folder: str, line: str) -> str:
    """Write a line; all lines so far."""
    path = Path(folder, "lines")
    with path.open("a") as file:
        file.write(line)
    return path.read_text()


def fail() -> None:
    raise ValueError("it was so")


def spend(seconds: float) -> tuple[float, float]:
    """When it began and when it ended."""
    began = time.time()
    time.sleep(seconds)  # the call's work
    return began, time.time()


def test_calls_start_in_the_order_that_they_were_given_and_in_vain_if_one_fails(
    cluster: LabCluster, tmp_path: Path
) -> None:
    cluster.orchestrator()
    cluster.worker("--slots", "2")
    folder = str(tmp_path)
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        service = runner.service(add)
        last = service.options(not_before=0.5)(folder, "a")
        for letter in "bcd":
            last = service.options(after=[last])(folder, letter)
        assert last.get(timeout=60) == "abcd"
        plain = service(folder, "e")
        assert service.options(after=plain.id)(folder, "f").get(timeout=60) == "abcdef"
        bad = runner.service(fail)()
        vain = service.options(after=[bad, last])(folder, "g")
        further = service.options(after=[vain])(folder, "h")
        with pytest.raises(CallCancelled, match=f"after {bad.id}, which failed: ValueError"):
            vain.get(timeout=60)
        with pytest.raises(CallCancelled, match=f"after {vain.id}"):
            further.get(timeout=60)
        untracked = runner.service(add, track=False)(folder, "i")
        with pytest.raises(ValueError, match="nobody follows that call"):
            service.options(after=[untracked])


def test_no_more_calls_run_at_a_time_than_their_limit_says(cluster: LabCluster) -> None:
    cluster.orchestrator()
    cluster.worker("--slots", "6")
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        service = runner.service(spend)
        two = service.options(limit=flame.Limit("license", 2))
        spans = runner.get([two(0.2) for _ in range(8)], timeout=60)
        for moment, _ in spans:
            assert sum(began <= moment < ended for began, ended in spans) <= 2
        assert len([*runner.get([service(0.0) for _ in range(8)], timeout=60)]) == 8
