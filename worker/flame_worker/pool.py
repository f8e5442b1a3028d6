"""The slots of one worker: which there are, which are free, and what could be started besides.

A slot belongs to a resource class: its child was started with that memory limit and those GPUs.
The default class has its slots from the start; a slot of another class is started when the first
call of that class arrives, in the room that idle slots give up.

A call that waits for calls of its own gives its cpu back for as long (PROTOCOL.md, rule 13), but
not its memory or GPU: a slot more may then be busy, and is started when there is none.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from itertools import count
from math import inf
from typing import Final, Protocol

from flame_broker.errors import FlameError, ResourceError
from flame_broker.logs import get_logger
from flame_broker.resources import DEFAULT_CLASS, Capacity, ResourceRequirement
from flame_worker.gpus import GpuPool, GpuShare
from flame_worker.slots import Slot

__all__ = ["SlotPool", "StartSlot"]

_log = get_logger("flame.worker")

_RESOURCES: Final = ("cpu", "mem_bytes", "gpu")
_ANY: Final = sys.maxsize
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
    def cards(self) -> tuple[str, ...]:
        return self.gpus.ids if self.gpus is not None else ()

    @property
    def works(self) -> bool:
        return self.slot is not None and bool(self.slot.batches) and not self.waits


class SlotPool:
    """Slots within a capacity.

    Args:
        capacity: What this worker may reserve in all.
        gpus: The cards it hands out.
        make: Makes a slot.

    Attributes:
        kept_for: The class whose calls have waited so long that others leave them room.
        granted: How often each class was given a slot.
    """

    def __init__(self, capacity: Capacity, gpus: GpuPool, make: StartSlot) -> None:
        self.capacity = capacity
        self.kept_for: str | None = None
        self.granted: Counter[str] = Counter()
        self._gpus = gpus
        self._make = make
        self._seats: dict[str, list[_Seat]] = {}
        self._numbers = count()
        self._cpu = capacity.cpu
        self._extra = 0
        self._most_default = inf  # until it starts
        self._starting: set[asyncio.Task[None]] = set()
        self._leaving: set[asyncio.Task[None]] = set()

    async def start(self, slots: int) -> None:
        """Start the slots of the default class, side by side."""
        self._cpu = max(self.capacity.cpu, slots)
        self._most_default = slots
        request = ResourceRequirement.from_class_name(DEFAULT_CLASS)
        seats = [_Seat(None, request, None) for _ in range(slots)]
        self._of(DEFAULT_CLASS).extend(seats)
        await asyncio.gather(*(self._open(seat) for seat in seats))

    def idle(self, class_name: str) -> list[Slot]:
        """Slots of a class that have nothing to do and may be used now."""
        seats = self._seats.get(class_name, ())
        found = [seat.slot for seat in seats if seat.idle and seat.slot is not None]
        if self.kept_for is not None:
            found = found[: self.left_by_the_aged(class_name)]
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
        request = ResourceRequirement.from_class_name(class_name)
        free, cards = self._free_without(self._idle_elsewhere(class_name))
        more, spare = 0, self._spare(class_name)
        while more < spare and _take(request, free, cards):
            free -= request
            more += 1
        return min(len(self.idle(class_name)) + more, self.left_by_the_aged(class_name))

    def knows(self, class_name: str) -> bool:
        """Whether this is the name of a class at all."""
        try:
            ResourceRequirement.from_class_name(class_name)
        except ResourceError:
            return False
        return True

    def could_ever(self, class_name: str) -> bool:
        """Whether the class fits this worker at all."""
        request = ResourceRequirement.from_class_name(class_name)
        return request.fits(self.capacity) and request.gpu <= len(self._gpus)

    def left_by_the_aged(self, class_name: str) -> int:
        """How many calls of a class may start beside those that room is kept for.

        What those wait for goes to nobody else. Of the rest, who holds what they wait for will
        bring some along: a GPU comes free with the cpu of the call that had it.
        """
        if self.kept_for in (None, class_name):
            return _ANY
        kept, request = map(ResourceRequirement.from_class_name, (self.kept_for, class_name))
        free = self._free()
        for seat in self._all():
            if seat.idle:
                free += seat.request
        short = [name for name in _RESOURCES if getattr(free, name) < getattr(kept, name)]
        for seat in self._all():
            if seat.works and any(getattr(seat.request, name) for name in short):
                free += seat.request
        used = [name for name in _RESOURCES if getattr(request, name)]
        if not set(used).isdisjoint(short):
            return 0
        left = ((getattr(free, n) - getattr(kept, n)) // getattr(request, n) for n in used)
        return max(0, int(min(left)))

    def grant(self, class_name: str) -> None:
        """A call of a class starts: if room was kept for it, that is over."""
        self.granted[class_name] += 1
        if self.kept_for == class_name:
            self.kept_for = None

    def grow(self, class_name: str) -> None:
        """Start one more slot of a class, retiring idle slots of others if that makes the room."""
        request = ResourceRequirement.from_class_name(class_name)
        if not self.left_by_the_aged(class_name) or self._spare(class_name) <= 0:
            return
        if any(seat.starting for seat in self._of(class_name)):
            return
        retired = self._in_the_way(request)
        if retired is not None:
            for seat in retired:
                self._retire(seat)
            self._add(request)

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
        self._add(seat.request)

    async def close(self, grace_s: float) -> None:
        """End all slots."""
        for task in self._starting:
            task.cancel()
        ends = [slot.close(grace_s=grace_s) for slot in self.slots()]
        await asyncio.gather(*ends, *self._leaving)
        self._seats.clear()

    def _spare(self, class_name: str) -> float:
        """How many slots more of a class there may be: of the default one, what was asked for."""
        if class_name != DEFAULT_CLASS:
            return inf
        return self._most_default + self._extra - len(self._of(class_name))

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

    def _free_without(self, retired: list[_Seat]) -> tuple[Capacity, GpuPool]:
        """What would be free without these; the cards are a copy to try things with."""
        free = self._free()
        for seat in retired:
            free += seat.request
        return free, self._gpus.after(seat.gpus for seat in retired if seat.gpus is not None)

    def _in_the_way(self, request: ResourceRequirement) -> list[_Seat] | None:
        """Idle slots that have to go for one more like this; None if even that makes no room.

        The sums are not enough: two halves of different cards are no card.
        """
        chosen: list[_Seat] = []
        for seat in _by_card(self._idle_elsewhere(request.class_name), request):
            if _take(request, *self._free_without(chosen)):
                break
            chosen.append(seat)
        if not _take(request, *self._free_without(chosen)):
            return None
        for seat in [*chosen]:
            others = [other for other in chosen if other is not seat]
            if _take(request, *self._free_without(others)):
                chosen = others
        return chosen

    def _add(self, request: ResourceRequirement) -> None:
        """Reserve for one more slot, and start it when all that leave have left."""
        seat = _Seat(None, request, self._gpus.take(request.gpu) if request.gpu else None)
        self._of(request.class_name).append(seat)
        # Who leaves may still hold the card or the memory that this one was promised.
        _keep(self._starting, self._open_after([*self._leaving], seat))

    async def _open_after(self, leaving: list[asyncio.Task[None]], seat: _Seat) -> None:
        try:
            if leaving:
                await asyncio.wait(leaving)
            await self._open(seat)
        except FlameError as problem:
            _log.error("slot.start_failed", request=str(seat.request), reason=str(problem))
            self._retire(seat)

    def _retire(self, seat: _Seat) -> None:
        """Give back what a slot reserved, and end it."""
        self._of(seat.request.class_name).remove(seat)
        if seat.gpus is not None:
            self._gpus.give_back(seat.gpus)
        if seat.slot is not None:
            _keep(self._leaving, seat.slot.close(grace_s=1.0))

    async def _open(self, seat: _Seat) -> None:
        seat.slot = self._make(next(self._numbers), seat.request, seat.gpus)
        await seat.slot.start()


def _take(request: ResourceRequirement, free: Capacity, cards: GpuPool) -> bool:
    """Whether there is room for one more like this; takes its cards."""
    return request.fits(free) and (not request.gpu or cards.take(request.gpu) is not None)


def _by_card(idle: list[_Seat], request: ResourceRequirement) -> list[_Seat]:
    """Idle slots in the order to retire them: card by card, the least shared one first."""
    crowd = Counter(card for seat in idle for card in seat.cards)

    def rank(seat: _Seat) -> tuple[bool, int, tuple[str, ...]]:
        others = max((crowd[card] for card in seat.cards), default=0)
        return bool(seat.cards) != bool(request.gpu), others, seat.cards

    return sorted(idle, key=rank)


def _keep(tasks: set[asyncio.Task[None]], work: Coroutine[None, None, None]) -> None:
    """Run this beside; asyncio itself would forget a task that nobody holds."""
    task = asyncio.ensure_future(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
