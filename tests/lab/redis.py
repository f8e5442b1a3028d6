"""A Redis server of one's own."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from lab.ports import answers, free_port
from lab.processes import Process
from lab.services import program
from lab.wait import wait_until

__all__ = ["RedisServer"]


class RedisServer:
    """One Redis on this machine with its own port and folder; data survives ``stop``/``start``."""

    def __init__(self) -> None:
        self.port = free_port()
        self._program = program(["redis-server", "valkey-server"], package="redis-server")
        self.folder = Path(tempfile.mkdtemp(prefix="flame-redis-"))
        self._process: Process | None = None

    @property
    def url(self) -> str:
        """Address of database 0."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def running(self) -> bool:
        """Whether the server's process runs."""
        return self._process is not None and self._process.running

    @property
    def pid(self) -> int:
        """Process id of the server."""
        assert self._process is not None, "the server was never started"
        return self._process.pid

    def start(self) -> Self:
        """Start the server on its old data, and wait until it answers."""
        if self.running:
            return self
        settings = {
            "--port": str(self.port),
            "--bind": "127.0.0.1",
            "--dir": str(self.folder),
            "--appendonly": "yes",
            "--save": "",
        }
        arguments = [part for setting in settings.items() for part in setting]
        process = Process([self._program, *arguments], log=self.folder / "console.log")
        self._process = process

        def serving() -> bool:
            assert process.running, f"redis-server ended: {process.output()[-4000:]}"
            return answers(self.port)

        wait_until(serving, 30, lambda: f"redis-server: {process.output()[-4000:]}")
        return self

    def stop(self) -> None:
        """Shut the server down in order."""
        if self._process is not None:
            self._process.terminate()

    def kill(self) -> None:
        """End the server as a power cut would (SIGKILL)."""
        if self._process is not None:
            self._process.kill()

    def pause(self) -> None:
        """Freeze the server: connections stay open and nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let a frozen server go on."""
        os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        """Kill the server and remove its folder."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        """Start the server."""
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the server."""
        self.close()
