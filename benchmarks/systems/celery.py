"""Celery on RabbitMQ: late acks, results over rpc, two prefork processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Any

from celery import Celery
from celery.exceptions import CeleryError

import targets
from processes import descendants
from system import RABBITMQ_LIMIT_BYTES, System, Target, Unsupported

URL_VARIABLE = "FLAME_BENCH_AMQP_URL"
READY_LIMIT_S = 30.0

app = Celery("bench", broker=os.environ.get(URL_VARIABLE), backend="rpc://")
app.conf.update(
    task_acks_late=True,
    broker_connection_retry_on_startup=True,
)
TASKS = {
    target: app.task(target, name=target.__name__)
    for target in (targets.noop, targets.noop_cold, targets.echo, targets.nap)
}


class CelerySystem(System):
    """A worker started by its command, and this process as the client."""

    def start(self) -> None:
        """Start the worker and wait until it answers a ping."""
        app.conf.broker_url = self.lab.amqp_url
        command = [sys.executable, "-m", "celery", "-A", "systems.celery", "worker"]
        command += ["-c", str(self.lab.worker_processes), "--loglevel", "ERROR"]
        command += ["--without-gossip", "--without-mingle"]
        environment = {**os.environ, URL_VARIABLE: self.lab.amqp_url}
        self.worker = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + READY_LIMIT_S
        while not self.answers():
            if time.monotonic() > deadline or self.worker.poll() is not None:
                raise RuntimeError("the Celery worker did not become ready")

    @staticmethod
    def answers() -> bool:
        """Whether a worker answers a ping."""
        try:
            return bool(app.control.ping(timeout=0.2))
        except (CeleryError, OSError):
            return False

    def call(self, target: Target, *args: Any) -> Any:
        """Send the task and wait."""
        if target is targets.echo and len(args[0]) > RABBITMQ_LIMIT_BYTES:
            raise Unsupported("over RabbitMQ's limit of 128 MiB for one message")
        return TASKS[target].delay(*args).get()

    def burst(self, target: Target, arguments: Iterable[Any]) -> list[Any]:
        """Separate results."""
        task = TASKS[target]
        return [result.get() for result in [task.delay(argument) for argument in arguments]]

    def map(self, target: Target, count: int) -> Iterable[Any]:
        """Celery's chunks of 64, as one group."""
        chunks = TASKS[target].chunks(((value,) for value in range(count)), 64)
        for part in chunks.group().apply_async().get():
            yield from part

    def roles(self) -> dict[str, list[int]]:
        """The worker's main process and its prefork children."""
        return {"worker": [self.worker.pid], "child": descendants(self.worker.pid)}

    def stop(self) -> None:
        """Warm shutdown of the worker, killed if it does not follow."""
        self.worker.send_signal(signal.SIGTERM)
        try:
            self.worker.wait(10)
        except subprocess.TimeoutExpired:
            self.worker.kill()
            self.worker.wait()


SYSTEM = CelerySystem
