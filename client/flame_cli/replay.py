"""Calls that were set aside, sent again: published and confirmed before they are taken off."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass, replace
from time import time
from typing import Final, Self

from flame_broker.errors import BrokerUnavailable, ResourceError
from flame_broker.frames import encode
from flame_broker.keys import Key
from flame_broker.messages import CallFrame, ControlFrame, Priority, Suspicion
from flame_broker.resources import DEFAULT_CLASS, ResourceRequirement
from flame_broker.topology import calls_exchange, calls_queue, classes_queue, tracked
from flame_broker.transport import QueueSpec, Transport
from flame_cli.aside import Fate, Shelf

__all__ = ["Edits", "Replayer", "in_time", "renewed"]

_PATIENCE_S: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Edits:
    """What is to be different when calls run again; None leaves it as it is.

    Args:
        timeout_s: How long a call may run; 0 for as long as it likes.
        queue_timeout_s: How long it may wait from now on. What it had before counts no more.
        resources: The class that it needs.
        mem_bytes: The memory that it needs, in place of what its class says.
    """

    timeout_s: float | None = None
    queue_timeout_s: float | None = None
    resources: str | None = None
    mem_bytes: int | None = None

    @classmethod
    def parse(
        cls,
        *,
        timeout_s: float | None = None,
        queue_timeout_s: float | None = None,
        resources: str | None = None,
        mem: str | None = None,
    ) -> Self:
        """Read what was typed.

        Args:
            timeout_s: As it is.
            queue_timeout_s: As it is.
            resources: A class such as ``c2-m4``, or a request such as ``cpu=2,mem=4g``.
            mem: A size such as ``4g``.

        Raises:
            ResourceError: One of them is neither, or more than any worker could have.
        """
        if resources is not None:
            kind = ResourceRequirement
            read = kind.from_string if "=" in resources else kind.from_class_name
            resources = read(resources).class_name
        return cls(
            timeout_s=timeout_s,
            queue_timeout_s=queue_timeout_s,
            resources=resources,
            mem_bytes=None if mem is None else _memory(mem),
        )

    def class_for(self, resources: str) -> str:
        """The class of calls that had this one.

        Raises:
            ResourceError: That is no class, or no worker can have so much.
        """
        request = ResourceRequirement.from_class_name(self.resources or resources)
        if self.mem_bytes is not None:
            request = replace(request, mem_bytes=self.mem_bytes)
        return request.class_name


def renewed(frame: CallFrame, shelf: Shelf, edits: Edits) -> CallFrame:
    """The same calls for their pool, without suspicion and without the strikes they had.

    It counts as handed once more, so that no worker takes it for a frame that it has had before.

    Args:
        frame: As it was set aside.
        shelf: Where it lies.
        edits: What is to be different.

    Raises:
        ResourceError: It asks for resources that make no sense.
    """
    resources = edits.class_for(frame.spec.resources)
    priority = shelf.priority_of(frame) or Priority.NORMAL
    timeout_s = frame.spec.timeout_s if edits.timeout_s is None else edits.timeout_s
    return replace(
        frame,
        queue=calls_queue(shelf.key_id, shelf.pool, resources, priority).name,
        spec=replace(frame.spec, resources=resources, timeout_s=timeout_s),
        strikes=0,
        suspicion=Suspicion.SHARED,
        handed=frame.handed + 1,
        expires_at=0.0 if edits.queue_timeout_s is None else time() + edits.queue_timeout_s,
    )


def _memory(text: str) -> int:
    if "," in text:
        raise ResourceError(f"mem={text}: expected one size such as 4g")
    return ResourceRequirement.from_string(f"mem={text}").mem_bytes


async def in_time(work: Awaitable[None]) -> None:
    """Wait for the broker, but not for the end of an alarm.

    Raises:
        BrokerUnavailable: It took longer than 10 s; a message may have arrived all the same.
    """
    try:
        async with asyncio.timeout(_PATIENCE_S):
            await work
    except TimeoutError as exc:
        raise BrokerUnavailable(
            f"the broker is connected and confirmed nothing within {_PATIENCE_S:g} s; a memory or "
            "disk alarm does that, its log and its management page tell"
        ) from exc


def _see(confirmed: asyncio.Future[None]) -> None:
    """Ask for the outcome: where an earlier one fails, nobody waits for it."""
    if not confirmed.cancelled():
        confirmed.exception()


class Replayer:
    """Publishes frames of calls, and makes the queues that they need.

    Args:
        transport: Where to.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._made: set[str] = set()

    async def send(self, frame: CallFrame, shelf: Shelf, key: Key) -> asyncio.Future[None]:
        """Publish; the future is done when the broker has confirmed.

        The ledger knows quarantined calls, so those go past it. What was parked nobody could read.

        Args:
            frame: As ``renewed`` makes it.
            shelf: Where it lay.
            key: Signs, as it did before: its client expects results under it.

        Raises:
            BrokerUnavailable: The queue could not be made in time.
            PayloadTooLarge: The edits made it too large.
        """
        body = encode(frame, key)
        await in_time(self._make_queue(frame, shelf, key))
        new = shelf.fate is Fate.PARKED and frame.spec.track
        exchange = calls_exchange(shelf.key_id) if new else ""
        confirmed = self._transport.publish(frame.queue, body, exchange=exchange)
        confirmed.add_done_callback(_see)
        return confirmed

    async def _make_queue(self, frame: CallFrame, shelf: Shelf, key: Key) -> None:
        if frame.queue in self._made:
            return
        template = calls_queue(shelf.key_id, shelf.pool, frame.spec.resources)
        queue = tracked(replace(template, name=frame.queue), shelf.key_id)
        await self._transport.declare_exchange(calls_exchange(shelf.key_id), "topic")
        await self._transport.declare(queue)
        if frame.spec.resources != DEFAULT_CLASS:
            stream = classes_queue(shelf.key_id, shelf.pool)
            await self._transport.declare(stream)
            await self._announce(stream, frame.spec.resources, shelf.pool, key)
        self._made.add(frame.queue)

    async def _announce(self, stream: QueueSpec, name: str, pool: str, key: Key) -> None:
        """Tell the pool's workers that there are calls of this class."""
        order = ControlFrame(stream.name, "class", {"pool": pool, "name": name})
        await self._transport.publish(stream.name, encode(order, key))
