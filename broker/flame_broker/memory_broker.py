"""A broker inside this process: queues are deques, deliveries are loop callbacks, nothing polls.

Its members (one for each transport) may live in different loops and threads: one lock guards it
all, and a member's callbacks run in its own loop. Whoever calls a broker or a queue holds the lock.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections import deque
from collections.abc import Mapping
from itertools import count

from flame_broker.errors import ConfigError
from flame_broker.topics import binding_takes
from flame_broker.transport import OnDelivery, QueueKind, QueueSpec

__all__ = ["Member", "MemoryBroker", "MemoryConsumer", "MemoryDelivery", "MemoryQueue"]

_BATCH = 256  # deliveries in one turn of the loop, so that nothing else in it starves
_STREAM_MESSAGES = 10_000  # what a stream keeps when its declaration gives no number
_sequence = count()


class MemoryDelivery:
    """One message, in a queue or in hand."""

    __slots__ = ("_consumer", "body", "headers", "queue", "redelivered", "seq")

    def __init__(self, queue: str, body: bytes, headers: Mapping[str, object]) -> None:
        self.queue, self.body, self.headers = queue, body, headers
        self.seq, self.redelivered = next(_sequence), False
        self._consumer: MemoryConsumer | None = None

    def twin(self, *, redelivered: bool) -> MemoryDelivery:
        """Make a copy for the next consumer, so that a late ack of this one has no effect on it."""
        twin = MemoryDelivery(self.queue, self.body, self.headers)
        twin.seq, twin.redelivered = self.seq, redelivered
        return twin

    def hand_to(self, consumer: MemoryConsumer) -> None:
        """Give it to a consumer, at the price of one credit."""
        self._consumer = consumer
        consumer.credit -= 1
        consumer.member.enqueue(self)

    @property
    def consumer(self) -> MemoryConsumer | None:
        """Who has it in hand; None while it waits in a queue."""
        return self._consumer

    def ack(self) -> bool:
        """Take it off the queue; False if it went back already."""
        return self._consumer is not None and self._consumer.settle(self)


class MemoryQueue:
    """A queue. Of a stream every consumer reads a tap: a queue of its own that starts as a copy."""

    def __init__(self, spec: QueueSpec, owner: Member | None = None) -> None:
        self.spec, self.owner = spec, owner
        self.messages: deque[MemoryDelivery] = deque()
        self.ready: deque[MemoryConsumer] = deque()  # those with credit; they take turns
        self.taps: list[MemoryQueue] = []
        unset = _STREAM_MESSAGES if spec.kind is QueueKind.STREAM else sys.maxsize
        self._limit = int(spec.arguments.get("x-max-length", unset))

    def put(self, body: bytes, headers: Mapping[str, object]) -> None:
        """Take a new message; over ``x-max-length`` the oldest is dropped."""
        self.messages.append(MemoryDelivery(self.spec.name, body, headers))
        self.pump()
        for tap in self.taps:
            tap.put(body, headers)

    def put_back(self, delivery: MemoryDelivery, *, redelivered: bool) -> None:
        """Take a message back, to the front."""
        self.messages.appendleft(delivery.twin(redelivered=redelivered))
        self.pump()

    def pump(self) -> None:
        """Hand out what there is to those who have credit."""
        while self.messages and self.ready:
            consumer = self.ready.popleft()
            if consumer.member.dead:
                continue
            self.messages.popleft().hand_to(consumer)
            if consumer.credit:
                self.ready.append(consumer)
        while len(self.messages) > self._limit:
            self.messages.popleft()

    def tap(self) -> MemoryQueue:
        """Open a reader's own view of a stream, from its first message on."""
        tap = MemoryQueue(self.spec)
        tap.messages.extend(message.twin(redelivered=False) for message in self.messages)
        self.taps.append(tap)
        return tap


class MemoryConsumer:
    """A consumer with a credit of its own."""

    def __init__(self, member: Member, queue: MemoryQueue, call: OnDelivery, prefetch: int) -> None:
        self.member, self.queue, self.call = member, queue, call
        self.credit = prefetch
        self.active = True
        queue.ready.append(self)
        queue.pump()

    def settle(self, delivery: MemoryDelivery) -> bool:
        """Finish a delivery and win its credit back."""
        with self.member.broker.lock:
            if not self.member.unacked.pop(delivery, False):
                return False
            self.credit += 1
            if self.active and self.credit == 1:
                self.queue.ready.append(self)
                self.queue.pump()
        return True

    async def cancel(self) -> None:
        """Leave the queue; what no callback has seen goes back as if it had never left."""
        with self.member.broker.lock:
            self.stop()

    def stop(self) -> None:
        """Leave the queue, under the lock."""
        self.active = False
        if self in self.queue.ready:
            self.queue.ready.remove(self)
        self.member.broker.untap(self.queue)
        self.member.consumers.discard(self)
        for delivery in reversed(self.member.take_unseen(self)):
            self.queue.put_back(delivery, redelivered=delivery.redelivered)


class Member:
    """One transport's side of the broker: what it has in hand and what its loop has yet to see."""

    def __init__(self, broker: MemoryBroker, loop: asyncio.AbstractEventLoop) -> None:
        self.broker, self.loop = broker, loop
        self.consumers: set[MemoryConsumer] = set()
        self.unacked: dict[MemoryDelivery, bool] = {}
        self._thread = threading.get_ident()
        self._inbox: deque[MemoryDelivery] = deque()
        self._awake = False

    @property
    def dead(self) -> bool:
        """Whether its loop was closed under it: then nobody will ever ack."""
        return self.loop.is_closed()

    def enqueue(self, delivery: MemoryDelivery) -> None:
        """Put a delivery before the loop, waking it once for many."""
        self.unacked[delivery] = True
        self._inbox.append(delivery)
        if not self._awake:
            self._awake = True
            self._wake()

    def _wake(self) -> None:
        here = threading.get_ident() == self._thread
        (self.loop.call_soon if here else self.loop.call_soon_threadsafe)(self._run)

    def _run(self) -> None:
        """Call back for a batch; an exception goes to the loop's handler, the rest comes after."""
        self._awake = False
        try:
            for _ in range(_BATCH):
                delivery = self._next()
                if delivery is None or delivery.consumer is None:
                    return
                delivery.consumer.call(delivery)
        finally:
            with self.broker.lock:
                if self._inbox and not self._awake:
                    self._awake = True
                    self._wake()

    def _next(self) -> MemoryDelivery | None:
        with self.broker.lock:
            return self._inbox.popleft() if self._inbox else None

    def take_unseen(self, consumer: MemoryConsumer) -> list[MemoryDelivery]:
        """Take back what was meant for a consumer and not shown to it, oldest first."""
        unseen = [delivery for delivery in self._inbox if delivery.consumer is consumer]
        for delivery in unseen:
            self._inbox.remove(delivery)
            del self.unacked[delivery]
        return unseen

    def release(self) -> None:
        """Leave the broker: consumers and exclusive queues go, unacked messages go back."""
        for consumer in list(self.consumers):
            consumer.stop()
        in_hand, self.unacked = self.unacked, {}
        for delivery in sorted(in_hand, key=lambda one: -one.seq):
            if delivery.consumer is not None:
                delivery.consumer.queue.put_back(delivery, redelivered=True)
        self.broker.leave(self)


class MemoryBroker:
    """Queues and exchanges of one namespace."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.queues: dict[str, MemoryQueue] = {}
        self.exchanges: dict[str, str] = {}
        self._bindings: dict[str, list[tuple[str, str]]] = {}  # exchange -> (routing key, queue)
        self._members: list[Member] = []

    def join(self, member: Member) -> None:
        """Let a member in, and release those whose loop was closed without leaving."""
        for other in [one for one in self._members if one.dead]:
            other.release()
        self._members.append(member)

    def leave(self, member: Member) -> None:
        """Forget a member and its exclusive queues."""
        self._members.remove(member)
        for name in [n for n, queue in self.queues.items() if queue.owner is member]:
            self.delete(name)

    def declare(self, spec: QueueSpec, member: Member) -> None:
        """Make a queue and its bindings.

        Raises:
            ConfigError: It exists with other arguments, or is bound to an unknown exchange.
        """
        known = self.queues.get(spec.name)
        if known is None:
            owner = member if spec.exclusive else None
            known = self.queues[spec.name] = MemoryQueue(spec, owner)
        if (known.spec.kind, known.spec.arguments) != (spec.kind, spec.arguments):
            raise ConfigError(f"queue {spec.name!r} exists with other arguments: {known.spec}")
        for exchange, key in spec.bindings:
            self._bind(exchange, key, spec.name)

    def _bind(self, exchange: str, key: str, queue: str) -> None:
        if exchange not in self.exchanges:
            raise ConfigError(f"queue {queue!r} is bound to {exchange!r}, which is not declared")
        bound = self._bindings.setdefault(exchange, [])
        if (key, queue) not in bound:
            bound.append((key, queue))

    def delete(self, name: str) -> None:
        """Drop a queue, its messages and its bindings."""
        self.queues.pop(name, None)
        for bound in self._bindings.values():
            bound[:] = [(key, queue) for key, queue in bound if queue != name]

    def route(self, exchange: str, key: str) -> list[MemoryQueue]:
        """Find the queues that a message goes to; the nameless exchange goes by queue name."""
        if not exchange:
            return [self.queues[key]] if key in self.queues else []
        kind = self.exchanges.get(exchange, "")
        bound = self._bindings.get(exchange, ())
        names = {queue: None for pattern, queue in bound if binding_takes(kind, pattern, key)}
        return [self.queues[name] for name in names]

    def untap(self, queue: MemoryQueue) -> None:
        """Close a reader's view of a stream; any other queue is left alone."""
        stream = self.queues.get(queue.spec.name)
        if stream is not None and queue in stream.taps:
            stream.taps.remove(queue)
