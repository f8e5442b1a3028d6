"""Figures that only Flame has: packing under slow calls, one big array, start-up times."""

from __future__ import annotations

import heapq
import io
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flame
import targets
from measure import Driver, Figure, Peak, timed_calls
from processes import memory_bytes
from s3_counting import served_bytes

if TYPE_CHECKING:
    from systems.flame import FlameSystem

ARRAY_SHAPE = (2048, 16_384)
"""256 MiB of float64."""
ARRAY_CALLS = 8
MIXED_CALLS = 1_600
SHORT_S = 0.001
CROWD_CALLS = 1_000_000
SINGLE_CALLS = 20
READY_POLL_S = 0.01


def perfect_packing_s(durations: list[float], slots: int) -> float:
    """Time that a queue takes when every free slot starts the next call at once."""
    free_at = [0.0] * slots
    for duration in durations:
        heapq.heappush(free_at, heapq.heappop(free_at) + duration)
    return max(free_at)


def mixed(driver: Driver) -> Figure:
    """Calls of 1 ms of which 1 % are long, on two workers with two slots each."""
    system: FlameSystem = driver.system  # type: ignore[assignment]
    durations = [SHORT_S] * MIXED_CALLS
    for at in random.Random(1).sample(range(MIXED_CALLS), MIXED_CALLS // 100):
        durations[at] = driver.settings.long_nap_s
    second = system.start_worker()
    try:
        await_children(system, 2 * system.lab.worker_processes)
        started = time.perf_counter()
        system.burst(targets.nap, durations)
        elapsed = time.perf_counter() - started
    finally:
        system.stop_worker(second)
    ideal_s = perfect_packing_s(durations, 2 * system.lab.worker_processes)
    return {"calls": MIXED_CALLS, "seconds": elapsed, "ideal_s": ideal_s}


def beside_map(driver: Driver) -> Figure:
    """One call at a time of one client while a map of another client keeps all slots busy."""
    system: FlameSystem = driver.system  # type: ignore[assignment]
    over = threading.Event()

    def crowd() -> None:
        with system.runner.service(targets.nap).map(repeat(SHORT_S, CROWD_CALLS)) as results:
            for _ in results:
                if over.is_set():
                    return

    with system.new_client() as client:
        service = flame.Runner(client=client).service(targets.noop)
        assert service(0).get() == 0
        crowding = threading.Thread(target=crowd)
        crowding.start()
        try:
            times = timed_calls(lambda value: service(value).get(60), SINGLE_CALLS)
        finally:
            over.set()
            crowding.join()
    return {"calls": SINGLE_CALLS, "p50_s": statistics.median(times), "worst_s": max(times)}


def await_children(system: FlameSystem, count: int, limit_s: float = 10.0) -> None:
    """Wait until all workers have their children and every slot has run a call."""
    deadline = time.monotonic() + limit_s
    while len(system.roles()["child"]) < count and time.monotonic() < deadline:
        time.sleep(READY_POLL_S)
    system.burst(targets.nap, [0.1] * count * 4)


def plain_s(client: Any, data: bytes, name: str) -> float:
    """Upload and download with boto3's own transfer manager, which also uses ranges."""
    started = time.perf_counter()
    client.upload_fileobj(io.BytesIO(data), "bench", name)
    target = io.BytesIO()
    client.download_fileobj("bench", name, target)
    elapsed = time.perf_counter() - started
    assert target.getbuffer().nbytes == len(data)
    client.delete_object(Bucket="bench", Key=name)
    return elapsed


def shared_s(system: FlameSystem, array: Any) -> float:
    """Put the array once, pass it to several calls, and wait for all of them."""
    started = time.perf_counter()
    reference = system.runner.put_object(array)
    service = system.service(targets.column_sum)
    futures = [service(reference, column) for column in range(ARRAY_CALLS)]
    sums = [future.get() for future in futures]
    elapsed = time.perf_counter() - started
    assert sums == [targets.column_sum(array, column) for column in range(ARRAY_CALLS)]
    return elapsed


def private_bytes(pid: int) -> int:
    """Private memory of a child; mapped pages of the copy that all share do not count."""
    return memory_bytes(pid)["anonymous_bytes"]


def array_256m(driver: Driver) -> Figure:
    """A 256 MiB array to 8 calls on one node, against a plain upload and download."""
    import boto3
    import numpy as np

    system: FlameSystem = driver.system  # type: ignore[assignment]
    random_numbers = np.random.default_rng(1)
    small, big = random_numbers.random((64, 64)), random_numbers.random(ARRAY_SHAPE)
    shared_s(system, np.tile(small, 32))
    client = boto3.client("s3", endpoint_url=system.lab.s3_endpoint)
    plain = [plain_s(client, big.tobytes(), "plain")]
    served = served_bytes(system.lab.s3_endpoint).total()
    with ExitStack() as watching:
        children = [Peak(partial(private_bytes, pid)) for pid in system.roles()["child"]]
        for child in children:
            watching.enter_context(child)
        seconds = shared_s(system, big)
    served = served_bytes(system.lab.s3_endpoint).total() - served
    plain.append(plain_s(client, big.tobytes(), "plain"))
    return {
        "seconds": seconds,
        "plain_s": statistics.mean(plain),
        "times_plain": seconds / statistics.mean(plain),
        "downloads": served / big.nbytes,
        "child_growth_bytes": max(child.growth_bytes for child in children),
    }


def worker_ready(driver: Driver) -> Figure:
    """From starting a worker until it has answered a call that already waits in the queue."""
    system: FlameSystem = driver.system  # type: ignore[assignment]
    for worker in system.workers[:]:
        system.stop_worker(worker)
    future = system.service(targets.noop)(1)
    started = time.perf_counter()
    system.start_worker()
    assert future.get(timeout=30) == 1
    return {"seconds": time.perf_counter() - started}


def median_ms(command: list[str], *, printed: bool) -> Figure:
    """Median wall time of a command in ms, or of the number of seconds that it prints."""
    times: list[float] = []
    for _ in range(7):
        started = time.perf_counter()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        elapsed = time.perf_counter() - started
        times.append(float(done.stdout) if printed else elapsed)
    return {"ms": statistics.median(times) * 1e3}


def import_flame(driver: Driver) -> Figure:
    """`import flame` in a fresh interpreter."""
    timed = "import time as t; s = t.perf_counter(); import flame; print(t.perf_counter() - s)"
    return median_ms([sys.executable, "-c", timed], printed=True)


def flame_help(driver: Driver) -> Figure:
    """`flame --help`, the whole process."""
    return median_ms([str(Path(sys.executable).with_name("flame")), "--help"], printed=False)


FIGURES: dict[str, Callable[[Driver], Figure]] = {
    "mixed": mixed,
    "beside_map": beside_map,
    "array_256m": array_256m,
    "import_flame": import_flame,
    "flame_help": flame_help,
    "worker_ready": worker_ready,
}
