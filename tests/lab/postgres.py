"""A PostgreSQL server of one's own."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Self

from lab.ports import free_port
from lab.processes import Process
from lab.services import program
from lab.wait import wait_until

__all__ = ["PostgresServer"]

_FOLDERS = [str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]


class PostgresServer:
    """One PostgreSQL on this machine with its own port and folder, without a password.

    PostgreSQL refuses to run as root, so root runs it as the user ``postgres``.
    """

    def __init__(self) -> None:
        self.port = free_port()
        self._programs = {
            name: program(
                [f"{folder}/{name}" for folder in _FOLDERS] + [name], package="postgresql"
            )
            for name in ("initdb", "postgres", "pg_isready", "createdb")
        }
        self._user = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
        self.folder = Path(tempfile.mkdtemp(prefix="flame-postgres-"))
        if os.geteuid() == 0:
            shutil.chown(self.folder, "postgres")
        self._process: Process | None = None

    def start(self) -> Self:
        """Make the cluster of databases, start it, and wait until it answers."""
        data = str(self.folder / "data")
        self._run("initdb", "--auth=trust", "--username=flame", "--no-sync", data)
        settings = ["-p", str(self.port), "-h", "127.0.0.1", "-k", str(self.folder), "-F"]
        command = [*self._as_user(), self._programs["postgres"], "-D", data, *settings]
        self._process = Process(command, cwd=self.folder, log=self.folder / "console.log")
        wait_until(self._accepts, 30, self._process.output)
        return self

    def _accepts(self) -> bool:
        """Whether it takes connections: its port is open while it still refuses them."""
        asked = [self._programs["pg_isready"], "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run(asked, timeout=60).returncode == 0

    def database(self, name: str) -> str:
        """Make an empty database and return its URL."""
        self._run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "flame", name)
        return f"postgresql+psycopg://flame@127.0.0.1:{self.port}/{name}"

    def close(self) -> None:
        """End it and remove its folder."""
        if self._process is not None:
            self._process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _as_user(self) -> list[str]:
        return ["setpriv", f"--reuid={self._user}", "--regid=postgres", "--clear-groups"] * (
            os.geteuid() == 0
        )

    def _run(self, name: str, *arguments: str) -> None:
        command = [*self._as_user(), self._programs[name], *arguments]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"
