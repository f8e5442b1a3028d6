"""Kills the process groups of children when the worker itself is killed.

A killed worker cannot clean up. The kernel ends its children (``die_with_parent``), but not the
programs that calls have started, and on macOS not even the children. So a shell waits at the end
of a pipe that the worker holds; when the pipe closes, it kills every group it was told of.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from typing import Final

__all__ = ["Guard", "guard"]

_SCRIPT: Final = """
trap '' HUP INT TERM
groups=
while read -r sign group; do
    kept=
    for other in $groups; do [ "$other" = "$group" ] || kept="$kept $other"; done
    groups=$kept
    [ "$sign" = + ] && groups="$groups $group"
done
for group in $groups; do kill -s KILL -- "-$group"; done
"""


class Guard:
    """The shell and the groups that it knows; started with the first, ended with the last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._groups: set[int] = set()
        self._shell: subprocess.Popen[bytes] | None = None
        os.register_at_fork(after_in_child=self._after_fork)

    def watch(self, group: int) -> None:
        """Kill this process group if the worker dies before ``forget``."""
        with self._lock:
            self._groups.add(group)
            self._tell(f"+ {group}\n")

    def forget(self, group: int) -> None:
        """The group is gone; its number may soon be somebody else's."""
        with self._lock:
            self._groups.discard(group)
            if self._groups:
                self._tell(f"- {group}\n")
            else:
                self._stop(f"- {group}\n")

    def _tell(self, line: str) -> None:
        if self._shell is None:
            self._start()
            return
        try:
            _write(self._shell, line)
        except BrokenPipeError:  # somebody killed the shell
            self._shell.wait()
            self._start()

    def _start(self) -> None:
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", _SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            bufsize=0,
        )
        _write(self._shell, "".join(f"+ {group}\n" for group in self._groups))

    def _stop(self, line: str) -> None:
        shell, self._shell = self._shell, None
        if shell is None:
            return
        with contextlib.suppress(BrokenPipeError):
            _write(shell, line)
        shell.communicate()

    def _after_fork(self) -> None:
        """A copy of the worker's process has no children, and no say about its parent's."""
        if self._shell is not None and self._shell.stdin is not None:
            self._shell.stdin.close()
        self._lock = threading.Lock()
        self._groups = set()
        self._shell = None


def _write(shell: subprocess.Popen[bytes], text: str) -> None:
    assert shell.stdin is not None
    shell.stdin.write(text.encode())


guard: Final = Guard()
"""One for the process, however many workers are embedded in it."""
