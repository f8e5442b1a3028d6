"""Who gets a slot when many want one: no client, class or slow call keeps others waiting."""

from __future__ import annotations

import random
import threading
import time
from itertools import repeat
from typing import Self

import pytest

import flame
from lab.cluster import LabCluster
from lab.wait import wait_until

MILLION = 1_000_000


def work(number: int, seconds: float = 0.001) -> int:
    time.sleep(seconds)
    return number


def start_time(_number: int, seconds: float) -> float:
    began = time.time()
    time.sleep(seconds)
    return began


class Flood:
    """A map over a million inputs in a thread of its own, from `with` until the block is left.

    Attributes:
        done: How many of its results have come.
    """

    def __init__(self, service: flame.RunnerService[int], seconds: float) -> None:
        self.done = 0
        self._service = service
        self._seconds = seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._consume, daemon=True)

    def _consume(self) -> None:
        with self._service.map(range(MILLION), repeat(self._seconds)) as results:
            for _ in results:
                self.done += 1
                if self._over.is_set():
                    return

    def __enter__(self) -> Self:
        self._thread.start()
        wait_until(lambda: self.done > 200, 30)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self._thread.join(30)
        assert not self._thread.is_alive(), "the map stands still"


@pytest.mark.parametrize(
    ("seconds", "most"),
    [(0.0, 20_000), (0.001, 4_000), (0.005, 800)],
    ids=["no-op", "1 ms", "5 ms"],
)
def test_a_million_calls_of_one_client_do_not_stand_before_one_of_another(
    cluster: LabCluster, seconds: float, most: int
) -> None:
    # What two slots get done of it in two seconds at most, wherever a second is that long.
    cluster.worker("--slots", "2")
    with (
        cluster.client() as greedy,
        cluster.client() as modest,
        flame.Runner("greedy", client=greedy) as crowd,
        flame.Runner("modest", client=modest) as runner,
    ):
        single = runner.service(abs)
        assert single(-1).get(timeout=30) == 1
        with Flood(crowd.service(work), seconds) as flood:
            for number in range(5):
                before = flood.done
                assert single(-number).get(timeout=60) == number
                assert flood.done - before < most


@pytest.mark.parametrize("cpus", [2, 8])
def test_a_large_call_among_endless_small_ones_gets_its_turn(
    cluster: LabCluster, cpus: int
) -> None:
    cluster.worker("--slots", str(cpus), "--cpu", str(cpus))
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        with Flood(runner.service(work), 0.02) as flood:
            before = flood.done
            large = runner.service(work, resreq=f"cpu={cpus}")
            assert large(1).get(timeout=60) == 1
            assert flood.done - before < 15 * cpus / 0.02  # what they do in 15 s
        small = [runner.service(work)(number) for number in range(10)]
        assert runner.get(small, timeout=30) == list(range(10))


def test_an_idle_worker_changes_from_class_to_class_at_once(cluster: LabCluster) -> None:
    cluster.worker("--slots", "2", "--cpu", "2")
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        small, large = runner.service(work), runner.service(work, resreq="cpu=2")
        assert small(0).get(timeout=30) == 0  # it is known to be short from here on
        for number in range(3):
            began = time.monotonic()
            assert large(number).get(timeout=30) == number
            assert small(number).get(timeout=30) == number
            assert time.monotonic() - began < 4


def test_a_call_of_high_priority_overtakes_those_that_wait(cluster: LabCluster) -> None:
    cluster.worker("--slots", "1")
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        normal = runner.service(work)
        futures = [normal(number, 0.02) for number in range(300)]
        wait_until(futures[0].done, 30)
        assert runner.service(work, priority="high")(1).get(timeout=30) == 1
        assert sum(future.done() for future in futures) < 150
        assert runner.get(futures, timeout=30) == list(range(300))


def test_calls_start_in_the_order_in_which_they_were_made(cluster: LabCluster) -> None:
    cluster.worker("--slots", "2")
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        started = list(runner.service(start_time).map(range(60), repeat(0.1)))
    order = sorted(range(60), key=started.__getitem__)
    # Two run at a time, and a slot that was free for a moment took one of the last.
    late = [number for place, number in enumerate(order) if number < place - 4]
    assert not late, f"started late: {late} in {order}"


def test_no_short_call_waits_behind_a_long_one_while_a_slot_is_free(cluster: LabCluster) -> None:
    for _ in range(2):
        cluster.worker("--slots", "2")
    long, short, slots = 2.0, 0.001, 4
    seconds = [long] * 8 + [short] * 800
    random.Random(5).shuffle(seconds)
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        service = runner.service(work)
        assert service(0, 0.0).get(timeout=30) == 0
        began = time.monotonic()
        futures = [service(number, s) for number, s in enumerate(seconds)]
        assert runner.get(futures, timeout=60) == list(range(len(seconds)))
        ideal = sum(seconds) / slots
        assert time.monotonic() - began < 1.5 * ideal
