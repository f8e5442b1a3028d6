"""What this machine, or the container around us, lets a worker use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from flame_broker.errors import ResourceError
from flame_broker.resources import Capacity, ResourceRequirement
from flame_worker.gpus import detect_gpus

__all__ = ["detect_capacity", "memory_share", "parse_bytes"]

_CGROUPS: Final = Path("/sys/fs/cgroup")
_OWN_CGROUP: Final = Path("/proc/self/cgroup")
_LEAST_SHARE_BYTES: Final = 2 * 2**30


def detect_capacity(
    gpus: int | None = None, *, cgroups: Path = _CGROUPS, own: Path = _OWN_CGROUP
) -> Capacity:
    """Processors, memory and GPUs within the limits of affinity and control groups.

    Args:
        gpus: How many GPUs there are; None to look.
        cgroups: Where control groups are mounted.
        own: The file that names this process's group.
    """
    folders = list(_cgroup_folders(cgroups, own))
    return Capacity(
        cpu=min([float(_usable_cpus()), *_cpu_quotas(folders)]),
        mem_bytes=min([_physical_bytes(), *_memory_limits(folders)]),
        gpu=len(detect_gpus()) if gpus is None else gpus,
    )


def memory_share(capacity: Capacity, slots: int) -> int:
    """What a child may keep between two calls, in bytes, if its class reserves no memory.

    The worker's memory divided by its slots: if every child kept more, there would not be enough.
    Less would be too little, since programs that keep a model between calls are right to do so, and
    each new child has to load it again. For the same reason a share is 2 GiB at least, which a
    large library with its data may take; whoever keeps more than a share reserves it (``mem=``).
    """
    return max(capacity.mem_bytes // max(slots, 1), _LEAST_SHARE_BYTES)


def parse_bytes(text: str) -> int:
    """``16g`` in bytes, with the units of resource requests.

    Raises:
        ResourceError: No size.
    """
    if "," in text:
        raise ResourceError(f"{text!r}: expected a size such as 16g")
    return ResourceRequirement.from_string(f"mem={text}").mem_bytes


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _physical_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroup_folders(root: Path, own: Path) -> Iterator[Path]:
    """Our group and those around it, each of which may limit us; version 2, then version 1."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        folder = root / controllers / path.lstrip("/")
        while folder != root and folder.is_relative_to(root):
            yield folder
            folder = folder.parent
    # In a container the own group is mounted as the root, whatever its path outside.
    yield from (root, root / "cpu", root / "memory")


def _cpu_quotas(folders: list[Path]) -> Iterator[float]:
    """``cpu.max`` ("quota period") and its two older files, in processors, at least one."""
    for folder in folders:
        words = _words(folder / "cpu.max") or (
            _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")
        )
        if len(words) == 2 and words[0].isdecimal() and int(words[1]):
            yield max(1.0, int(words[0]) / int(words[1]))


def _memory_limits(folders: list[Path]) -> Iterator[int]:
    for folder in folders:
        for name in ("memory.max", "memory.limit_in_bytes"):
            words = _words(folder / name)
            if words and words[0].isdecimal():
                yield int(words[0])


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
