"""The history's database refuses writes for a while: calls flow on, and all are in it later."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import flame
from lab import Process
from lab.cluster import LabCluster
from lab.postgres import PostgresServer
from lab.wait import wait_until

MOUNT = ["unshare", "--mount", "sh", "-c"]

SHORT_S, LONG_S = 4.0, 60.0
pytestmark = pytest.mark.timeout(LONG_S + 120)
how_long = pytest.mark.parametrize(
    "refused_s", [SHORT_S, pytest.param(LONG_S, marks=pytest.mark.soak)]
)


def double(number: int) -> int:
    time.sleep(0.025)  # or there would be more of them than one answer lists
    return number * 2


def call_while_it_refuses(cluster: LabCluster, ledger: Process, refused_s: float) -> int:
    """Make calls for so long, and see each of them come back; gives their number."""
    until = time.monotonic() + refused_s
    count = 0
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        service = runner.service(double)
        while time.monotonic() < until or "ledger.write_failed" not in ledger.output():
            numbers = range(count, count + 50)
            assert runner.get([service(n) for n in numbers], timeout=20) == [2 * n for n in numbers]
            count += 50
            assert time.monotonic() < until + 30, ledger.output()
    return count


def check(cluster: LabCluster, ledger: Process, calls: int, reason: str) -> None:
    """All calls are in the history, and the log has told what was wrong."""
    with cluster.client() as client:
        limit = calls + 100
        states = lambda: Counter(c["state"] for c in client.calls(limit=limit))  # noqa: E731
        wait_until(lambda: states() == {"succeeded": calls}, 60, lambda: f"{states()} of {calls}")
    failed = [line for line in ledger.output().splitlines() if "ledger.write_failed" in line]
    assert all(reason in line and "tried again" in line for line in failed), failed[0]
    assert max(map(len, failed)) < 500
    assert "ledger.writes_again" in ledger.output()
    assert "Traceback" not in ledger.output()


@how_long
def test_a_locked_sqlite_file_delays_the_history_only(
    cluster: LabCluster, refused_s: float
) -> None:
    ledger = cluster.orchestrator()
    cluster.worker("--slots", "2")
    other = sqlite3.connect(cluster.folder / "home" / "ledger.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    calls = call_while_it_refuses(cluster, ledger, refused_s)
    other.execute("ROLLBACK")
    other.close()
    check(cluster, ledger, calls, "database is locked")


@how_long
def test_a_full_disk_delays_the_history_only(
    cluster: LabCluster, tmp_path: Path, refused_s: float
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    with small_disk(cluster, disk) as ledger:
        cluster.worker("--slots", "2")
        inside = ["nsenter", f"--target={ledger.pid}", "--mount"]
        filler = disk / "filler"
        fill = subprocess.run([*inside, "dd", "if=/dev/zero", f"of={filler}"], capture_output=True)
        assert b"No space left" in fill.stderr
        calls = call_while_it_refuses(cluster, ledger, refused_s)
        subprocess.run([*inside, "rm", filler], check=True)
        check(cluster, ledger, calls, "database or disk is full")


@contextmanager
def small_disk(cluster: LabCluster, disk: Path) -> Iterator[Process]:
    """An orchestrator that sees a disk of a few megabytes there."""
    if os.geteuid() or subprocess.run([*MOUNT, "true"], capture_output=True).returncode:
        pytest.skip("only root can mount a disk, and not in every container")
    program = Path(sys.executable).with_name("flame-orchestrator")
    url = f"sqlite:///{disk}/ledger.sqlite"
    script = f"mount -t tmpfs -o size=8m none {disk} && exec {program} -v --database {url}"
    with Process([*MOUNT, script], env=cluster.environ) as ledger:
        wait_until(lambda: "orchestrator.ready" in ledger.output(), 30, ledger.output)
        yield ledger


@how_long
def test_a_locked_table_of_postgresql_delays_the_history_only(
    cluster: LabCluster, postgres: PostgresServer, refused_s: float
) -> None:
    import psycopg

    url = postgres.database(f"locked_{refused_s:.0f}")
    ledger = cluster.orchestrator("--database", url)
    cluster.worker("--slots", "2")
    with psycopg.connect(url.replace("+psycopg", "")) as other:
        other.execute("LOCK TABLE batches IN EXCLUSIVE MODE")
        calls = call_while_it_refuses(cluster, ledger, refused_s)
        other.rollback()
    check(cluster, ledger, calls, "lock timeout")
