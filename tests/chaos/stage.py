"""The cluster under test: every party behind a proxy of its own, and started again when it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Event, RLock
from typing import Any

import flame
from chaos.targets import SEAT
from chaos.traces import Traces
from lab.cluster import LabCluster, LabWorker
from lab.processes import Process
from lab.proxy import TcpProxy
from lab.rabbit import RabbitNode
from lab.rabbit_client import through
from lab.wait import wait_until

__all__ = ["CLIENT", "Party", "Seat", "Stage"]

CLIENT = "client"

_LEASE = ("--lease", "6")  # shorter than most pauses, so that leases are lost
_WORKERS = 3
_ORCHESTRATORS = 2

# A silent peer is given up soon, so that a pause of some seconds is longer than that.
_HEARTBEAT = "?heartbeat=2"
_START_S = 120.0  # with a broker that restarts meanwhile, on a slow machine
_BOTH = 2  # a transport has a connection to publish and one to consume


class Party:
    """A process that talks to the broker through a proxy.

    Attributes:
        name: In records and in the report.
        proxy: Its way to the broker.
        lock: Held by whoever does something to it.
    """

    def __init__(self, name: str, node: RabbitNode) -> None:
        self.name = name
        self.proxy = TcpProxy(node.port)
        self.lock = RLock()
        self._url = node.url

    @property
    def url(self) -> str:
        """The broker as it sees it."""
        return through(self.proxy, self._url, _HEARTBEAT)

    @property
    def connected(self) -> bool:
        """Whether both its connections are there, as far as the proxy knows."""
        return self.proxy.connections >= _BOTH


class Seat(Party):
    """A place for a worker or an orchestrator, which is started again when it ends.

    Args:
        name: In records and in the report.
        node: The broker.
        make: Starts a process with options and environment variables.
        options: Its options.

    Attributes:
        process: Who sits there now.
        logs: What all who sat there have written.
        surprises: What nobody did to them.
    """

    def __init__(
        self, name: str, node: RabbitNode, make: Callable[..., Process], *options: str
    ) -> None:
        super().__init__(name, node)
        self._make = make
        self._options = options
        self.process: Process | None = None
        self.logs: list[Path] = []
        self.surprises: list[str] = []

    @property
    def pid(self) -> int:
        """The process that sits there now."""
        assert self.process is not None, f"{self.name} was never started"
        return self.process.pid

    @property
    def health(self) -> dict[str, Any]:
        """What a worker last wrote about itself."""
        return self.process.health if isinstance(self.process, LabWorker) else {}

    @property
    def well(self) -> bool:
        """Whether it is at work and connected."""
        return self.process is not None and self.process.running and self._ready and self.connected

    @property
    def _ready(self) -> bool:
        if isinstance(self.process, LabWorker):
            return bool(self.process.health)
        return self.process is not None and "orchestrator.ready" in self.process.output()

    def start(self) -> None:
        """Start it; it may leave again at once, while there is no broker."""
        environ = {"FLAME_BROKER_URL": self.url, SEAT: self.name}
        self.process = self._make(*self._options, **environ)
        self.logs.append(self.process.log)

    def kill(self) -> None:
        """End it as a power cut would."""
        assert self.process is not None, f"{self.name} was never started"
        if not self.process.running:
            self.surprises.append(f"{self.name} had ended by itself: {self._last_words()}")
        self.process.kill()

    def recover(self, over: Event, *, timeout_s: float = _START_S) -> bool:
        """Wait until it is well, and start it again as often as it leaves; False if it never is."""
        deadline = time.monotonic() + timeout_s
        while not (self.well or over.is_set()) and time.monotonic() < deadline:
            if self.process is None or not self.process.running:
                self.start()
            over.wait(0.05)
        return self.well

    def check(self) -> None:
        """Note it if it has ended by itself."""
        if self.process is not None and not self.process.running:
            self.surprises.append(f"{self.name} has ended by itself: {self._last_words()}")

    def tracebacks(self) -> list[str]:
        """The logs in which something was raised that nobody expected."""
        return [str(log) for log in self.logs if "Traceback" in log.read_text(errors="replace")]

    def _last_words(self) -> str:
        assert self.process is not None
        return self.process.output().strip().rpartition("\n")[2][-200:]


class Stage:
    """Workers, orchestrators and a client around one broker.

    Args:
        node: The broker, running.
        folder: For the store, the history and the traces.
        slots: Of each worker.
    """

    def __init__(self, node: RabbitNode, folder: Path, *, slots: int) -> None:
        self.node = node
        self.cluster = LabCluster(node.url, folder)
        self.traces = Traces(folder / "traces")
        self.client = Party(CLIENT, node)
        self.broker_lock = RLock()
        self.workers = [
            Seat(f"worker-{number}", node, self.cluster.start_worker, "--slots", str(slots))
            for number in range(_WORKERS)
        ]
        self.orchestrators = [
            Seat(f"orchestrator-{number}", node, self.cluster.start_orchestrator, *_LEASE)
            for number in range(_ORCHESTRATORS)
        ]

    @property
    def seats(self) -> list[Seat]:
        """Whoever is a process of its own."""
        return [*self.workers, *self.orchestrators]

    @property
    def parties(self) -> list[Party]:
        """Whoever is connected to the broker."""
        return [*self.seats, self.client]

    @property
    def losses(self) -> Mapping[str, list[float]]:
        """When each party lost a connection, whatever the cause."""
        return {party.name: party.proxy.ended for party in self.parties}

    @contextmanager
    def opened(self) -> Iterator[flame.Client]:
        """Start everybody and connect a client; end them all afterwards."""
        try:
            self.orchestrators[0].start()  # the first makes the database
            wait_until(lambda: self.orchestrators[0].well, _START_S, "the orchestrator is ready")
            for seat in [*self.workers, *self.orchestrators[1:]]:
                seat.start()
            wait_until(lambda: all(seat.well for seat in self.seats), _START_S, self._who_is_not)
            with self.cluster.client(self.client.url) as client:
                wait_until(lambda: client.id and self.client.connected)
                yield client
        finally:
            self.close()

    def close(self) -> None:
        """End everybody."""
        self.cluster.close()
        for party in self.parties:
            party.proxy.close()

    def forget_logs(self) -> None:
        """Remove what the processes have written; for a run that went well."""
        for seat in self.seats:
            for log in seat.logs:
                log.unlink(missing_ok=True)

    def _who_is_not(self) -> str:
        return f"not ready: {[seat.name for seat in self.seats if not seat.well]}"
