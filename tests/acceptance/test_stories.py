"""The delivery protocol's stories: keys, cancels, limits, and clients that come and go."""

from __future__ import annotations

import os
import random
import secrets
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

import flame
from flame.errors import CallExpired, CallTimeout
from flame_broker.keys import Key
from flame_broker.topology import calls_queue, dead_queue, ledger_queue, parked_queue, reply_queue
from lab import Process, RabbitNode, TcpProxy
from lab.cluster import LabCluster
from lab.hostile import Forger, draw, publish
from lab.rabbit_client import through
from lab.wait import wait_until


def note(folder: str, number: int, seconds: float = 0.0) -> int:
    """Leave a trace of every run."""
    with Path(folder, str(number)).open("a") as file:
        file.write("x")
    time.sleep(seconds)
    return number


def runs(folder: Path) -> Counter[int]:
    """How often each call ran."""
    return Counter({int(path.name): len(path.read_text()) for path in folder.glob("[0-9]*")})


def depth_of_calls(cluster: LabCluster) -> int | None:
    return cluster.depth(lambda key, pool: calls_queue(key, pool, "c1"))


# ── keys and versions ────────────────────────────────────────────────────────


def test_calls_queued_under_the_old_key_run_after_a_rotation(cluster: LabCluster) -> None:
    new = secrets.token_urlsafe(32)
    with cluster.client() as client, flame.Runner("old", client=client) as runner:
        queued = [runner.service(abs)(-i) for i in range(100)]
        wait_until(lambda: depth_of_calls(cluster), 10)
        cluster.worker("--slots", "1", FLAME_KEY=f"{new},{cluster.key}")
        assert runner.get(queued, timeout=30) == list(range(100))
        with (
            flame.connect(cluster.broker_url, store=cluster.store_url, key=new) as newer,
            flame.Runner("new", client=newer) as other,
        ):
            assert other.service(abs)(-1).get(timeout=30) == 1
        assert runner.service(abs)(-2).get(timeout=30) == 2


def test_a_worker_without_the_key_leaves_the_calls_alone(cluster: LabCluster) -> None:
    stranger = cluster.worker("--slots", "2", FLAME_KEY=secrets.token_urlsafe(32))
    cluster.worker("--slots", "1")
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        service = runner.service(abs)
        futures = [service(-i) for i in range(1000)]
        assert runner.get(futures, timeout=30) == list(range(1000))
        assert len(client.workers()) == 1
    assert not [name for name in stranger.health if name.startswith("count_")]
    assert cluster.depth(dead_queue) == cluster.depth(parked_queue) == 0


def test_beside_an_old_worker_newer_messages_park_and_the_rest_goes_on(
    cluster: LabCluster,
) -> None:
    cluster.worker("--slots", "1")
    queue = calls_queue(cluster.key_id, "default", "c1").name
    forger = Forger(Key.parse(cluster.key), queue, cluster.folder / "mark")
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        service = runner.service(abs)
        before = [service(-i) for i in range(200)]
        publish(cluster.broker_url, queue, draw(forger.newer, 20, 1))
        after = [service(-i) for i in range(200)]
        assert runner.get(before + after, timeout=30) == [*range(200), *range(200)]
    wait_until(lambda: cluster.depth(parked_queue) == 20, 10)


# ── cancels ──────────────────────────────────────────────────────────────────


def test_a_cancel_while_no_worker_is_there_is_immediate(
    cluster: LabCluster, tmp_path: Path
) -> None:
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        service = runner.service(note)
        cancelled, kept = service(str(tmp_path), 1), service(str(tmp_path), 2)
        wait_until(lambda: depth_of_calls(cluster), 10)
        assert cancelled.cancel()
        assert cancelled.cancelled()
        cluster.worker("--slots", "1")
        assert kept.get(timeout=30) == 2  # the other may run too: a durable cancel needs a ledger
        assert cancelled.cancelled()


def test_a_cancel_that_races_with_the_result_ends_one_way(cluster: LabCluster) -> None:
    cluster.worker("--slots", "1")
    ends: Counter[str] = Counter()
    dice = random.Random(1)
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        service = runner.service(abs)
        taken_s = _round_trip_s(service)
        for number in range(500):
            future = service(-number)
            called_back: list[object] = []
            future.add_done_callback(called_back.append)
            # Up to twice what a call takes here and now, so that either may win.
            _pause(dice.random() * 2 * taken_s)
            took = future.cancel()
            assert future.wait(10)
            assert took == future.cancelled()
            assert took or future.result(0) == number
            assert called_back == [future]
            ends["cancelled" if took else "done"] += 1
        assert service(-7).get(timeout=30) == 7
    assert min(ends["cancelled"], ends["done"]) > 10, ends


def _round_trip_s(service: flame.RunnerService) -> float:
    """The median of a few calls."""
    taken = []
    for _ in range(21):
        began = time.perf_counter()
        assert service(-1).get(timeout=30) == 1
        taken.append(time.perf_counter() - began)
    return sorted(taken)[10]


def _pause(seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        time.sleep(0)


def test_cancelling_a_running_call_interrupts_it_and_frees_its_slot(
    cluster: LabCluster, tmp_path: Path
) -> None:
    cluster.worker("--slots", "1")
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        service = runner.service(note)
        stuck = service(str(tmp_path), 1, 60)
        wait_until((tmp_path / "1").exists, 20)
        began = time.monotonic()
        assert stuck.cancel()
        assert service(str(tmp_path), 2).get(timeout=30) == 2
        assert time.monotonic() - began < 4  # before the grace of a call that will not stop


# ── limits ───────────────────────────────────────────────────────────────────


def test_a_call_that_waits_too_long_expires_and_never_runs(
    cluster: LabCluster, tmp_path: Path
) -> None:
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        late = runner.service(note, queue_timeout=0.5)(str(tmp_path), 1)
        wait_until(lambda: depth_of_calls(cluster), 10)
        time.sleep(0.5)  # the delay itself is the story
        cluster.worker("--slots", "1")
        with pytest.raises(CallExpired):
            late.get(timeout=30)
        in_time = runner.service(note, queue_timeout=30)(str(tmp_path), 2)
        assert in_time.get(timeout=30) == 2
    assert runs(tmp_path) == {2: 1}


def test_a_call_of_a_pool_without_workers_expires(cluster: LabCluster, tmp_path: Path) -> None:
    cluster.worker("--slots", "1")
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        late = runner.service(note, pool="gpus", queue_timeout=0.5)(str(tmp_path), 1)
        with pytest.raises(CallExpired, match="'note' in pool 'gpus'"):
            late.get(timeout=30)
        assert runner.service(note)(str(tmp_path), 2).get(timeout=30) == 2
    assert runs(tmp_path) == {2: 1}


def test_a_timeout_ends_the_call_and_frees_its_slot(cluster: LabCluster, tmp_path: Path) -> None:
    cluster.worker("--slots", "1")
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        service = runner.service(note, timeout=0.5)
        with pytest.raises(CallTimeout):
            service(str(tmp_path), 1, 60).get(timeout=20)
        assert service(str(tmp_path), 2).get(timeout=20) == 2


# ── clients that come and go ─────────────────────────────────────────────────


def test_a_client_cut_off_while_it_publishes_resolves_every_call_once(
    cluster: LabCluster, rabbit: RabbitNode
) -> None:
    cluster.worker("--slots", "2")
    counted: Counter[str] = Counter()
    with (
        TcpProxy(rabbit.port) as proxy,
        cluster.client(through(proxy, cluster.broker_url)) as client,
        flame.Runner("t", client=client) as runner,
    ):
        service = runner.service(abs)
        futures = []
        for number in range(2000):
            if number % 400 == 200:
                proxy.cut()
            futures.append(service(-number))
            futures[-1].add_done_callback(lambda f: counted.update([f.id]))
        assert runner.get(futures, timeout=60) == list(range(2000))
    assert set(counted.values()) == {1}
    assert len(counted) == 2000


def test_a_reply_queue_deleted_while_a_call_runs_is_replaced_in_time(
    own_rabbit: RabbitNode, own_cluster: LabCluster, tmp_path: Path
) -> None:
    worker = own_cluster.worker("--slots", "1")
    with own_cluster.client() as client, flame.Runner("t", client=client) as runner:
        service = runner.service(note)
        running = service(str(tmp_path), 1, 3.0)
        wait_until((tmp_path / "1").exists, 20)
        own_rabbit.ctl("delete_queue", reply_queue(own_cluster.key_id, client.id, 0).name)
        assert running.get(timeout=30) == 1
        assert service(str(tmp_path), 2).get(timeout=30) == 2
        wait_until(lambda: worker.health["held"] == 0, 10)


def test_results_that_nobody_waits_for_go_to_the_ledger(
    cluster: LabCluster, tmp_path: Path
) -> None:
    worker = cluster.worker("--slots", "1")
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        futures = [runner.service(note)(str(tmp_path), number, 0.5) for number in range(4)]
        wait_until((tmp_path / "0").exists, 20)
    assert all(future.done() for future in futures)  # closing the client gave them up
    wait_until(lambda: cluster.depth(lambda key, _: ledger_queue(key)), 20)
    wait_until(lambda: set(runs(tmp_path)) == set(range(4)), 20)
    wait_until(lambda: worker.health["held"] == 0, 10)
    wait_until(lambda: depth_of_calls(cluster) == 0, 10)


DOOMED = """
import os, sys, time
import flame
sys.path.insert(0, os.path.dirname(sys.argv[1]))

def work(folder, number):
    with open(os.path.join(folder, str(number)), "a") as file:
        file.write("x")
    time.sleep(0.02)
    return number

with flame.connect() as client, flame.Runner("doomed", client=client) as runner:
    service = runner.service(work)
    futures = [service(sys.argv[1], number) for number in range(100)]
    runner.get(futures[:5], timeout=30)
    print("in flight", flush=True)
    time.sleep(60)
"""


def test_calls_of_a_killed_client_run_to_their_end_and_block_nobody(
    cluster: LabCluster, tmp_path: Path
) -> None:
    worker = cluster.worker("--slots", "1")
    traces = tmp_path / "traces"
    traces.mkdir()
    program = tmp_path / "doomed.py"
    program.write_text(DOOMED)
    doomed = Process([sys.executable, program, traces], env=cluster.environ)
    try:
        wait_until(lambda: "in flight" in doomed.output(), 30, doomed.output)
    finally:
        doomed.kill()
    wait_until(lambda: len(runs(traces)) == 100, 30)
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        assert runner.service(os.getpid)().get(timeout=30)
    wait_until(lambda: worker.health["held"] == 0, 10)
    wait_until(lambda: depth_of_calls(cluster) == 0, 10)
    assert set(runs(traces).values()) == {1}
