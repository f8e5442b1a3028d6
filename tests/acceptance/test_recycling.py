"""A worker replaces children as it was told, and no call is lost."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import flame
from lab.cluster import LabCluster
from lab.wait import wait_until


def _process_id(_: int) -> int:
    return os.getpid()


@pytest.mark.parametrize("option", [("--recycle-calls", "20"), ("--recycle-memory", "1m")])
def test_children_are_replaced_while_calls_go_on(
    cluster: LabCluster, option: tuple[str, str]
) -> None:
    cluster.worker("--slots", "1", "--cpu", "1", *option)
    with cluster.client() as client, flame.Runner("recycling", client=client) as runner:
        service = runner.service(_process_id)
        pids = [pid for _ in range(5) for pid in service.map(range(100))]
        assert len(pids) == 500
        assert len(set(pids)) > 1
        children = [Path(f"/proc/{pid}") for pid in set(pids)]
        wait_until(lambda: sum(path.exists() for path in children) <= 1, 10)


def test_a_child_within_its_bounds_stays(cluster: LabCluster) -> None:
    cluster.worker("--slots", "1", "--cpu", "1")
    with cluster.client() as client, flame.Runner("recycling", client=client) as runner:
        assert len({*runner.service(_process_id).map(range(1000))}) == 1
