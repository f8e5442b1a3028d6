"""What keeping a history costs, and how fast it is written and read."""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flame
import targets
from measure import Driver, Figure, percentile, timed_burst
from processes import resident_bytes

if TYPE_CHECKING:
    from systems.flame import FlameSystem

FRAME_CALLS = 64
FRAMES_A_WRITE = 400
BURSTS = 5
READY_S = 30.0
DEPOSITED_A_S = 3_000
"""So many calls are deposited a second at least; none is due before all are."""


@contextmanager
def orchestrator(system: FlameSystem, database: str) -> Iterator[int]:
    """A ``flame-orchestrator`` beside the measured broker, ready; its process id."""
    program = Path(sys.executable).with_name("flame-orchestrator")
    environ = {**os.environ, **system.environment(), "FLAME_DATABASE_URL": database}
    with (
        tempfile.NamedTemporaryFile() as said,  # a pipe would fill, and stop it
        subprocess.Popen([program, "-v"], env=environ, stderr=said) as run,
    ):
        deadline = time.monotonic() + READY_S
        try:
            while "orchestrator.ready" not in (words := Path(said.name).read_text()):
                assert run.poll() is None, words
                assert time.monotonic() < deadline, words
                time.sleep(0.02)
            yield run.pid
        finally:
            run.terminate()


def tracked(driver: Driver) -> Figure:
    """Bursts of separate futures without an orchestrator and with one, in turns."""
    system: FlameSystem = driver.system  # type: ignore[assignment]
    count = driver.settings.futures_calls
    rates: dict[str, list[float]] = {"without": [], "with": []}
    with tempfile.TemporaryDirectory(prefix="flame-history-") as folder:
        timed_burst(system, count // 10)
        rates["without"] = [timed_burst(system, count) for _ in range(BURSTS)]
        with orchestrator(system, f"sqlite:///{folder}/ledger.sqlite"):
            system.call(targets.noop, 0)
            rates["with"] = [timed_burst(system, count) for _ in range(BURSTS)]
            known = _await_history(system, BURSTS * count)
    middle = {name: statistics.median(found) for name, found in rates.items()}
    return {**rates, "kept": middle["with"] / middle["without"], "known": known}


def _await_history(system: FlameSystem, calls: int) -> int:
    """How many of the calls the history knows as succeeded; all, or it is an error."""
    deadline = time.monotonic() + READY_S
    wanted = min(calls, 10_000)  # the most that one question gives
    while True:
        known = len(system.client.calls(state="succeeded", limit=wanted))
        if known == wanted or time.monotonic() > deadline:
            assert known == wanted, f"the history knows {known} of {wanted} calls"
            return known
        time.sleep(0.1)


def history(driver: Driver) -> Figure:
    """A history of many calls: written as frames arrive, then listed by the command."""
    from flame_orchestrator.database import open_database
    from flame_orchestrator.ledger import Ledger

    system: FlameSystem = driver.system  # type: ignore[assignment]
    calls = driver.settings.history_calls
    with tempfile.TemporaryDirectory(prefix="flame-history-") as folder:
        database = f"sqlite:///{folder}/ledger.sqlite"
        ledger = Ledger(open_database(database))
        arrivals = _arrivals(calls)
        ledger.record(next(arrivals))
        before, started = resident_bytes(os.getpid()), time.perf_counter()
        spent = sum(_timed(ledger, taken) for taken in arrivals)
        elapsed = time.perf_counter() - started
        growth = resident_bytes(os.getpid()) - before
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        with orchestrator(system, database):
            listed = _median_s(lambda: _list(system))
    return {
        "calls": calls,
        "rate": calls / spent,
        "seconds": elapsed,
        "growth_bytes": growth,
        "database_bytes": size,
        "ps_ms": listed * 1e3,
    }


def delayed(driver: Driver) -> Figure:
    """Calls with random due times: how long after them they start, at their workers."""
    system: FlameSystem = driver.system  # type: ignore[assignment]
    calls, span_s = driver.settings.delayed_calls, driver.settings.delayed_s
    chance = random.Random(calls)
    with (
        tempfile.TemporaryDirectory(prefix="flame-delayed-") as folder,
        orchestrator(system, f"sqlite:///{folder}/ledger.sqlite") as pid,
        flame.Runner(client=system.client) as runner,
    ):
        service = runner.service(targets.started_late)
        started = time.perf_counter()
        first = time.time() + calls / DEPOSITED_A_S
        dues = [first + chance.uniform(0, span_s) for _ in range(calls)]
        futures = [
            service.options(not_before=datetime.fromtimestamp(due, UTC))(due) for due in dues
        ]
        submitted_s = time.perf_counter() - started
        late = sorted(future.result(span_s + 300) for future in futures)
        peak_bytes = _peak_bytes(pid)
    return {
        "calls": calls,
        "span_s": span_s,
        "submitted_s": submitted_s,
        "late_p50_ms": percentile(late, 0.5) * 1e3,
        "late_p99_ms": percentile(late, 0.99) * 1e3,
        "late_most_ms": late[-1] * 1e3,
        "early": sum(seconds < 0 for seconds in late),
        "peak_bytes": peak_bytes,
    }


def _peak_bytes(pid: int) -> int:
    """The most memory that a process has had resident."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def _timed(ledger: Any, arrivals: list[Any]) -> float:
    started = time.perf_counter()
    ledger.record(arrivals)
    return time.perf_counter() - started


def _arrivals(calls: int) -> Iterator[list[Any]]:
    """Frames of calls and of their results, as a map sends them."""
    from flame_broker.codec import encode_value
    from flame_broker.frames import encode
    from flame_broker.keys import Key
    from flame_broker.messages import (
        Call,
        CallFrame,
        CallSpec,
        Result,
        ResultFrame,
        Status,
        Target,
    )
    from flame_orchestrator.ledger import Arrival

    key, payload = Key(b"k" * 32), encode_value(3).join()
    spec = CallSpec(Target("module:function"), label="function")
    taken: list[Any] = []
    for first in range(1, calls, FRAME_CALLS):
        counters = range(first, first + FRAME_CALLS)
        queued = CallFrame(
            "flame.v1.00000000.default.c1.normal",
            "reply",
            "client",
            spec,
            tuple(Call(counter, payload) for counter in counters),
        )
        results = tuple(Result(counter, Status.OK, payload) for counter in counters)
        ended = ResultFrame("reply", "client", "worker", results)
        taken += [Arrival(queued, encode(queued, key)), Arrival(ended, encode(ended, key))]
        if len(taken) >= FRAMES_A_WRITE:
            yield taken
            taken = []
    yield taken or [Arrival(queued, encode(queued, key))]


def _list(system: FlameSystem) -> None:
    command = [Path(sys.executable).with_name("flame"), "ps", "--json"]
    environ = {**os.environ, **system.environment()}
    # An installed Flame is compiled once; without this each run would compile all it imports.
    environ.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(command, env=environ, check=True, capture_output=True)
    assert done.stdout.count(b'"id"') == 50


def _median_s(work: Callable[[], None]) -> float:
    times = []
    for _ in range(7):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


FIGURES: dict[str, Callable[[Driver], Figure]] = {
    "delayed": delayed,
    "history": history,
    "tracked": tracked,
}
