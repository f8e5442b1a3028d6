"""The clock of a machine is set anew while calls wait and run: none is late for that reason."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from lab import Process
from lab.cluster import LabCluster
from lab.skewed import SkewedClock
from lab.wait import wait_until

HOUR_S = 3600.0
ONE = ("client", "worker", "orchestrator")
STATES = {"succeeded": 84, "expired": 2}

PROGRAM = """
import json, pathlib, sys, time
import flame
from flame.errors import CallExpired

folder = pathlib.Path(sys.argv[1])

def work(number):
    return number

def hold(name):
    (folder / (name + ".held")).touch()
    while not (folder / (name + ".go")).exists():
        time.sleep(0.01)
    return name

runner = flame.Runner("t")
holding = runner.service(hold, timeout=60)
service = runner.service(work, queue_timeout=60, timeout=30)
hasty = runner.service(work, queue_timeout=1)

def batch(name):
    # Two calls run, and twenty wait behind them, when the clock jumps.
    running = [holding(name + side) for side in "ab"]
    while len(list(folder.glob(name + "*.held"))) < 2:
        time.sleep(0.01)
    waiting = [service(number) for number in range(20)]
    (folder / (name + ".ready")).touch()
    while not (folder / (name + ".jumped")).exists():
        time.sleep(0.01)
    late = [service(number) for number in range(20, 40)]
    since = time.monotonic()
    doomed = hasty(0)
    try:
        doomed.get(timeout=30)
        expired_after_s = None
    except CallExpired:
        expired_after_s = time.monotonic() - since
    for side in "ab":
        (folder / (name + side + ".go")).touch()
    assert runner.get(running, timeout=30) == [name + "a", name + "b"]
    assert runner.get(waiting + late, timeout=30) == list(range(40))
    return expired_after_s

print(json.dumps([batch("forth"), batch("back")]), flush=True)
"""


@pytest.mark.parametrize("jump_s", [HOUR_S, -HOUR_S], ids=["forwards", "backwards"])
@pytest.mark.parametrize(
    "whose", ["all", *(pytest.param(one, marks=pytest.mark.soak) for one in ONE)]
)
def test_a_clock_that_jumps_by_an_hour_and_back_ends_no_call(
    cluster: LabCluster, tmp_path: Path, whose: str, jump_s: float
) -> None:
    clock, program = SkewedClock(tmp_path), tmp_path / "program.py"
    program.write_text(PROGRAM)
    skewed = {name: clock.environ if whose in (name, "all") else {} for name in ONE}
    cluster.orchestrator(**skewed["orchestrator"])
    cluster.worker("--slots", "2", **skewed["worker"])
    environ = {**cluster.environ, **skewed["client"]}
    with Process([sys.executable, program, tmp_path], env=environ) as client:
        for name, offset_s in (("forth", jump_s), ("back", 0.0)):
            ready = tmp_path / f"{name}.ready"
            wait_until(lambda: ready.exists() or not client.running, 30, client.output)  # noqa: B023
            clock.set(offset_s)
            (tmp_path / f"{name}.jumped").touch()
        assert client.wait(60) == 0, client.output()
        expired_after_s = json.loads(client.output().splitlines()[-1])
    assert all(after_s is not None and 1 <= after_s < 10 for after_s in expired_after_s)
    check_history(cluster)


def check_history(cluster: LabCluster) -> None:
    with cluster.client() as client:
        wait_until(lambda: Counter(call["state"] for call in client.calls(limit=500)) == STATES, 30)
        calls, now = client.calls(limit=500), time.time()
    assert all(call["queued_at"] <= call["ended_at"] for call in calls)
    assert all(abs(call["queued_at"] - now) < HOUR_S + 60 for call in calls)
