"""The services a benchmark run starts for itself: RabbitMQ, S3, and the peers' environment."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lab.ports import answers, free_port
from lab.processes import Process
from lab.rabbit import RabbitNode
from lab.s3 import S3Server
from lab.wait import wait_until

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PEERS_PYTHON = ROOT / ".bench-venv" / "bin" / "python"
PEERS_REQUIREMENTS = ROOT / "requirements" / "bench.txt"
BUCKET = "bench"


class CountingS3(S3Server):
    """The lab's S3 server with a counter of served bytes before it."""

    def start(self) -> CountingS3:
        """Start the server and wait until it answers."""
        self.port = free_port()
        environment = {**os.environ, "PYTHONPATH": str(HERE)}
        command = [sys.executable, "-m", "s3_counting", str(self.port)]
        self._process = Process(command, env=environment)
        wait_until(lambda: answers(self.port), 60, self._process.output)
        return self


@dataclass(frozen=True, slots=True)
class Services:
    """What runs for the measured systems."""

    rabbit: RabbitNode
    s3: CountingS3

    def store_url(self) -> str:
        """URL of the object store in the run's bucket."""
        return self.s3.store_url(BUCKET, "objects")


@contextmanager
def services() -> Iterator[Services]:
    """Start RabbitMQ (without its management plugin, which costs CPU) and S3; stop both."""
    with RabbitNode(management=False) as rabbit, CountingS3() as s3:
        s3.make_bucket(BUCKET)
        yield Services(rabbit, s3)


def peers_python() -> Path:
    """The interpreter of the peers' environment, made and filled when it is not up to date."""
    stamp = PEERS_PYTHON.parent.parent / "installed.txt"
    wanted = PEERS_REQUIREMENTS.read_text()
    if not stamp.exists() or stamp.read_text() != wanted:
        print("installing the peers into .bench-venv", flush=True)
        folder = PEERS_PYTHON.parent.parent
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(PEERS_PYTHON), "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, "-r", str(PEERS_REQUIREMENTS)], check=True)
        stamp.write_text(wanted)
    return PEERS_PYTHON
