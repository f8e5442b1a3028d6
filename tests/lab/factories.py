"""Workers for the model of the custody protocol: real parts, played children, wires to cut."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

from flame_broker.errors import WorkerLost
from flame_broker.memory_broker import MemoryDelivery
from flame_broker.messages import Call
from flame_broker.resources import Capacity, ResourceRequirement
from flame_broker.store.cache import NodeCache
from flame_worker.batches import Batch, Lost, SlotOwner
from flame_worker.dispatch import Dispatcher
from flame_worker.gpus import GpuPool, GpuShare
from flame_worker.intake import Intake
from flame_worker.leases import Leases
from flame_worker.outbox import Outbox
from flame_worker.pool import SlotPool
from flame_worker.slots import Slot
from flame_worker.spool import Spool
from lab.bench import KEYRING, POOL, PlayedSlot
from lab.clockwork import Clock, Clockwork
from lab.wire import Wire

__all__ = ["Factory", "WatchedSlot"]

_CHILD_START_S = 0.1
_LOOK_EVERY_S = 1.0


class WatchedSlot(PlayedSlot):
    """A played slot that tells of every start, and whose child has a successor."""

    def __init__(
        self,
        number: int,
        request: ResourceRequirement,
        owner: SlotOwner,
        on_start: Callable[[int], None],
    ) -> None:
        super().__init__(number, request, owner)
        self._on_start = on_start
        self._begun: tuple[Batch, Call] | None = None

    @property
    def running(self) -> int | None:
        """The counter of the call that runs."""
        return self._left[0][1].counter if self._left else None

    def end(self, seconds: float) -> None:
        """The running call ends after so long, with its counter as its value."""
        if self.running is not None and not self.closed:
            self.finish(value=self.running, seconds=seconds)

    def die(self) -> None:
        """The child is killed; the next one comes up a little later."""
        if self.running is None or self.closed:
            return
        given = [(batch, call.counter) for batch, call in self._left]
        self.lose(Lost(WorkerLost, "killed", given[0] if given else None, [], given[1:]))
        asyncio.get_running_loop().call_later(_CHILD_START_S, self._come_up)

    def _come_up(self) -> None:
        if not self.closed:
            self.ready = True
            self.owner.on_ready(cast("Slot", self))

    def _begin(self) -> None:
        if self._left and self._left[0] is not self._begun:
            self._begun = self._left[0]
            self.started.append(self._begun[1].counter)
            self._on_start(self._begun[1].counter)


class Factory:
    """One worker in a loop of its own, put together and drained as the daemon does it.

    Args:
        name: The worker's.
        clock: The time of all workers.
        namespace: The broker.
        folder: For its cache.
        slots: How many.
        on_start: Told of every start: who, and the call's counter.
        lost: Told of deliveries in hand when their connection ends.
        resent: Told of messages that are published again.

    Attributes:
        loop: Turn it to let the worker work.
        wire: Its connections.
        slots: What its children would be.
        problems: Exceptions that nobody caught.
        gone: Whether it has died or left.
    """

    def __init__(
        self,
        name: str,
        clock: Clock,
        namespace: str,
        folder: Path,
        *,
        slots: int,
        on_start: Callable[[str, int], None],
        lost: Callable[[list[MemoryDelivery]], None],
        resent: Callable[[list[bytes]], None],
    ) -> None:
        self.name, self.gone, self.draining = name, False, False
        self.slots: list[WatchedSlot] = []
        self.problems: list[str] = []
        self.loop = Clockwork(clock)
        self.loop.set_exception_handler(lambda _, context: self.problems.append(str(context)))
        self.wire = Wire(namespace, self.loop, lost=lost, resent=resent)
        self._on_start = partial(on_start, name)
        self._outbox = Outbox(self.wire, name)
        self._spool = Spool(None, NodeCache(folder, 2**20), self._outbox)
        self._dispatcher = Dispatcher(self._outbox, self._spool)
        room = Capacity(cpu=slots, mem_bytes=2**34, gpu=0)
        self._pool = self._dispatcher.pool = SlotPool(room, GpuPool(0), self._make)
        self.intake = self._dispatcher.intake = Intake(
            self.wire, KEYRING, POOL, self._outbox, self._spool, self._dispatcher
        )
        self.intake.leases = Leases(
            self.wire,
            KEYRING,
            name,
            outbox=self._outbox,
            dispatcher=self._dispatcher,
            hands=self.intake,
        )
        self.loop.complete(self._start(slots))

    async def _start(self, slots: int) -> None:
        await self.wire.open()
        await self._pool.start(slots)
        await self.intake.add_class("c1", with_suspects=True)
        self._chore = asyncio.ensure_future(self._look())

    async def _look(self) -> None:
        """As the daemon: a refill that failed has nobody else to ask for the next."""
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            self.intake.refill()

    def _make(self, number: int, request: ResourceRequirement, gpus: GpuShare | None) -> Slot:
        slot = WatchedSlot(number, request, self._dispatcher, self._on_start)
        self.slots.append(slot)
        return cast("Slot", slot)

    def busy(self) -> list[WatchedSlot]:
        """The slots in which a call runs."""
        return [slot for slot in self.slots if slot.running is not None and not slot.closed]

    def do(self, act: Callable[[], object]) -> None:
        """Let something happen in the loop; what comes of it waits for the next turn."""
        self.loop.call_soon(act)
        self.loop.turn()

    def drain(self, timeout_s: float) -> None:
        """Begin to leave."""
        self.draining = True
        self._leaving = self.loop.create_task(self._drain(timeout_s))

    async def _drain(self, timeout_s: float) -> None:
        deadline = self.loop.time() + timeout_s
        await self.intake.close()
        self._dispatcher.hand_back_all()
        while self.intake.held and self.loop.time() < deadline:
            await self._outbox.drain(1.0)
            await asyncio.sleep(0.02)
        self._chore.cancel()
        self._dispatcher.close()
        await self._pool.close(grace_s=1.0)
        await self._outbox.drain(5.0)
        await self.wire.close()
        self.gone = True

    def die(self) -> None:
        """End at once, with everything that was under way."""
        self.gone = True
        self.wire.break_off()
        self.close()

    def close(self) -> None:
        """Let go of the loop."""
        self._spool.close()
        if not self.loop.is_closed():
            self.loop.perish()
