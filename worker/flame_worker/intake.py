"""What comes in: consumers, checks, suspects. What passes here is verified and may be run."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from itertools import chain
from time import time
from typing import Final

from flame_broker.clock import Clock
from flame_broker.errors import (
    CallCancelled,
    CallError,
    CallExpired,
    FlameError,
    MalformedMessage,
    Quarantined,
    SignatureError,
    UnknownKey,
    VersionMismatch,
)
from flame_broker.frames import MAX_FRAME_BYTES, encode, identity, open_frame
from flame_broker.keys import Key, Keyring
from flame_broker.logs import get_logger
from flame_broker.messages import MAX_STRIKES, CallFrame, Priority, Suspicion
from flame_broker.topology import (
    calls_exchange,
    calls_queue,
    dead_queue,
    parked_queue,
    suspects_queue,
    tracked,
)
from flame_broker.transport import Delivery, Transport
from flame_worker.dispatch import DROPPED, Dispatcher
from flame_worker.holding import Ack, Holding
from flame_worker.leases import Leases
from flame_worker.outbox import Outbox
from flame_worker.spool import Spool
from flame_worker.taps import Draw, Tap
from flame_worker.timing import frames_ahead

__all__ = ["Intake"]

_log = get_logger("flame.worker")

_REFILL_EVERY_S: Final = 0.01
_LOOK_EVERY_S: Final = 0.05
_HELD_MOST: Final = 1000
"""Frames in hand while the broker lets nothing leave; their results stay in our memory."""
_REMEMBERED_FRAMES: Final = 2048
_REMEMBERED_DROPS: Final = 100_000


class Intake:
    """Consumes a pool's queues within what the slots can take.

    Args:
        transport: Where from.
        keyring: The keys whose frames are consumed.
        pool: The pool's name.
        outbox: Takes what is set aside or handed back.
        spool: Fetches what calls need before they start.
        dispatcher: Takes what may run.

    Attributes:
        leases: Claims what must not run beside another run of it.
    """

    leases: Leases

    def __init__(
        self,
        transport: Transport,
        keyring: Keyring,
        pool: str,
        outbox: Outbox,
        spool: Spool,
        dispatcher: Dispatcher,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._transport = transport
        self._keyring = keyring
        self._pool = pool
        self._outbox = outbox
        self._spool = spool
        self._dispatcher = dispatcher
        self._taps: dict[str, list[Tap]] = {}
        self._held: dict[bytes, Holding] = {}
        self._settled: OrderedDict[bytes, None] = OrderedDict()
        self._dropped: OrderedDict[tuple[str, int], type[CallError]] = OrderedDict()
        self._full: set[str] = set()
        self._ahead: dict[str, int] = {}
        self._refilling: asyncio.Task[None] | None = None
        self._refill_again = False
        self._looking: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = True
        self._clock = Clock()

    # ── queues ───────────────────────────────────────────────────────────────

    @property
    def held(self) -> int:
        """Frames in hand."""
        return len(self._held)

    def holdings(self) -> list[Holding]:
        """The frames in hand."""
        return [*self._held.values()]

    @property
    def class_names(self) -> list[str]:
        """The resource classes whose queues are consumed."""
        return list(self._taps)

    async def backlog(self, class_name: str) -> int:
        """How many messages wait in the queues of a class; none where it has credit for more."""
        if class_name not in self._full:
            return 0
        depths = [await self._transport.depth(t.queue.name) for t in self._taps[class_name]]
        return sum(depth or 0 for depth in depths)

    async def add_class(self, class_name: str, *, with_suspects: bool = False) -> None:
        """Begin to consume the queues of a resource class, the highest priority first."""
        taps: list[Tap] = []
        for key in self._keyring:
            if with_suspects:
                queue = suspects_queue(key.hex_id, self._pool)
                taps.append(Tap(queue, key, class_name, suspects=True))
                for aside in (dead_queue, parked_queue):
                    await self._transport.declare(aside(key.hex_id, self._pool))
        taps += await self._calls_taps(class_name)
        await self._transport.declare(*(tap.queue for tap in taps))
        if class_name not in self._taps:  # it may be announced twice
            # Not before: a refill meanwhile must not consume what is not there yet.
            self._taps[class_name] = taps
            self._refill_again = True  # should this one fail
            await self._refill_class(class_name)

    async def _calls_taps(self, class_name: str) -> list[Tap]:
        fanout = self._transport.capabilities.fanout
        if fanout:
            for key in self._keyring:
                await self._transport.declare_exchange(calls_exchange(key.hex_id), "topic")
        queues = [
            (calls_queue(key.hex_id, self._pool, class_name, priority), key)
            for priority in Priority
            for key in self._keyring
        ]
        return [
            Tap(tracked(queue, key.hex_id) if fanout else queue, key, class_name)
            for queue, key in queues
        ]

    def full(self, class_name: str, queue: str) -> int:
        """Stop consuming a class: calls of one of its queues must be handed back.

        How many messages that queue sends all the same: unused credit cannot be withdrawn.
        """
        self._ahead.pop(class_name, None)
        if class_name in self._full or class_name not in self._taps:
            return 0
        self._full.add(class_name)
        taps = [tap for tap in self._taps[class_name] if not tap.suspects]
        for tap in taps:
            self._spawn(self._shut(tap, [draw for draw in tap.draws if draw.used]))
        return sum(tap.unused for tap in taps if tap.queue.name == queue)

    def short(self, class_name: str, seconds: float) -> None:
        """Hold frames ahead: they are over before the broker could send more."""
        known, shut = self._ahead.get(class_name, 0), class_name in self._full
        ahead = max(known, frames_ahead(seconds, self._dispatcher.pool.width(class_name)))
        if shut and (self._dispatcher.waits(class_name) or self._outbox.stalled):
            return
        if shut or ahead > known:
            self._full.discard(class_name)
            self._ahead[class_name] = ahead
            self._refill_soon()  # what was shut has to be opened again

    def refill(self) -> None:
        """Consume again where there is room; does nothing while nothing was shut."""
        if self._full or self._refill_again:
            self._refill_soon()

    def foresee(self, class_name: str) -> None:
        """Ask for the next call before one has ended: with its ack it would come later."""
        if class_name not in self._ahead and class_name in self._taps:
            self._full.add(class_name)
        self.refill()

    def widen(self) -> None:
        """More calls can run at a time than before."""
        self._refill_soon()

    def _refill_soon(self) -> None:
        """At once, but not more often than every 10 ms: a refill asks the broker questions."""
        self._refill_again = True
        if self._open and self._refilling is None:
            self._refilling = self._spawn(self._refill())

    async def make_way(self, holding: Holding) -> None:
        """See that the ack of a frame brings no other one while its calls still run."""
        for tap in chain.from_iterable(self._taps.values()):
            for draw in [draw for draw in tap.draws if holding in draw.holdings]:
                if not tap.suspects:
                    self._full.add(tap.class_name)
                    await self._shut(tap, [draw])

    def stop(self) -> None:
        """Ask for nothing more; what the broker was asked for may still come."""
        self._open = False

    async def close(self) -> None:
        """Stop consuming; what is in hand stays in hand."""
        self.stop()
        if self._refilling is not None:
            await asyncio.wait([self._refilling])
        taps = chain.from_iterable(self._taps.values())
        await asyncio.gather(*(self._shut(tap) for tap in taps))

    def _look(self) -> None:
        """Go on while the broker lets nothing leave: calls that are done must not bind credit."""
        self._looking = None
        if self._outbox.stalled and self._transport.connected:
            self._full.update(self._taps)
            self._refill_soon()
        self._look_later()

    def _look_later(self) -> None:
        if self._looking is None and self._held and self._open:
            self._looking = asyncio.get_running_loop().call_later(_LOOK_EVERY_S, self._look)

    async def _refill(self) -> None:
        try:
            while self._refill_again and self._open:
                self._refill_again = False
                for class_name in list(self._taps):
                    await self._refill_class(class_name)
                await asyncio.sleep(_REFILL_EVERY_S)
        except FlameError as problem:
            self._refill_again = True
            if self._open:  # or the transport was closed under it, as the worker leaves
                _log.warning("intake.refill_failed", reason=str(problem))
        finally:
            self._refilling = None

    async def _refill_class(self, class_name: str) -> None:
        """Open the taps of a class as far as there is room for its calls."""
        if class_name in self._full and not await self._sip(class_name):
            return
        slots = self._dispatcher.pool.width(class_name)
        if not slots and not self._dispatcher.room(class_name):
            self._full.add(class_name)
            return
        ahead = self._ahead.get(class_name, 0)
        free = max(slots, 1) - self.leases.occupied(class_name)
        if free <= 0:
            self._full.add(class_name)
        for tap in self._taps[class_name]:
            wanted = 1 if tap.suspects else free + ahead if free > 0 else 0
            await self._open_tap(tap, wanted, lambda tap: tap.credit)

    async def _sip(self, class_name: str) -> bool:
        """Ask for as many messages as could start now, the highest priority first.

        True if the queues turned out to be empty: then there is room for all that may come.
        """
        for tap in self._taps[class_name]:
            room = self._dispatcher.room(class_name)
            if not room or not self._open or len(self._held) >= _HELD_MOST:
                return False
            if tap.suspects:
                continue  # one draw, never shut: two suspects at a time could not be told apart
            if self._dispatcher.ending(class_name) or self._outbox.stalled:
                # The ack of a call that ends would bring another one beside that asked for here.
                await self._shut(tap, [*tap.draws])
            await self._open_tap(tap, room, lambda tap: tap.unused + self._about_to_ack(tap))
            if await self._transport.depth(tap.queue.name):
                return False
        self._full.discard(class_name)
        return True

    def _about_to_ack(self, tap: Tap) -> int:
        """How many messages have only confirms to wait for: their acks bring others."""
        if self._outbox.stalled:
            return 0
        running = self._dispatcher.running()
        held = chain.from_iterable(draw.holdings for draw in tap.draws)
        return sum(not (h.waiting or h.convoys or h in running) for h in held)

    async def _open_tap(self, tap: Tap, wanted: int, have: Callable[[Tap], int]) -> None:
        """Add credit; it is counted under the lock, or two refills would both add it."""
        async with tap.lock:
            more = wanted - have(tap)
            if more > 0 and self._open:
                await self._draw(tap, more)

    async def _draw(self, tap: Tap, credit: int) -> None:
        draw = Draw(credit)
        tap.draws.add(draw)
        deliver = partial(self._on_delivery, tap, draw)
        try:
            consuming = self._transport.consume(tap.queue.name, deliver, prefetch=credit)
            draw.consumer = await consuming
        except FlameError:
            tap.draws.discard(draw)  # the next refill tries again
            raise

    async def _shut(self, tap: Tap, draws: list[Draw] | None = None) -> None:
        async with tap.lock:
            for draw in list(tap.draws) if draws is None else draws:
                # Asked one by one: while others are cancelled, its message may end.
                if draws is None or draw.used:
                    tap.draws.discard(draw)
                    if draw.consumer is not None:
                        await draw.consumer.cancel()

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # ── deliveries ───────────────────────────────────────────────────────────

    def _on_delivery(self, tap: Tap, draw: Draw, delivery: Delivery) -> None:
        draw.held += 1
        ack = partial(draw.ack, delivery)
        if not tap.suspects and draw.used and self._is_full(tap.class_name):
            self._spawn(self._shut(tap, [draw]))
        try:
            frame, key = self._open_calls(tap, delivery)
        except (UnknownKey, VersionMismatch) as problem:
            self._set_aside(tap, delivery, "parked", problem, ack)
        except (MalformedMessage, SignatureError) as problem:
            self._set_aside(tap, delivery, "dead", problem, ack)
        else:
            self._accept(tap, draw, delivery, frame, key, ack)

    def _is_full(self, class_name: str) -> bool:
        return class_name in self._full and not self._dispatcher.room(class_name)

    def _open_calls(self, tap: Tap, delivery: Delivery) -> tuple[CallFrame, Key]:
        frame, key = open_frame(delivery.body, self._keyring, queue=delivery.queue)
        if not isinstance(frame, CallFrame):
            raise MalformedMessage("a frame in a calls queue that holds no calls")
        wanted = frame.spec.resources
        if wanted != tap.class_name and not (tap.suspects and self._dispatcher.pool.knows(wanted)):
            raise MalformedMessage(f"calls of the resource class {wanted!r} in a queue of another")
        return frame, key

    def _set_aside(
        self, tap: Tap, delivery: Delivery, fate: str, problem: FlameError, ack: Ack
    ) -> None:
        self.counts[fate] += 1
        aside = dead_queue if fate == "dead" else parked_queue
        _log.warning("message.set_aside", fate=fate, queue=delivery.queue, reason=str(problem))
        reason = f"{type(problem).__name__}: {problem}"
        queue = aside(tap.key.hex_id, self._pool).name
        # What is over the limit is not kept whole: the broker might refuse it, and who sent it
        # should not fill two queues with one message.
        self._outbox.set_aside(queue, delivery.body[:MAX_FRAME_BYTES], reason, ack)

    def _accept(
        self, tap: Tap, draw: Draw, delivery: Delivery, frame: CallFrame, key: Key, ack: Ack
    ) -> None:
        mark = identity(delivery.body)
        if mark in self._held:
            self._held[mark].acks.append(ack)
            return
        if mark in self._settled:
            ack()
            return
        now = asyncio.get_running_loop().time()
        holding = Holding([ack], frame, key, partial(self._settle, mark, draw), born=now)
        self._held[mark] = holding
        self._look_later()
        draw.holdings.add(holding)
        self.counts["frames"] += 1
        self.counts["calls"] += len(frame.calls)
        holding.suspect = tap.suspects
        # At most once: who had it before has not started it without a lease, which is ours then.
        if delivery.redelivered and not frame.spec.at_most_once:
            self._strike(tap, holding) if tap.suspects else self._suspect(tap, holding)
        elif not self._late(holding) and self._wanted(holding):
            self._admit(holding)

    def _admit(self, holding: Holding) -> None:
        """Some calls may run elsewhere at this moment: whoever keeps the leases knows."""
        if holding.frame.spec.at_most_once:
            self.leases.claim(holding, partial(self._go_on, self._provide))
        elif holding.suspect and self.leases.alive(holding.key):
            self.leases.look(holding, partial(self._go_on, self._provide))
        else:
            self._provide(holding)

    def _go_on(self, then: Callable[[Holding], None], holding: Holding) -> None:
        """Time has passed: calls may be late or cancelled, and the worker about to leave."""
        if not self._open:
            self._outbox.hand_back(holding, holding.take_waiting())
        elif not self._late(holding) and self._wanted(holding):
            then(holding)

    def _suspect(self, tap: Tap, holding: Holding) -> None:
        """Whoever had this frame is gone, perhaps because of it: run its calls one by one."""
        self.counts["suspects"] += len(holding.frame.calls)
        queue = suspects_queue(tap.key.hex_id, self._pool).name
        self._outbox.hand_back(holding, holding.take_waiting(), queue=queue)

    def _strike(self, tap: Tap, holding: Holding) -> None:
        """Lost again: from now on it runs apart, and that counts against it if it was alone."""
        strikes = holding.frame.strikes + (holding.frame.suspicion is Suspicion.ALONE)
        calls = holding.take_waiting()
        if strikes < MAX_STRIKES:
            self._outbox.hand_back(holding, calls, strikes=strikes, suspicion=Suspicion.APART)
            return
        self.counts["quarantined"] += 1
        story = (
            f"the call was running alone when its worker was lost, {strikes} times; "
            f"the last delivery was seen by this worker at {time():.0f}"
        )
        queue = dead_queue(tap.key.hex_id, self._pool).name
        body = encode(replace(holding.frame, queue=queue, strikes=strikes), holding.key)
        failed = partial(self._outbox.failure, holding, calls, Quarantined, story)
        self._outbox.set_aside(queue, body, f"Quarantined: {story}", failed)

    def _late(self, holding: Holding) -> bool:
        expires_at = holding.frame.expires_at
        if not expires_at or self._clock.earliest() < expires_at:
            return False
        reason = "it waited longer than its queue timeout"
        self._outbox.failure(holding, holding.take_waiting(), CallExpired, reason)
        return True

    def _wanted(self, holding: Holding) -> bool:
        """Drop calls that were cancelled or have expired; False if none are left."""
        client, dropped = holding.frame.client, self._dropped
        for kind in DROPPED if dropped else ():
            calls = [c for c in holding.waiting if dropped.get((client, c.counter)) is kind]
            for call in calls:
                holding.waiting.remove(call)
            if calls:
                self._outbox.failure(holding, calls, kind, DROPPED[kind])
        return bool(holding.waiting)

    def _provide(self, holding: Holding) -> None:
        """Bring what the calls need to this node, then let them run."""
        frame = holding.frame
        holding.target_path = self._spool.target_path(frame.spec.target)
        needed = self._spool.needed(frame)
        if needed:
            provided = partial(self._go_on, self._dispatcher.take, holding)
            self._spool.provide(holding, needed, provided, partial(self._fail, holding))
        else:
            self._dispatcher.take(holding)

    def _fail(self, holding: Holding, problem: FlameError) -> None:
        reason = f"before the call could start: {problem}"
        self._outbox.failure(holding, holding.take_waiting(), type(problem), reason)

    def _settle(self, mark: bytes, draw: Draw, holding: Holding) -> None:
        draw.holdings.discard(holding)
        self._held.pop(mark, None)
        self._settled[mark] = None
        if len(self._settled) > _REMEMBERED_FRAMES:
            self._settled.popitem(last=False)

    # ── cancels ──────────────────────────────────────────────────────────────

    def cancel(self, client: str, counters: frozenset[int], *, spare_running: bool) -> None:
        """Stop calls that are here, and remember those that may still come."""
        self._remember(client, counters, CallCancelled)
        if spare_running:
            self._dispatcher.drop_unstarted(client, counters, CallCancelled)
        else:
            self._dispatcher.cancel(client, counters)

    def expire(self, client: str, counters: frozenset[int]) -> set[int]:
        """Drop calls that have waited too long, now or when they come; those that have started."""
        self._remember(client, counters, CallExpired)
        self._dispatcher.drop_unstarted(client, counters, CallExpired)
        started = self._dispatcher.started(client, counters)
        for holding in self._held.values():  # their children are done, the store is not
            if holding.frame.client == client:
                started |= holding.convoys.keys() & counters
        return started

    def _remember(self, client: str, counters: frozenset[int], kind: type[CallError]) -> None:
        for counter in counters:
            self._dropped[client, counter] = kind
        while len(self._dropped) > _REMEMBERED_DROPS:
            self._dropped.popitem(last=False)
