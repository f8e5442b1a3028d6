"""Measures one system inside a driver process: `python -m measure SYSTEM SETTINGS.json OUT.json`.

Runs in the measured system's own environment, so it needs nothing but psutil. The figures run in
the order of `FIGURES`: the cold burst first, because it can be measured only once per client.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Self

import targets
from processes import adopt_orphans, cpu_s, memory_bytes, resident_bytes
from system import Lab, System, Unsupported

Figure = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Settings:
    """How much to measure; sizes in calls, durations in seconds."""

    figures: tuple[str, ...] = ()
    cold_calls: int = 5_000
    sequential_calls: int = 1_000
    sequential_limit_s: float = 5.0
    futures_calls: int = 5_000
    futures_repeats: int = 3
    futures_limit_s: float = 8.0
    map_limit_s: float = 20.0
    payload_limit_s: float = 4.0
    idle_s: float = 10.0
    nap_s: float = 5.0
    history_calls: int = 1_000_000
    delayed_calls: int = 100_000
    delayed_s: float = 100.0
    long_nap_s: float = 5.0
    figure_limit_s: float = 200.0
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Settings:
        """Read the fields that the runner wrote."""
        names = {f.name for f in fields(cls)}
        kept = {key: value for key, value in data.items() if key in names}
        return cls(**{**kept, "figures": tuple(kept.get("figures", ()))})


@dataclass(slots=True)
class Driver:
    """One system, the settings, and what has been measured so far."""

    system: System
    settings: Settings
    results: dict[str, Figure] = field(default_factory=dict)


def percentile(values: list[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the sorted values lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def check(results: list[Any], count: int) -> None:
    """Refuse a run whose answers are not exactly those of `noop` over `range(count)`."""
    if sorted(results) != list(range(count)):
        raise AssertionError(f"expected {count} results, each once; got {len(results)}")


def cold(driver: Driver) -> Figure:
    """The first burst of a new client and a new target, connecting included."""
    count = driver.settings.cold_calls
    started = time.perf_counter()
    driver.system.connect()
    connected = time.perf_counter()
    check(driver.system.burst(targets.noop_cold, range(count)), count)
    ended = time.perf_counter()
    return {
        "calls": count,
        "rate": count / (ended - started),
        "rate_after_connect": count / (ended - connected),
        "connect_s": connected - started,
    }


def memory(driver: Driver) -> Figure:
    """Memory of every process of the system, by role."""
    roles = {"client": [os.getpid()], **driver.system.roles()}
    return {role: [memory_bytes(pid) for pid in pids] for role, pids in roles.items()}


def idle(driver: Driver) -> Figure:
    """Share of one core that each role uses while no call is under way."""
    roles = {"client": [os.getpid()], **driver.system.roles()}
    before = {role: cpu_s(pids) for role, pids in roles.items()}
    started = time.perf_counter()
    time.sleep(driver.settings.idle_s)
    elapsed = time.perf_counter() - started
    cores = {role: (cpu_s(pids) - before[role]) / elapsed for role, pids in roles.items()}
    return {"seconds": elapsed, "cores": cores, "total_cores": sum(cores.values())}


def timed_calls(call: Callable[[int], Any], count: int, limit_s: float = math.inf) -> list[float]:
    """Latencies in seconds of up to `count` calls of `noop`, one at a time, within `limit_s`."""
    latencies: list[float] = []
    stop = time.perf_counter() + limit_s
    for value in range(count):
        started = time.perf_counter()
        result = call(value)
        ended = time.perf_counter()
        assert result == value, f"noop({value}) answered {result!r}"
        latencies.append(ended - started)
        if ended > stop:
            break
    return latencies


def sequential(driver: Driver) -> Figure:
    """Latency of one call at a time, after a tenth as many to warm up."""
    wanted = driver.settings.sequential_calls
    limit_s = driver.settings.sequential_limit_s
    call = partial(driver.system.call, targets.noop)
    timed_calls(call, wanted // 10, limit_s / 5)
    latencies = timed_calls(call, wanted, limit_s)
    return {
        "calls": len(latencies),
        "p50_ms": statistics.median(latencies) * 1e3,
        "p99_ms": percentile(latencies, 0.99) * 1e3,
    }


def timed_burst(system: System, count: int) -> float:
    """Calls per second of one burst of separate futures, all results checked."""
    started = time.perf_counter()
    results = system.burst(targets.noop, range(count))
    elapsed = time.perf_counter() - started
    check(results, count)
    return count / elapsed


def futures(driver: Driver) -> Figure:
    """Bursts of separate futures to warm workers, repeated while the time allows."""
    count = driver.settings.futures_calls
    timed_burst(driver.system, count // 10)
    rates: list[float] = []
    stop = time.perf_counter() + driver.settings.futures_limit_s
    while len(rates) < driver.settings.futures_repeats and time.perf_counter() < stop:
        rates.append(timed_burst(driver.system, count))
    return {"calls": count, "rates": rates, "rate": statistics.median(rates), "best": max(rates)}


class Peak:
    """Samples a size in the background, from `with` to its end, and keeps start and peak."""

    def __init__(self, sample_bytes: Callable[[], int], *, every_s: float = 0.02) -> None:
        self.sample_bytes = sample_bytes
        self.every_s = every_s
        self.done = threading.Event()
        self.start_bytes = self.peak_bytes = sample_bytes()
        self.watcher = threading.Thread(target=self.watch, daemon=True)

    def watch(self) -> None:
        """Sample until told to stop, and once more then."""
        while not self.done.wait(self.every_s):
            self.peak_bytes = max(self.peak_bytes, self.sample_bytes())
        self.peak_bytes = max(self.peak_bytes, self.sample_bytes())

    @property
    def growth_bytes(self) -> int:
        """How far the peak lies over the start."""
        return self.peak_bytes - self.start_bytes

    def __enter__(self) -> Self:
        """Start sampling."""
        self.watcher.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Stop sampling."""
        self.done.set()
        self.watcher.join()


def timed_map(system: System, count: int) -> Figure:
    """Rate of one map over `range(count)`, its sum checked, and the client's peak growth."""
    with Peak(lambda: resident_bytes(os.getpid())) as memory_peak:
        started = time.perf_counter()
        total = sum(system.map(targets.noop, count))
        elapsed = time.perf_counter() - started
    assert total == count * (count - 1) // 2, f"the results of map add up to {total}"
    return {
        "calls": count,
        "rate": count / elapsed,
        "client_growth_bytes": memory_peak.growth_bytes,
        "client_peak_bytes": memory_peak.peak_bytes,
    }


def expected_map_s(driver: Driver, count: int) -> float:
    """A guess of how long `map` takes, from the largest map measured so far or a small one."""
    if "rate" not in driver.results.get("map_100k", {}):
        timed_map(driver.system, 500)  # the first map may start a pool of its own
        driver.results["map_5k"] = timed_map(driver.system, 5_000)
    known = driver.results.get("map_100k") or driver.results["map_5k"]
    return count / float(known.get("rate") or driver.results["map_5k"]["rate"])


def bounded_map(driver: Driver, count: int) -> Figure:
    """Map over `count`, unless it would take longer than the limit."""
    expected_s = expected_map_s(driver, count)
    limit_s = driver.settings.map_limit_s
    if expected_s > limit_s:
        raise Unsupported(f"about {expected_s:.0f} s, over the limit of {limit_s:.0f} s")
    figure = timed_map(driver.system, count)
    clients = driver.results.get("memory", {}).get("client")
    if clients:  # from the first calls on, not only from the maps that came before
        growth = figure["client_peak_bytes"] - clients[0]["rss_bytes"]
        figure["client_growth_bytes"] = max(growth, figure["client_growth_bytes"])
    return figure


def map_100k(driver: Driver) -> Figure:
    """A map over 100,000 numbers."""
    return bounded_map(driver, 100_000)


def map_1m(driver: Driver) -> Figure:
    """A map over 1,000,000 numbers."""
    return bounded_map(driver, 1_000_000)


def round_trips(driver: Driver, size_bytes: int, repeats: int) -> Figure:
    """Median time of `echo` with a payload of `size_bytes`; the first one warms up."""
    payload = os.urandom(size_bytes)
    driver.system.call(targets.echo, payload)
    times: list[float] = []
    stop = time.perf_counter() + driver.settings.payload_limit_s
    while len(times) < repeats and (not times or time.perf_counter() < stop):
        started = time.perf_counter()
        answer = driver.system.call(targets.echo, payload)
        times.append(time.perf_counter() - started)
        assert answer == payload, "echo answered something else"
    return {"size_bytes": size_bytes, "repeats": len(times), "ms": statistics.median(times) * 1e3}


def payload_1k(driver: Driver) -> Figure:
    """Echo of 1 KiB."""
    return round_trips(driver, 1024, 200)


def payload_1m(driver: Driver) -> Figure:
    """Echo of 1 MiB."""
    return round_trips(driver, 1024**2, 30)


def payload_256m(driver: Driver) -> Figure:
    """Echo of 256 MiB."""
    return round_trips(driver, 256 * 1024**2, 2)


def naps(seconds: float, driver: Driver) -> Figure:
    """Calls of one length on two slots, against the time that perfect packing would take."""
    count = round(driver.settings.nap_s / seconds) * driver.system.lab.worker_processes
    driver.system.burst(targets.nap, [seconds] * driver.system.lab.worker_processes)
    started = time.perf_counter()
    driver.system.burst(targets.nap, [seconds] * count)
    elapsed = time.perf_counter() - started
    ideal_s = seconds * count / driver.system.lab.worker_processes
    return {"calls": count, "seconds": elapsed, "ideal_s": ideal_s, "efficiency": ideal_s / elapsed}


FIGURES: dict[str, Callable[[Driver], Figure]] = {
    "cold": cold,
    "memory": memory,
    "idle": idle,
    "sequential": sequential,
    "futures": futures,
    "nap_1ms": partial(naps, 0.001),
    "nap_5ms": partial(naps, 0.005),
    "nap_20ms": partial(naps, 0.02),
    "nap_100ms": partial(naps, 0.1),
    "map_100k": map_100k,
    "map_1m": map_1m,
    "payload_1k": payload_1k,
    "payload_1m": payload_1m,
    "payload_256m": payload_256m,
}


class FigureTimeout(BaseException):
    """A figure took longer than its limit. Not an `Exception`, so that no system swallows it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `FigureTimeout` in the main thread after `seconds`."""

    def expire(signum: int, frame: FrameType | None) -> None:
        raise FigureTimeout(f"not done after {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def attempt(work: Callable[[], Figure], limit_s: float) -> Figure:
    """Do `work`; what goes wrong becomes the figure's text, so that the others still run."""
    try:
        with time_limit(limit_s):
            return work()
    except Unsupported as reason:
        return {"skipped": str(reason)}
    except FigureTimeout as late:
        return {"failed": str(late)}
    # A peer may raise anything at all; one broken figure must not cost the rest of the table.
    except Exception as error:  # noqa: BLE001
        return {"failed": f"{type(error).__name__}: {error}"[:300]}


def measure_all(driver: Driver) -> None:
    """Start the system, measure the chosen figures in order, and stop it."""
    limit_s = driver.settings.figure_limit_s

    def start() -> Figure:
        started = time.perf_counter()
        driver.system.start()
        return {"seconds": time.perf_counter() - started}

    def stop() -> Figure:
        driver.system.stop()
        return {}

    driver.results["start"] = attempt(start, limit_s)
    if "failed" not in driver.results["start"]:
        connect_first = "cold" not in driver.settings.figures
        if connect_first:
            driver.system.connect()
        offered = {**FIGURES, **getattr(driver.system, "own_figures", {})}
        for name, figure in offered.items():
            if name in driver.settings.figures:
                driver.results[name] = attempt(lambda f=figure: f(driver), limit_s)  # type: ignore[misc]
    attempt(stop, limit_s)


def main(name: str, settings_path: str, out_path: str) -> None:
    """Measure the system of module `systems.NAME` and write the figures as JSON."""
    adopt_orphans()
    data = json.loads(Path(settings_path).read_text())
    lab = Lab(**{**data["lab"], "workdir": Path(data["lab"]["workdir"])})
    started = time.perf_counter()
    module = importlib.import_module(f"systems.{name}")
    imported_s = time.perf_counter() - started
    driver = Driver(module.SYSTEM(lab), Settings.from_json(data["settings"]))
    try:
        measure_all(driver)
    finally:
        driver.results["import"] = {"seconds": imported_s}
        Path(out_path).write_text(json.dumps(driver.results))


if __name__ == "__main__":
    main(*sys.argv[1:4])
