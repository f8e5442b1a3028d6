"""What a call asks of a worker, and what a worker has left.

A request is text such as ``cpu=2,mem=4g,gpu=1``. Queues are few, so a request is rounded up to a
*resource class* (``c2-m4-g1``), one queue each: cpu to powers of two, memory to powers of two of
GiB, a share of a GPU to a quarter or a half, several GPUs to powers of two.

Memory units: ``k m g t p`` are binary, with or without ``i`` or ``ib`` (``4g`` = ``4gi`` =
``4gib`` = 4 × 2³⁰ bytes), as in ``docker run -m``; ``kb mb gb tb pb`` are decimal (``4gb`` =
4 × 10⁹ bytes), as the SI has it. A bare number, or ``b``, is bytes. Case does not matter.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final

from flame_broker.errors import ResourceError

__all__ = ["DEFAULT_CLASS", "Capacity", "ResourceRequirement"]

DEFAULT_CLASS: Final = "c1"
"""The class of a call that asks for nothing: one cpu."""

_GIB: Final = 2**30
_PREFIXES: Final = "kmgtp"
_MAX_CPU: Final = 2**16
_MAX_MEM_BYTES: Final = 2**60
_MAX_GPU: Final = 2**10

_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?", re.ASCII)
_MEMORY = re.compile(rf"({_NUMBER.pattern})\s*(?:([{_PREFIXES}])(i?b?)|b)?", re.ASCII)
_CLASS = re.compile(r"c([0-9]{1,5})(?:-m([0-9]{1,10}))?(?:-g(1of2|1of4|[0-9]{1,4}))?", re.ASCII)
_GPU_SHARES: Final = {"1of4": 0.25, "1of2": 0.5}
_KEYS: Final = ("cpu", "mem", "gpu")


@dataclass(frozen=True, slots=True)
class ResourceRequirement:
    """What one call reserves while it runs.

    Args:
        cpu: Processors; more than 0, fractions allowed.
        mem_bytes: Memory in bytes; 0 reserves none.
        gpu: GPUs: none, a share below 1, or a whole number.

    Raises:
        ResourceError: A value is negative, not a number, or beyond any machine.
    """

    cpu: float = 1
    mem_bytes: int = 0
    gpu: float = 0

    def __post_init__(self) -> None:
        if not 0 < self.cpu <= _MAX_CPU:
            raise ResourceError(f"cpu={self.cpu}: expected more than 0 and at most {_MAX_CPU}")
        if not 0 <= self.mem_bytes <= _MAX_MEM_BYTES:
            raise ResourceError(f"mem={self.mem_bytes}: expected 0 to {_MAX_MEM_BYTES} bytes")
        if not 0 <= self.gpu <= _MAX_GPU or (self.gpu > 1 and self.gpu % 1):
            raise ResourceError(
                f"gpu={self.gpu}: expected a share below 1 or a whole number up to {_MAX_GPU}"
            )

    @classmethod
    def from_string(cls, text: str) -> ResourceRequirement:
        """Read ``cpu=2,mem=4g,gpu=1``: any of the three, each once, in any order.

        Raises:
            ResourceError: A part is unknown, empty, negative, named twice, or no number.
        """
        found: dict[str, str] = {}
        for part in text.lower().split(","):
            name, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals or not value:
                raise ResourceError(f"{part.strip()!r} in {text!r}: expected a part like cpu=2")
            if name not in _KEYS:
                raise ResourceError(f"{name!r} in {text!r}: expected one of {', '.join(_KEYS)}")
            if name in found:
                raise ResourceError(f"{name!r} stands twice in {text!r}")
            found[name] = value
        return cls(
            cpu=_number("cpu", found.get("cpu", "1")),
            mem_bytes=_memory(found.get("mem", "0")),
            gpu=_number("gpu", found.get("gpu", "0")),
        )

    @classmethod
    def from_class_name(cls, name: str) -> ResourceRequirement:
        """The request that a class stands for.

        Raises:
            ResourceError: It is not a name that ``class_name`` makes.
        """
        match = _CLASS.fullmatch(name)
        if match is not None:
            cpu, mem_gib, gpu = match[1], match[2] or "0", match[3] or "0"
            share = _GPU_SHARES[gpu] if gpu in _GPU_SHARES else int(gpu)
            found = cls(int(cpu), int(mem_gib) * _GIB, share)
            if found.class_name == name:
                return found
        raise ResourceError(f"{name!r} is not a resource class: expected one like c2-m4-g1")

    def quantised(self) -> ResourceRequirement:
        """The smallest class that covers this request, as a request."""
        return ResourceRequirement(
            cpu=_power_of_two(self.cpu),
            mem_bytes=_power_of_two(-(-self.mem_bytes // _GIB)) * _GIB if self.mem_bytes else 0,
            gpu=_gpu_step(self.gpu),
        )

    @property
    def class_name(self) -> str:
        """The class of this request as queue names carry it: ``c1``, ``c2-m4``, ``c1-g1of4``."""
        request = self.quantised()
        name = f"c{int(request.cpu)}"
        if request.mem_bytes:
            name += f"-m{request.mem_bytes // _GIB}"
        if request.gpu:
            # A dot would be a separator in a queue's name.
            name += f"-g{int(request.gpu)}" if request.gpu >= 1 else f"-g1of{int(1 / request.gpu)}"
        return name

    def fits(self, capacity: Capacity) -> bool:
        """Whether so much is free."""
        return (
            self.cpu <= capacity.cpu
            and self.mem_bytes <= capacity.mem_bytes
            and self.gpu <= capacity.gpu
        )

    def __str__(self) -> str:
        parts = [f"cpu={_plain(self.cpu)}"]
        if self.mem_bytes:
            parts.append(f"mem={_plain_memory(self.mem_bytes)}")
        if self.gpu:
            parts.append(f"gpu={_plain(self.gpu)}")
        return ",".join(parts)


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a worker has, or has left. Classes are multiples of a quarter, so sums stay exact.

    Shares of different GPUs add up here without making a whole one; who hands out the cards
    looks at each of them.

    Args:
        cpu: Processors.
        mem_bytes: Memory in bytes.
        gpu: GPUs.
    """

    cpu: float
    mem_bytes: int
    gpu: float = 0

    def __sub__(self, request: ResourceRequirement) -> Capacity:
        """What is left when the request is granted; ask ``fits`` first."""
        return Capacity(
            self.cpu - request.cpu, self.mem_bytes - request.mem_bytes, self.gpu - request.gpu
        )

    def __add__(self, request: ResourceRequirement) -> Capacity:
        """What is free when the request is given back."""
        return Capacity(
            self.cpu + request.cpu, self.mem_bytes + request.mem_bytes, self.gpu + request.gpu
        )

    def __str__(self) -> str:
        return f"cpu={_plain(self.cpu)},mem={_plain_memory(self.mem_bytes)},gpu={_plain(self.gpu)}"


def _number(name: str, text: str) -> float:
    if _NUMBER.fullmatch(text) is None:
        raise ResourceError(f"{name}={text}: expected a number of 0 or more, such as {name}=2")
    value = float(text)
    return int(value) if value.is_integer() else value


def _memory(text: str) -> int:
    match = _MEMORY.fullmatch(text)
    if match is None:
        raise ResourceError(
            f"mem={text}: expected a size of 0 or more such as mem=4g or mem=512m "
            f"(units: b, or one of {' '.join(_PREFIXES)} alone or with b, i or ib)"
        )
    number, prefix, suffix = match.groups()
    base = 1000 if suffix == "b" else 1024
    size = float(number) * base ** (_PREFIXES.index(prefix) + 1 if prefix else 0)
    if size > _MAX_MEM_BYTES:
        raise ResourceError(f"mem={text}: expected at most {_plain_memory(_MAX_MEM_BYTES)}")
    # A whole number of bytes is read as such: a float above 2**53 would lose the last digits.
    return int(number) if prefix is None and number.isdigit() else math.ceil(size)


def _power_of_two(amount: float) -> int:
    """The next power of two, at least 1."""
    return 1 << max(math.ceil(amount) - 1, 0).bit_length()


def _gpu_step(gpu: float) -> float:
    """None, the smallest share that covers it, or a power of two."""
    if gpu == 0:
        return 0
    return next((share for share in _GPU_SHARES.values() if gpu <= share), _power_of_two(gpu))


def _plain(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(value)


def _plain_memory(size: int) -> str:
    """In the largest unit that needs no fraction."""
    unit = ""
    for prefix in _PREFIXES:
        if size == 0 or size % 1024:
            break
        size, unit = size // 1024, prefix
    return f"{size}{unit}"
