"""How soon the calls of a lost worker run elsewhere, and what many workers' heartbeats cost."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

import flame
import targets
from history_figures import orchestrator
from measure import Driver, Figure

if TYPE_CHECKING:
    from systems.flame import FlameSystem

WORKERS = 1_000
RUNS_EACH = 2
BEAT_EVERY_S = 3.0
LISTENED_S = 15.0
AGAIN_WITHIN_S = 90.0
POLL_S = 0.01


class Notes:
    """When and under which workers a call has started."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def starts(self) -> list[tuple[float, int]]:
        """The starts so far: seconds since 1970, and the worker's process id."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [(float(at), int(worker)) for at, worker in (line.split() for line in lines)]

    def wait(self, starts: int) -> list[tuple[float, int]]:
        """Wait until there are so many."""
        deadline = time.monotonic() + AGAIN_WITHIN_S
        while len(found := self.starts()) < starts:
            assert time.monotonic() < deadline, f"{len(found)} of {starts} starts"
            time.sleep(POLL_S)
        return found


def lost_workers(driver: Driver) -> Figure:
    """From the loss of a worker to the start of its call elsewhere, in three cases."""
    system: FlameSystem = driver.system  # type: ignore[assignment]
    with (
        tempfile.TemporaryDirectory(prefix="flame-lost-") as folder,
        orchestrator(system, f"sqlite:///{folder}/ledger.sqlite"),
    ):
        return {
            "closed_s": _lose(system, Path(folder, "closed"), signal.SIGKILL),
            "silent_s": _lose(system, Path(folder, "silent"), signal.SIGSTOP),
            "leased_s": _lose(system, Path(folder, "leased"), signal.SIGSTOP, leased=True),
        }


def _lose(system: FlameSystem, path: Path, by: signal.Signals, *, leased: bool = False) -> float:
    """Run a call, lose its worker; seconds until it starts again."""
    with _another_worker(system):
        notes, service = Notes(path), system.runner.service(targets.noted)
        future: flame.ObjectFuture[int] = service(str(path), AGAIN_WITHIN_S)
        ((_, victim),) = notes.wait(1)
        deadline = time.monotonic() + AGAIN_WITHIN_S
        while leased and (system.client.story(future.id) or {}).get("state") != "running":
            assert time.monotonic() < deadline, "the call got no lease"
            time.sleep(POLL_S)
        lost_at = time.time()
        os.kill(victim, by)
        try:
            (_, (again_at, _)) = notes.wait(2)
            future.result(AGAIN_WITHIN_S)
        finally:
            _bury(system, victim)
    return again_at - lost_at


@contextmanager
def _another_worker(system: FlameSystem) -> Iterator[None]:
    """Two workers: whichever gets the call, the other one is there for it."""
    system.start_worker()
    asked = time.monotonic() + AGAIN_WITHIN_S
    while len(system.client.workers()) < len(system.workers):
        assert time.monotonic() < asked, "a worker does not answer"
    yield
    for worker in system.workers[1:]:
        system.stop_worker(worker)


def _bury(system: FlameSystem, pid: int) -> None:
    """End what is left of a lost worker."""
    worker = next(worker for worker in system.workers if worker.pid == pid)
    worker.kill()
    worker.wait()
    system.workers.remove(worker)


def heartbeats(driver: Driver) -> Figure:
    """The share of a core that the orchestrator spends on many workers with leases."""
    system: FlameSystem = driver.system  # type: ignore[assignment]
    with (
        tempfile.TemporaryDirectory(prefix="flame-beats-") as folder,
        orchestrator(system, f"sqlite:///{folder}/ledger.sqlite") as pid,
    ):
        process = psutil.Process(pid)
        idle = _share(process, lambda: time.sleep(LISTENED_S / 3))
        busy = asyncio.run(_beat(system, process))
    return {"workers": WORKERS, "runs": WORKERS * RUNS_EACH, "idle_cores": idle, "cores": busy}


def _share(process: psutil.Process, work: Callable[[], None]) -> float:
    before, started = sum(process.cpu_times()[:2]), time.perf_counter()
    work()
    return float(sum(process.cpu_times()[:2]) - before) / (time.perf_counter() - started)


async def _beat(system: FlameSystem, process: psutil.Process) -> float:
    """Play the workers: claim their calls, then beat; the orchestrator's share of a core."""
    from flame_broker.connect import open_transport
    from flame_broker.facts import fold
    from flame_broker.frames import encode
    from flame_broker.keys import Key
    from flame_broker.messages import Call, CallFrame, CallSpec, Claim, ControlFrame, Target
    from flame_broker.topology import beats_exchange, custody_queue

    key = Key.parse(system.key)
    custody, exchange = custody_queue(key.hex_id).name, beats_exchange(key.hex_id)
    transport = open_transport(system.lab.amqp_url, name="flame-bench beats")
    await transport.open()
    spec = CallSpec(Target("module:function"))
    runs = [f"worker{n % WORKERS}/{n}" for n in range(WORKERS * RUNS_EACH)]
    for number, run in enumerate(runs):
        calls = (Call(number, b""),)
        frame = CallFrame("flame.v1.0.default.c1.normal", "nobody", "bench", spec, calls)
        claim = Claim(custody, frame, run, run.partition("/")[0], "nobody")
        await transport.publish(custody, encode(claim, key))
    while await transport.depth(custody):  # noqa: ASYNC110  # a broker tells nobody
        await asyncio.sleep(POLL_S)
    bodies = []
    for number in range(WORKERS):
        held = tuple(islice(runs, number, None, WORKERS))
        said = {
            "worker": f"worker{number}",
            "reply": "nobody",
            "runs": held,
            "facts": fold(_facts_of(number, held)),
        }
        bodies.append(encode(ControlFrame(exchange, "beat", said), key))
    before, started = sum(process.cpu_times()[:2]), time.perf_counter()
    for beat in range(int(LISTENED_S / BEAT_EVERY_S) * WORKERS):
        due = started + beat * BEAT_EVERY_S / WORKERS
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        await transport.publish(
            "", bodies[beat % WORKERS], exchange=exchange, mandatory=False, persistent=False
        )
    spent = sum(process.cpu_times()[:2]) - before
    elapsed = time.perf_counter() - started
    await transport.close()
    return float(spent) / elapsed


def _facts_of(number: int, runs: tuple[str, ...]) -> dict[str, Any]:
    """About as much as a worker says of itself."""
    return {
        "worker": f"worker{number}", "pool": "default", "host": f"node{number}.cluster.example",
        "pid": 4711, "slots": 16, "busy": len(runs), "held": len(runs), "gpus": 0,
        "capacity": "cpu=16,mem=64g", "python": "3.12.3", "format": 1,
        "store": "s3://bucket/prefix?endpoint=https://store.cluster.example:9000",
        "connected": True, "draining": False, "started_at": time.time(), "clock": time.time(),
        "labels": "rack=b12", "count_frames": 1000, "count_calls": 100_000,
        "running": tuple((f"0123456789-{number}", "train.model", 123.456) for _ in range(16)),
    }  # fmt: skip


FIGURES: dict[str, Callable[[Driver], Figure]] = {
    "heartbeats": heartbeats,
    "lost_workers": lost_workers,
}
