"""The slots of one worker: which there are, which are free, and what could be started besides.

A slot belongs to a resource class: its child was started with that memory limit and those GPUs.
The default class has its slots from the start; a slot of another class is started when the first
call of that class arrives, in the room that idle slots give up.

A call that waits for calls of its own gives its cpu back for as long (PROTOCOL.md, rule 13), but
not its memory or GPU: a slot more may then be busy, and is started when there is none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from itertools import count
from typing import Final, Protocol

from flame_broker.errors import FlameError, ResourceError
from flame_broker.logs import get_logger
from flame_broker.resources import DEFAULT_CLASS, Capacity, ResourceRequirement
from flame_worker.gpus import GpuPool, GpuShare
from flame_worker.slots import Slot

__all__ = ["SlotPool", "StartSlot"]

_log = get_logger("flame.worker")

_MAX_EXTRA: Final = 64
"""Slots started because calls wait: a limit for programs that call themselves without end."""


class StartSlot(Protocol):
    """Makes a slot that is not started yet."""

    def __call__(self, number: int, request: ResourceRequirement, gpus: GpuShare | None, /) -> Slot:
        """Make it."""


class _Seat:
    """What one slot reserves, from before its child starts."""

    def __init__(
        self, slot: Slot | None, request: ResourceRequirement, gpus: GpuShare | None
    ) -> None:
        self.slot = slot
        self.request = request
        self.gpus = gpus
        self.waits: list[int] = []  # process groups of clients in it that wait for their own calls

    @property
    def starting(self) -> bool:
        return self.slot is None or not (self.slot.ready or self.slot.batches)

    @property
    def idle(self) -> bool:
        return self.slot is not None and self.slot.ready and not self.slot.batches

    @property
    def works(self) -> bool:
        return self.slot is not None and bool(self.slot.batches) and not self.waits


class SlotPool:
    """Slots within a capacity.

    Args:
        capacity: What this worker may reserve in all.
        gpus: The cards it hands out.
        make: Makes a slot.
    """

    def __init__(self, capacity: Capacity, gpus: GpuPool, make: StartSlot) -> None:
        self.capacity = capacity
        self.reserved_class: str | None = None
        self._gpus = gpus
        self._make = make
        self._seats: dict[str, list[_Seat]] = {}
        self._numbers = count()
        self._cpu = capacity.cpu
        self._extra = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, slots: int) -> None:
        """Start the slots of the default class, side by side."""
        self._cpu = max(self.capacity.cpu, slots)
        request = ResourceRequirement.from_class_name(DEFAULT_CLASS)
        seats = [_Seat(None, request, None) for _ in range(slots)]
        self._of(DEFAULT_CLASS).extend(seats)
        await asyncio.gather(*(self._open(seat) for seat in seats))

    def idle(self, class_name: str) -> list[Slot]:
        """Slots of a class that have nothing to do; none while room is kept for another class."""
        if self.reserved_class not in (None, class_name):
            return []
        seats = self._seats.get(class_name, ())
        found = [seat.slot for seat in seats if seat.idle and seat.slot is not None]
        return found[: self._more(class_name)] if self._extra else found

    def slots(self, class_name: str | None = None) -> Iterator[Slot]:
        """All slots, or those of a class."""
        names = list(self._seats) if class_name is None else [class_name]
        for name in names:
            for seat in self._seats.get(name, ()):
                if seat.slot is not None:
                    yield seat.slot

    def width(self, class_name: str) -> int:
        """How many calls of a class can run at a time with the slots that there are."""
        seats = [seat for seat in self._seats.get(class_name, ()) if seat.slot is not None]
        if not self._extra:
            return len(seats)
        cpus = self._cpu // ResourceRequirement.from_class_name(class_name).cpu
        return min(len(seats), int(cpus) + sum(bool(seat.waits) for seat in seats))

    def room(self, class_name: str) -> int:
        """How many calls of a class could start now, counting slots yet to be started."""
        if self.reserved_class not in (None, class_name):
            return 0
        idle = len(self.idle(class_name))
        request = ResourceRequirement.from_class_name(class_name)
        free = self._free_without_idle(class_name)
        more = 0
        while request.fits(free):
            free -= request
            more += 1
        return idle + more

    def knows(self, class_name: str) -> bool:
        """Whether this is the name of a class at all."""
        try:
            ResourceRequirement.from_class_name(class_name)
        except ResourceError:
            return False
        return True

    def could_ever(self, class_name: str) -> bool:
        """Whether the class fits this worker at all."""
        return ResourceRequirement.from_class_name(class_name).fits(self.capacity)

    def grant(self, class_name: str) -> None:
        """A call of a class starts: if room was kept for it, that is over."""
        if self.reserved_class == class_name:
            self.reserved_class = None

    def grow(self, class_name: str) -> None:
        """Start one more slot of a class, retiring idle slots of others if that makes the room."""
        request = ResourceRequirement.from_class_name(class_name)
        if self.reserved_class not in (None, class_name):
            return
        if any(seat.starting for seat in self._of(class_name)):
            return
        free, retired = self._free(), []
        for seat in self._idle_elsewhere(class_name):
            if request.fits(free):
                break
            retired.append(seat)
            free += seat.request
        if request.fits(free):
            for seat in retired:
                self._of(seat.request.class_name).remove(seat)
            self._spawn(self._replace(retired, request))

    def set_waiting(self, process_group: int, waits: bool) -> None:
        """Note that the call of a child waits for calls of its own, or goes on."""
        if not waits:
            # Its child may be gone by now, and its number that of no slot.
            for waiter in self._all():
                if process_group in waiter.waits:
                    waiter.waits.remove(process_group)
            return
        seat = next((s for s in self._all() if s.slot and s.slot.pid == process_group), None)
        if seat is not None:
            seat.waits.append(process_group)
            self._stand_in_for(seat)

    def _stand_in_for(self, seat: _Seat) -> None:
        """Start a slot for the cpu that a waiting call gives back, unless there is a free one."""
        class_name = seat.request.class_name
        if self._extra >= _MAX_EXTRA or any(s.idle or s.starting for s in self._of(class_name)):
            return
        if seat.request.mem_bytes or seat.request.gpu:
            self.grow(class_name)  # it keeps those, so that they must be had once more
            return
        self._extra += 1
        _log.info("slot.extra", resource_class=class_name, extra=self._extra)
        self._spawn(self._replace([], seat.request))

    async def close(self, grace_s: float) -> None:
        """End all slots."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(slot.close(grace_s=grace_s) for slot in self.slots()))
        self._seats.clear()

    def _of(self, class_name: str) -> list[_Seat]:
        return self._seats.setdefault(class_name, [])

    def _all(self) -> Iterator[_Seat]:
        for seats in self._seats.values():
            yield from seats

    def _idle_elsewhere(self, class_name: str) -> list[_Seat]:
        return [s for s in self._all() if s.idle and s.request.class_name != class_name]

    def _free(self) -> Capacity:
        free = self.capacity
        for seat in self._all():
            free -= seat.request
            if seat.waits:
                free = replace(free, cpu=free.cpu + seat.request.cpu)
        return free

    def _more(self, class_name: str) -> int:
        """How many more calls of a class the cpus allow, where slots outnumber them."""
        busy = sum(seat.request.cpu for seat in self._all() if seat.works)
        request = ResourceRequirement.from_class_name(class_name)
        return max(0, int((self._cpu - busy) // request.cpu))

    def _free_without_idle(self, class_name: str) -> Capacity:
        free = self._free()
        for seat in self._idle_elsewhere(class_name):
            free += seat.request
        return free

    async def _replace(self, retired: list[_Seat], request: ResourceRequirement) -> None:
        successor = _Seat(None, request, None)
        self._of(request.class_name).append(successor)
        try:
            await asyncio.gather(*(self._retire(seat) for seat in retired))
            await self._open(successor)
        except FlameError as problem:
            _log.error("slot.start_failed", request=str(request), reason=str(problem))
            self._of(request.class_name).remove(successor)
            await self._retire(successor)

    async def _retire(self, seat: _Seat) -> None:
        if seat.slot is not None:
            await seat.slot.close(grace_s=1.0)
        if seat.gpus is not None:
            self._gpus.give_back(seat.gpus)

    async def _open(self, seat: _Seat) -> None:
        request = seat.request
        if request.gpu:
            seat.gpus = self._gpus.take(request.gpu)
            if seat.gpus is None:
                raise ResourceError(f"no GPU has {request.gpu:g} left in one piece")
        seat.slot = self._make(next(self._numbers), request, seat.gpus)
        await seat.slot.start()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
