"""A small cluster of real processes: a broker URL, a store folder, a key, and workers."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flame
from flame_broker.connect import open_transport
from flame_broker.keys import Key
from flame_broker.transport import QueueSpec
from lab.processes import Process
from lab.wait import wait_until

__all__ = ["LabCluster", "LabWorker"]

_BIN = Path(sys.executable).parent


class LabWorker(Process):
    """A ``flame-worker`` process that says in its health file how it is."""

    def __init__(self, *options: str, environ: Mapping[str, str], folder: Path) -> None:
        self._health_file = folder / f"health-{secrets.token_hex(3)}.json"
        super().__init__(
            [_BIN / "flame-worker", "--health-file", self._health_file, *options], env=environ
        )

    @property
    def health(self) -> dict[str, Any]:
        """What it last wrote about itself; empty before the first time."""
        try:
            return json.loads(self._health_file.read_text())  # type: ignore[no-any-return]
        except FileNotFoundError:
            return {}

    def wait_ready(self) -> LabWorker:
        """Wait until it takes calls."""
        wait_until(lambda: self.health or not self.running, 30, self.output)
        assert self.running, self.output()
        return self


class LabCluster:
    """What a client and workers need to find each other.

    Args:
        broker_url: The broker.
        folder: For the home and the store.
        store_url: Instead of a folder.
    """

    def __init__(self, broker_url: str, folder: Path, *, store_url: str = "") -> None:
        self.folder = folder
        self.broker_url = broker_url
        self.store_url = store_url or f"file://{folder}/store"
        self.key = secrets.token_urlsafe(32)
        self.workers: list[LabWorker] = []
        self.orchestrators: list[Process] = []

    @property
    def environ(self) -> dict[str, str]:
        """Environment variables for every program of this cluster."""
        return {
            **os.environ,
            "FLAME_BROKER_URL": self.broker_url,
            "FLAME_STORE_URL": self.store_url,
            "FLAME_KEY": self.key,
            "FLAME_HOME": str(self.folder / "home"),
        }

    def worker(self, *options: str, **environ: str) -> LabWorker:
        """Start a worker and wait until it is ready."""
        return self.start_worker(*options, **environ).wait_ready()

    def start_worker(self, *options: str, **environ: str) -> LabWorker:
        """Start a worker."""
        started = LabWorker(*options, environ={**self.environ, **environ}, folder=self.folder)
        self.workers.append(started)
        return started

    def orchestrator(self, *options: str, **environ: str) -> Process:
        """Start an orchestrator and wait until it listens."""
        started = self.start_orchestrator(*options, **environ)
        wait_until(
            lambda: "orchestrator.ready" in started.output() or not started.running,
            30,
            started.output,
        )
        assert started.running, started.output()
        return started

    def start_orchestrator(self, *options: str, **environ: str) -> Process:
        """Start an orchestrator."""
        started = Process(
            [_BIN / "flame-orchestrator", "-v", *options], env={**self.environ, **environ}
        )
        self.orchestrators.append(started)
        return started

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run the ``flame`` command as a user of this cluster would."""
        return subprocess.run(
            [_BIN / "flame", *words], env=self.environ, capture_output=True, text=True, timeout=60
        )

    def client(self, broker_url: str = "") -> flame.Client:
        """Connect as a user's program would."""
        return flame.connect(broker_url or self.broker_url, store=self.store_url, key=self.key)

    @property
    def key_id(self) -> str:
        """As queue names carry it."""
        return Key.parse(self.key).hex_id

    def depth(self, queue: Callable[[str, str], QueueSpec], pool: str = "default") -> int | None:
        """Messages that wait in one of the pool's queues, as ``topology`` names it."""
        return asyncio.run(self._depth(queue(self.key_id, pool).name))

    async def _depth(self, queue: str) -> int | None:
        transport = open_transport(self.broker_url, name="flame-lab")
        await transport.open()
        try:
            return await transport.depth(queue)
        finally:
            await transport.close()

    def close(self) -> None:
        """End the workers and orchestrators."""
        for process in (*self.workers, *self.orchestrators):
            process.kill()
