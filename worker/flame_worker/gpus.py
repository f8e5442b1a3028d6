"""NVIDIA GPUs of this machine, and who has which."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from flame_broker.errors import ResourceError

__all__ = ["GpuPool", "GpuShare", "detect_gpus"]

_VISIBLE: Final = "CUDA_VISIBLE_DEVICES"
_TINY: Final = 1e-9


@dataclass(frozen=True, slots=True)
class GpuShare:
    """GPUs lent to one slot.

    Args:
        ids: As ``CUDA_VISIBLE_DEVICES`` takes them.
        amount: Of each of them: 1, or less for a shared one.
    """

    ids: tuple[str, ...]
    amount: float = 1.0


class GpuPool:
    """Hands out GPUs, whole ones exclusively, one in shares to several slots.

    Args:
        ids: What there is; a number stands for the indices below it.
    """

    def __init__(self, ids: int | Iterable[str]) -> None:
        names = map(str, range(ids)) if isinstance(ids, int) else ids
        self._free = dict.fromkeys(names, 1.0)

    @classmethod
    def detect(cls) -> GpuPool:
        """What this machine has."""
        return cls(detect_gpus())

    def __len__(self) -> int:
        """How many GPUs there are, lent or not."""
        return len(self._free)

    def take(self, amount: float) -> GpuShare | None:
        """Lend GPUs; None while there are not enough.

        Args:
            amount: A whole number of GPUs, or a share of one below 1.

        Raises:
            ResourceError: Neither of these.
        """
        if amount <= 0 or (amount > 1 and amount != int(amount)):
            raise ResourceError(f"gpu={amount:g}: expected a whole number, or a share below 1")
        share = min(1.0, amount)
        # The fullest cards that still have room, so that whole ones stay whole.
        fitting = [name for name, free in self._free.items() if free >= share - _TINY]
        chosen = sorted(fitting, key=self._free.__getitem__)[: max(1, int(amount))]
        if len(chosen) < amount:
            return None
        for name in chosen:
            self._free[name] -= share
        return GpuShare(tuple(chosen), share)

    def after(self, returned: Iterable[GpuShare]) -> GpuPool:
        """What would be free if these were given back: a copy to ask; nothing happens here."""
        copy = GpuPool(())
        copy._free = dict(self._free)
        for share in returned:
            copy.give_back(share)
        return copy

    def give_back(self, share: GpuShare) -> None:
        """Take GPUs back from a slot that has ended."""
        for name in share.ids:
            self._free[name] = min(1.0, self._free[name] + share.amount)


def detect_gpus(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The UUIDs of NVIDIA GPUs that this process may use.

    Needs nvidia-ml-py and a driver; without either there are none. ``CUDA_VISIBLE_DEVICES`` of
    the worker itself restricts them: indices count in PCI bus order, as NVML does.
    """
    found = _nvml_uuids()
    if _VISIBLE not in environ:
        return found
    chosen = []
    for entry in map(str.strip, environ[_VISIBLE].split(",")):
        match = _named(entry, found)
        if match is None:  # CUDA too ignores what follows an invalid entry
            break
        chosen.append(match)
    return tuple(chosen)


def _named(entry: str, found: tuple[str, ...]) -> str | None:
    if entry.isdecimal():
        return found[int(entry)] if int(entry) < len(found) else None
    matches = [uuid for uuid in found if entry and uuid.startswith(entry)]
    return matches[0] if len(matches) == 1 else None


def _nvml_uuids() -> tuple[str, ...]:
    try:
        import pynvml
    except ImportError:
        return ()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        return tuple(str(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles)
    finally:
        pynvml.nvmlShutdown()
