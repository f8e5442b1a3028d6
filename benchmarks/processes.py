"""Accounting of processes: memory, CPU time, and the removal of what a driver left behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Become the parent of descendants that detach themselves, so that none gets out of sight.

    https://man7.org/linux/man-pages/man2/PR_SET_CHILD_SUBREAPER.2const.html
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def descendants(root: int | None = None) -> list[int]:
    """Ids of all live processes below `root` (default: this process), itself not among them."""
    try:
        found = psutil.Process(root).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [process.pid for process in found if not is_zombie(process)]


def is_zombie(process: psutil.Process) -> bool:
    """Whether the process is over, although nobody has waited for it yet."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def title(pid: int) -> str:
    """Command line of a process, or what it has renamed itself to; empty once it is over."""
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def memory_bytes(pid: int) -> dict[str, int]:
    """Resident, proportional and private anonymous memory of one process, in bytes.

    `anonymous_bytes` leaves out mapped files, whose pages several processes share
    (https://docs.kernel.org/filesystems/proc.html, smaps_rollup).
    """
    fields: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        fields[name] = int(rest.split()[0]) * 1024
    return {
        "rss_bytes": fields["Rss"],
        "pss_bytes": fields["Pss"],
        "anonymous_bytes": fields["Anonymous"],
    }


def resident_bytes(pid: int) -> int:
    """Resident memory of one process: cheap enough to sample often."""
    return int(psutil.Process(pid).memory_info().rss)


def cpu_s(pids: Iterable[int]) -> float:
    """CPU seconds (user and system) that the given processes have used; the dead count nothing."""
    total = 0.0
    for pid in pids:
        try:
            times = psutil.Process(pid).cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def kill_left_behind(known: Iterable[int], *, patience_s: float = 5.0) -> int:
    """Kill our descendants that are not `known`, by process id; return how many there were."""
    kept = set(known)
    count = 0
    deadline = time.monotonic() + patience_s
    while (left := set(descendants()) - kept) and time.monotonic() < deadline:
        count = max(count, len(left))
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    return count
