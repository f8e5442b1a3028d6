"""A worker without processes: its real parts around slots that a test plays, and a broker here."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

from flame_broker.codec import encode_value
from flame_broker.frames import encode, open_frame
from flame_broker.keys import Keyring
from flame_broker.memory import MemoryTransport
from flame_broker.messages import (
    Call,
    CallFrame,
    CallSpec,
    Priority,
    Result,
    ResultFrame,
    Status,
    Target,
)
from flame_broker.resources import Capacity, ResourceRequirement
from flame_broker.store import Store, open_store
from flame_broker.store.cache import NodeCache
from flame_broker.topology import (
    calls_exchange,
    calls_queue,
    dead_queue,
    reply_queue,
    suspects_queue,
    tracked,
)
from flame_broker.transport import Delivery
from flame_worker.batches import Batch, Lost, SlotOwner, SpooledResult
from flame_worker.dispatch import Dispatcher
from flame_worker.gpus import GpuPool, GpuShare
from flame_worker.intake import Intake
from flame_worker.leases import Leases
from flame_worker.outbox import Outbox
from flame_worker.pool import SlotPool
from flame_worker.slots import Slot
from flame_worker.spool import Spool
from lab.wait import eventually

__all__ = [
    "CALLS",
    "CLIENT",
    "DEAD",
    "KEYRING",
    "POOL",
    "REPLIES",
    "SUSPECTS",
    "Bench",
    "PlayedSlot",
    "bench",
    "frame_of",
]

KEYRING = Keyring.parse("k" * 40)
POOL = "default"
CLIENT = "c0"

_KEY = KEYRING.signer
_REPLY = tracked(reply_queue(_KEY.hex_id, CLIENT, 1), _KEY.hex_id)


class PlayedSlot:
    """A slot whose child is the test: ``finish`` and ``die`` are what the child does.

    Attributes:
        given: Counters of all calls it was ever given.
        started: Calls that the child has begun, by counter, in order.
        cancels: Counters of running calls that were interrupted.
        refuses: Raised by the next ``start``.
    """

    def __init__(self, number: int, request: ResourceRequirement, owner: SlotOwner) -> None:
        self.number, self.request, self.owner = number, request, owner
        self.pid = 1000 + number
        self.ready = self.revoked = self.closed = False
        self.batches: deque[Batch] = deque()
        self.given: list[int] = []
        self.started: list[int] = []
        self.cancels: list[int] = []
        self.refuses: Exception | None = None
        self._left: deque[tuple[Batch, Call]] = deque()

    async def start(self) -> None:
        """Come up at once."""
        if self.refuses is not None:
            raise self.refuses
        self.ready = True
        self.owner.on_ready(cast("Slot", self))

    async def close(self, *, grace_s: float) -> None:
        """Go."""
        self.ready, self.closed = False, True

    def give(self, batch: Batch) -> None:
        """Take calls; the first of all starts."""
        self.revoked = False
        self.batches.append(batch)
        self.given += [call.counter for call in batch.calls]
        self._left.extend((batch, call) for call in batch.calls)
        self._begin()

    def revoke(self) -> list[tuple[Batch, list[Call]]]:
        """Give back everything behind the running call."""
        self.revoked = True
        running = 1 if self.started and self._left else 0
        taken = [*self._left][running:]
        self._left = deque([*self._left][:running])
        parts: dict[int, tuple[Batch, list[Call]]] = {}
        for batch, call in taken:
            parts.setdefault(id(batch), (batch, []))[1].append(call)
        for batch, _ in parts.values():
            self._end(batch, later=True)
        return [*parts.values()]

    def cancel(self, client: str, counter: int) -> bool:
        """Note it."""
        self.cancels.append(counter)
        return True

    def left_of(self, batch: Batch) -> list[int]:
        """Calls of a batch without a result."""
        return [call.counter for other, call in self._left if other is batch]

    def finish(self, *, value: object = None, seconds: float = 0.0, result: Any = None) -> None:
        """The running call ends."""
        batch, call = self._left.popleft()
        batch.seconds += seconds
        payload = encode_value(value).join()
        outcome = result or Result(call.counter, Status.OK, payload)
        self.owner.on_results(cast("Slot", self), batch, [outcome])
        self._begin()
        self._end(batch)

    def say(self, *results: Any) -> None:
        """The running call sends items."""
        self.owner.on_results(cast("Slot", self), self._left[0][0], [*results])

    def lose(self, lost: Lost) -> None:
        """The child dies."""
        self.ready = False
        self.batches.clear()
        self._left.clear()
        self.owner.on_lost(cast("Slot", self), lost)

    def _begin(self) -> None:
        if self._left and self._left[0][1].counter not in self.started:
            self.started.append(self._left[0][1].counter)

    def _end(self, batch: Batch, *, later: bool = False) -> None:
        if any(other is batch for other, _ in self._left):
            return
        self.batches.remove(batch)
        done = partial(self.owner.on_done, cast("Slot", self), batch, batch.seconds)
        if later:
            asyncio.get_running_loop().call_soon(done)
        else:
            done()


class Bench:
    """The parts of one worker, put together as the daemon does."""

    def __init__(self, folder: Path, namespace: str, *, capacity: Capacity, gpus: int) -> None:
        self.folder = folder
        self.broker = MemoryTransport(namespace)
        self.transport = MemoryTransport(namespace)
        self.store: Store = open_store((folder / "store").as_uri())
        self.slots: list[PlayedSlot] = []
        self.refuses: Exception | None = None
        self.outbox = Outbox(self.transport, "w1")
        cache = NodeCache(folder / "cache", 2**30)
        self.spool = Spool(self.store, cache, self.outbox)
        self.dispatcher = Dispatcher(self.outbox, self.spool)
        self.gpus = GpuPool(gpus)
        self.pool = self.dispatcher.pool = SlotPool(capacity, self.gpus, self._make)
        self.intake = self.dispatcher.intake = Intake(
            self.transport, KEYRING, POOL, self.outbox, self.spool, self.dispatcher
        )
        self.leases = self.intake.leases = Leases(
            self.transport,
            KEYRING,
            "w1",
            outbox=self.outbox,
            dispatcher=self.dispatcher,
            hands=self.intake,
        )
        self.results: list[Result] = []

    def _make(self, number: int, request: ResourceRequirement, gpus: GpuShare | None) -> Slot:
        slot = PlayedSlot(number, request, self.dispatcher)
        slot.refuses = self.refuses
        self.slots.append(slot)
        return cast("Slot", slot)

    async def submit(self, *frames: CallFrame) -> None:
        """Publish frames as a client does."""
        for frame in frames:
            await self.broker.publish(frame.queue, encode(frame, _KEY))

    async def depth(self, queue: str) -> int:
        """Messages that wait in a queue."""
        return await self.broker.depth(queue) or 0

    async def settled(self, calls: int) -> None:
        """Wait until so many results have arrived and nothing is held."""
        await eventually(lambda: len(self.finals) >= calls and not self.intake.held, 5)

    def spooled(
        self, counter: int, content: bytes, status: Status, index: int = 0
    ) -> SpooledResult:
        """A large result, as a child leaves it in the spool."""
        digest = sha256(content).hexdigest()
        path = self.folder / f"spooled-{counter}-{index}"
        path.write_bytes(content)
        return SpooledResult(counter, status, path, len(content), digest, index)

    @property
    def finals(self) -> list[Result]:
        """Results that end a call."""
        return [result for result in self.results if result.status is not Status.ITEM]

    def on_reply(self, delivery: Delivery) -> None:
        """A result frame came back."""
        frame = open_frame(delivery.body, KEYRING).frame
        assert isinstance(frame, ResultFrame)
        self.results.extend(frame.results)
        delivery.ack()


@asynccontextmanager
async def bench(
    folder: Path, *, slots: int = 1, capacity: Capacity | None = None, gpus: int = 0
) -> AsyncIterator[Bench]:
    """A worker that consumes the default class."""
    room = capacity or Capacity(cpu=slots, mem_bytes=2**34, gpu=gpus)
    made = Bench(folder, folder.name, capacity=room, gpus=gpus)
    await made.broker.open()
    await made.transport.open()
    await made.broker.declare_exchange(calls_exchange(_KEY.hex_id), "topic")
    await made.broker.declare(_REPLY)
    await made.broker.consume(_REPLY.name, made.on_reply, prefetch=0)
    await made.pool.start(slots)
    await made.intake.add_class("c1", with_suspects=True)
    try:
        yield made
    finally:
        await made.intake.close()
        made.dispatcher.close()
        await made.pool.close(0)
        await made.outbox.drain(1)
        await made.transport.close()
        await made.broker.close()
        made.spool.close()


def frame_of(counters: Iterable[int], **changes: Any) -> CallFrame:
    """A frame of calls for the default class, unless told."""
    spec = CallSpec(Target("m:f"), changes.pop("resources", "c1"))
    queue = calls_queue(_KEY.hex_id, POOL, spec.resources, Priority.NORMAL).name
    calls = tuple(Call(counter, encode_value(((),)).join()) for counter in counters)
    fields = {"queue": queue, "reply": _REPLY.name, "client": CLIENT, "spec": spec, "calls": calls}
    return CallFrame(**{**fields, **changes})


CALLS = calls_queue(_KEY.hex_id, POOL, "c1", Priority.NORMAL).name
REPLIES = _REPLY
SUSPECTS = suspects_queue(_KEY.hex_id, POOL).name
DEAD = dead_queue(_KEY.hex_id, POOL).name
