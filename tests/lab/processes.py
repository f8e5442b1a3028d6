"""Child processes with captured output, in groups of their own, that die with their starter."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["Process"]

# Blocks until its standard input closes, which the kernel does for us even after `kill -9` of the
# test run, then takes the group down. Ended by SIGKILL when the process was stopped in order.
_GUARD = 'read _; kill -s KILL -- "-$1"'


class Process:
    """One started program.

    Args:
        argv: The program and its arguments.
        env: The whole environment; this process's own when None.
        cwd: Working directory.
        log: File that takes standard output and error together; a temporary one when None.

    Example:
        >>> with Process(["sleep", "60"]) as sleeper:
        ...     sleeper.kill()
        -9
    """

    def __init__(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        log: Path | None = None,
    ) -> None:
        self._own_log = log is None
        if log is None:
            handle, name = tempfile.mkstemp(prefix="flame-lab-", suffix=".log")
            os.close(handle)
            log = Path(name)
        self.log = log
        with log.open("ab") as output:
            self._popen = subprocess.Popen(
                [os.fspath(part) for part in argv],
                env=None if env is None else dict(env),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._guard = _start_guard(self._popen.pid)

    @property
    def pid(self) -> int:
        """Process id, which is its group's id too."""
        return self._popen.pid

    @property
    def returncode(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        return self._popen.poll()

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self.returncode is None

    def output(self) -> str:
        """What it has written so far, standard output and error together."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def signal(self, number: int) -> None:
        """Send a signal to the process alone, not to its group."""
        self._popen.send_signal(number)

    def pause(self) -> None:
        """Freeze the whole group (SIGSTOP)."""
        self._signal_group(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a frozen group go on (SIGCONT)."""
        self._signal_group(signal.SIGCONT)

    def wait(self, timeout_s: float = 30.0) -> int:
        """Wait for the end and return the exit status.

        Raises:
            AssertionError: It still runs after ``timeout_s``; the message carries its output.
        """
        try:
            return self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            tail = self.output()[-4000:]
            raise AssertionError(f"still running after {timeout_s:g} s:\n{tail}") from None

    def terminate(self, timeout_s: float = 30.0) -> int:
        """Ask it to end (SIGTERM), wait, and return the exit status; kill it when it will not."""
        self._popen.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(timeout_s)
        return self.kill()

    def kill(self) -> int:
        """End the whole group at once (SIGKILL) and return the exit status."""
        self._signal_group(signal.SIGKILL)
        status = self._popen.wait()
        self._dismiss_guard()
        return status

    def close(self) -> None:
        """Kill what still runs and remove the temporary log."""
        self.kill()
        if self._own_log:
            self.log.unlink(missing_ok=True)

    def _signal_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, number)

    def _dismiss_guard(self) -> None:
        self._guard.kill()
        self._guard.wait()
        if self._guard.stdin is not None:
            self._guard.stdin.close()

    def __enter__(self) -> Self:
        """Return the process itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()


def _start_guard(group: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["/bin/sh", "-c", _GUARD, "guard", str(group)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
