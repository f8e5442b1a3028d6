"""Flame on RabbitMQ: quorum queues, confirms, signed frames, one worker with two slots."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import flame
import flame_figures
import history_figures
import lease_figures
import targets
from processes import descendants
from system import Lab, System, Target

STOP_LIMIT_S = 15.0


class FlameSystem(System):
    """A worker started by its command, and this process as the client."""

    own_figures = MappingProxyType(
        {**flame_figures.FIGURES, **history_figures.FIGURES, **lease_figures.FIGURES}
    )

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.key = secrets.token_urlsafe(32)
        self.workers: list[subprocess.Popen[bytes]] = []
        self.services: dict[Target, Any] = {}

    def start(self) -> None:
        """Start the worker; a client that is closed again sees that it answers."""
        self.start_worker()
        with self.new_client() as client:
            flame.Runner(client=client).service(targets.nap)(0.0).get()

    def start_worker(self) -> subprocess.Popen[bytes]:
        """Start one more worker with the configured number of slots."""
        command = [str(Path(sys.executable).with_name("flame-worker"))]
        command += ["--slots", str(self.lab.worker_processes)]
        worker = subprocess.Popen(command, env={**os.environ, **self.environment()})
        self.workers.append(worker)
        return worker

    def environment(self) -> dict[str, str]:
        """What the worker needs to know."""
        return {
            "FLAME_BROKER_URL": self.lab.amqp_url,
            "FLAME_STORE_URL": self.lab.store_url,
            "FLAME_KEY": self.key,
            **self.credentials,
        }

    @cached_property
    def credentials(self) -> dict[str, str]:
        """Keys for the S3 server, which takes any; set here too, for the client."""
        keys = {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        os.environ.update(keys)
        return keys

    def new_client(self) -> flame.Client:
        """Connect one more client."""
        return flame.connect(self.lab.amqp_url, store=self.lab.store_url, key=self.key)

    def connect(self) -> None:
        """Connect the client and open a session."""
        self.client = self.new_client()
        self.runner = flame.Runner(client=self.client)

    def service(self, target: Target) -> Any:
        """The service of a target, made at its first use."""
        if target not in self.services:
            self.services[target] = self.runner.service(target)
        return self.services[target]

    def call(self, target: Target, *args: Any) -> Any:
        """Submit and wait."""
        return self.service(target)(*args).get()

    def burst(self, target: Target, arguments: Iterable[Any]) -> list[Any]:
        """Separate futures."""
        service = self.service(target)
        futures = [service(argument) for argument in arguments]
        return [future.get() for future in futures]

    def map(self, target: Target, count: int) -> Iterable[Any]:
        """The service's map, chunked as it chooses."""
        results: Iterable[Any] = self.service(target).map(range(count))
        return results

    def roles(self) -> dict[str, list[int]]:
        """The worker daemons and their children."""
        pids = [worker.pid for worker in self.workers]
        return {"worker": pids, "child": [pid for parent in pids for pid in descendants(parent)]}

    def stop_worker(self, worker: subprocess.Popen[bytes]) -> None:
        """Drain one worker; kill it if it does not follow."""
        self.workers.remove(worker)
        worker.send_signal(signal.SIGTERM)
        try:
            worker.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()

    def stop(self) -> None:
        """Close the client, then drain the workers."""
        self.client.close()
        for worker in self.workers[:]:
            self.stop_worker(worker)


SYSTEM = FlameSystem
