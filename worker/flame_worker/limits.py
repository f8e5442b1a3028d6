"""Limits that the kernel keeps for us, and how much memory processes use."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

__all__ = [
    "available_bytes",
    "die_first",
    "die_with_parent",
    "limit_memory",
    "private_bytes",
    "process_tree",
    "tree_bytes",
]

_LINUX: Final = sys.platform == "linux"
_PR_SET_PDEATHSIG: Final = 1
_HEADROOM_BYTES: Final = 512 * 1024 * 1024
_HEADROOM: Final = 1.25
_MAX_SCORE: Final = "1000"
_PRIVATE: Final = ("RssAnon:", "RssShmem:")


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies (Linux), now if it already did.

    Source: ``prctl(2)``, PR_SET_PDEATHSIG. Elsewhere the end of the commands pipe must do.
    """
    if _LINUX:
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def die_first() -> None:
    """Be what the kernel kills first when memory runs out, with all that this process starts.

    Among children, which all have the highest score, it takes the largest; the daemon, without
    which nobody would report the loss, comes after them. Raising the score needs no privilege
    (``proc(5)``, oom_score_adj); some sandboxes refuse it all the same, and only Linux has it.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_MAX_SCORE)


def limit_memory(limit_bytes: int) -> None:
    """Refuse allocations far over a limit, as ``MemoryError`` in the call.

    RLIMIT_DATA counts private writable memory, also where it is only reserved (thread stacks,
    allocator arenas), hence the headroom; RLIMIT_AS would also count mapped files and the address
    space that CUDA reserves. The daemon watches the memory really in use.
    """
    ceiling = int(limit_bytes * _HEADROOM) + _HEADROOM_BYTES
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        ceiling = min(ceiling, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (ceiling, ceiling))


def process_tree(pid: int) -> list[int]:
    """A process and its descendants, as far as the system tells."""
    found, waiting = [], [pid]
    while waiting:
        parent = waiting.pop()
        found.append(parent)
        waiting += _children(parent)
    return found


def tree_bytes(pid: int) -> int:
    """Memory of a process and its descendants in bytes, shared file pages not counted."""
    return sum(map(private_bytes, process_tree(pid)))


def private_bytes(pid: int) -> int:
    """Memory of one process in bytes; 0 if it is gone.

    Mapped files are left out (``proc(5)``: RssAnon and RssShmem): children that share a large
    array in the cache do not each pay for it.
    """
    if not _LINUX:
        return _resident_bytes(pid)
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(_PRIVATE))


def available_bytes() -> int:
    """Memory that a new process could use without swapping, in bytes."""
    if _LINUX:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * sum(int(x.split()[1]) for x in lines if x.startswith("MemAvailable:"))
    import psutil

    return int(psutil.virtual_memory().available)


def _children(pid: int) -> Iterable[int]:
    if not _LINUX:
        return ()
    try:
        tasks = [*Path(f"/proc/{pid}/task").iterdir()]
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return ()


def _resident_bytes(pid: int) -> int:
    import psutil

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0
