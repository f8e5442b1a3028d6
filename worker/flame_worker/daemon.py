"""The factory daemon: one asyncio loop that moves calls from a pool's queues through its slots."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import secrets
import socket
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import time
from typing import Final

from flame_broker.connect import open_transport
from flame_broker.errors import ConfigError, FlameError
from flame_broker.frames import FORMAT_VERSION, encode, open_frame
from flame_broker.keys import Key, Keyring
from flame_broker.logs import get_logger
from flame_broker.messages import ControlFrame, Plain
from flame_broker.resources import DEFAULT_CLASS, Capacity, ResourceRequirement
from flame_broker.store import open_store
from flame_broker.store.cache import NodeCache
from flame_broker.topology import (
    DEFAULT_POOL,
    beats_exchange,
    classes_queue,
    control_exchange,
    control_queue,
    logs_exchange,
)
from flame_broker.transport import Delivery, Transport
from flame_broker.urls import mask_url
from flame_worker.aging import Aging
from flame_worker.bridge import Bridge
from flame_worker.capacity import detect_capacity, memory_share
from flame_worker.dispatch import Dispatcher
from flame_worker.gpus import GpuPool, GpuShare
from flame_worker.intake import Intake
from flame_worker.leases import Leases
from flame_worker.outbox import Outbox
from flame_worker.pool import SlotPool
from flame_worker.running import running_calls
from flame_worker.slots import Slot, SlotSettings
from flame_worker.spool import Spool
from flame_worker.spool_folder import SpoolFolder
from flame_worker.tombstones import Tombstones

__all__ = ["Worker", "WorkerSettings"]

_log = get_logger("flame.worker")

_HEALTH_EVERY_S: Final = 2.0
_LOOK_EVERY_S: Final = 1.0
_TRY_AGAIN_S: Final = 5.0
_CONTROL_PREFETCH: Final = 100
_CACHE_BYTES: Final = 20 * 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """What a worker is told.

    Args:
        broker_url: The broker.
        keyring: Keys whose calls it runs.
        home: Folder for its cache and spool.
        store_url: The object store; None: no large values, no functions by value.
        pool: The pool whose queues it consumes.
        slots: Slots of the default class; by default one a cpu.
        capacity: What it may reserve; by default what the machine has.
        labels: Shown in ``flame workers``.
        drain_timeout_s: How long a drain waits for running calls.
        recycle_calls: Replace a child after so many calls; 0, the default, for never. A new child
            imports everything again, which is dear for large libraries and for models, so this is
            for code that is known to leak what is no memory.
        recycle_memory_bytes: Replace a child that holds more when a batch is done, what a leak
            comes to in the end; by default its share (``memory_share``), 0 for never. A child
            whose class reserves memory may keep all of that instead.
        health_file: Rewritten every 2 s while the worker is well.
        name: Unique; made up by default.
    """

    broker_url: str
    keyring: Keyring
    home: Path
    store_url: str | None = None
    pool: str = DEFAULT_POOL
    slots: int | None = None
    capacity: Capacity | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    drain_timeout_s: float = 60.0
    recycle_calls: int = 0
    recycle_memory_bytes: int | None = None
    health_file: Path | None = None
    name: str = field(default_factory=lambda: f"{socket.gethostname()}-{secrets.token_hex(3)}")


class Worker:
    """A running factory. ``start``, then ``drain`` or ``stop``; lives in one loop.

    Raises:
        ConfigError: It should reserve more GPUs than there are.

    Example:
        >>> async def serve(settings: WorkerSettings) -> None:
        ...     worker = Worker(settings)
        ...     await worker.start()
        ...     await worker.drained.wait()
    """

    def __init__(self, settings: WorkerSettings, *, transport: Transport | None = None) -> None:
        self.settings = settings
        self.drained = asyncio.Event()
        self._started_at = time()
        self._gpus = GpuPool.detect()
        self._capacity = settings.capacity or detect_capacity(gpus=len(self._gpus))
        _check_gpus(self._capacity, len(self._gpus))
        self._transport = transport or self._connect()
        cache = NodeCache(settings.home / "cache", _CACHE_BYTES)
        store = open_store(settings.store_url) if settings.store_url else None
        self._spool_folder = SpoolFolder(settings.home / "spool", settings.name)
        self._outbox = Outbox(self._transport, settings.name)
        self._transport.on_reconnect = self._reconnected
        self._spool = Spool(store, cache, self._outbox)
        self._dispatcher = Dispatcher(self._outbox, self._spool)
        self._pool = self._dispatcher.pool = SlotPool(self._capacity, self._gpus, self._make_slot)
        self._intake = Intake(
            self._transport,
            settings.keyring,
            settings.pool,
            self._outbox,
            self._spool,
            self._dispatcher,
        )
        self._dispatcher.intake = self._intake
        self._leases = self._intake.leases = Leases(
            self._transport,
            settings.keyring,
            settings.name,
            outbox=self._outbox,
            dispatcher=self._dispatcher,
            hands=self._intake,
            facts=self._standing,
        )
        self._tombstones = Tombstones(
            self._transport, settings.keyring, settings.name, self._intake.cancel
        )
        self._bridge = Bridge(self._connect, settings.keyring, self._dispatcher.set_waiting)
        self._chores: set[asyncio.Task[None]] = set()
        self._leaving: asyncio.Task[None] | None = None
        self._draining = False
        self._started = False

    # ── life ─────────────────────────────────────────────────────────────────

    async def start(self) -> None:
        """Connect, start the slots, begin to take calls.

        Raises:
            BrokerUnavailable: No broker answered in time.
        """
        self._spool_folder.make()
        _log.info("worker.connecting", broker=mask_url(self.settings.broker_url))
        await self._transport.open()
        await self._bridge.start()
        await asyncio.gather(self._pool.start(self._default_slots()), self._listen())
        await self._tombstones.learn()
        await self._intake.add_class(DEFAULT_CLASS, with_suspects=True)
        await self._follow_classes()
        self._chore(self._leases.watch())
        self._chore(self._report_health())
        self._chore(self._keep_room_for_the_aged())
        self._started = True
        _log.info("worker.ready", **self._facts())
        self._warn_without_store()

    async def drain(self) -> None:
        """Take nothing more, hand back what has not started, finish what runs, then leave."""
        if self._draining:
            return
        self._draining = True
        _log.info("worker.draining", frames=self._intake.held)
        await self._intake.close()
        self._dispatcher.hand_back_all()
        await self._wait_until_empty(self.settings.drain_timeout_s)
        await self.stop()

    async def stop(self) -> None:
        """Leave now; what is not acked goes to another worker."""
        self._draining = True
        for chore in self._chores:
            chore.cancel()
        self._intake.stop()
        self._dispatcher.close()
        await self._pool.close(grace_s=1.0)
        self._leases.give_up()
        await self._bridge.close()
        await self._outbox.drain(timeout_s=5.0)
        await self._leases.say_goodbye()
        self._outbox.close()
        await self._transport.close()
        self._spool.close()
        self._spool_folder.remove()
        if self.settings.health_file is not None:
            self.settings.health_file.unlink(missing_ok=True)
        if self._started:
            _log.info("worker.stopped", worker=self.settings.name)
        self.drained.set()

    def kill_children(self) -> None:
        """End all children without a word, for a worker that must be gone at once."""
        for slot in self._pool.slots():
            slot.kill()

    async def _wait_until_empty(self, timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while self._held and loop.time() < deadline:
            await self._outbox.drain(timeout_s=1.0)
            await asyncio.sleep(0.02)
        if self._held:
            _log.warning("worker.drain_timeout", frames=self._held)

    @property
    def _held(self) -> int:
        return self._intake.held + self._leases.held

    def _warn_without_store(self) -> None:
        if self.settings.store_url is None:
            _log.warning(
                "worker.no_store",
                reason="functions by value (of scripts and notebooks) and values over 64 KiB will "
                "fail here: set FLAME_STORE_URL, the same on clients and workers",
            )

    # ── parts ────────────────────────────────────────────────────────────────

    def _connect(self) -> Transport:
        return open_transport(self.settings.broker_url, name=f"flame-worker {self.settings.name}")

    def _default_slots(self) -> int:
        if self.settings.slots is not None:
            return self.settings.slots
        return max(1, int(self._capacity.cpu))

    def _make_slot(self, number: int, request: ResourceRequirement, gpus: GpuShare | None) -> Slot:
        settings = SlotSettings(
            worker=self.settings.name,
            cache_dir=self.settings.home / "cache",
            spool_dir=self._spool_folder.path,
            memory_bytes=request.mem_bytes,
            gpus=gpus.ids if gpus is not None else (),
            recycle_after_calls=self.settings.recycle_calls,
            recycle_over_bytes=self._kept_bytes(request),
            environ=self._child_environ(),
        )
        return Slot(number, settings=settings, owner=self._dispatcher)

    def _kept_bytes(self, request: ResourceRequirement) -> int:
        """How much a child of a class may keep between two batches; 0 for any amount."""
        chosen = self.settings.recycle_memory_bytes
        if chosen is None:
            chosen = memory_share(self._capacity, self._default_slots())
        return request.mem_bytes or chosen if chosen else 0

    def _child_environ(self) -> dict[str, str]:
        """How a call that uses Flame itself finds this cluster, whatever the settings file says."""
        store = {"FLAME_STORE_URL": self.settings.store_url} if self.settings.store_url else {}
        return {**self._bridge.environ, **store, "FLAME_HOME": str(self.settings.home)}

    # ── control ──────────────────────────────────────────────────────────────

    async def _listen(self) -> None:
        if not self._transport.capabilities.fanout:
            _log.warning(
                "broker.no_fanout",
                broker=self._transport.server,
                reason="no remote output, remote cancel or `flame workers` with this broker",
            )
            return
        for key in self.settings.keyring:
            exchange = control_exchange(key.hex_id)
            await self._transport.declare_exchange(exchange, "fanout")
            await self._transport.declare_exchange(logs_exchange(key.hex_id), "topic")
            await self._transport.declare_exchange(beats_exchange(key.hex_id), "fanout")
            queue = control_queue(key.hex_id, self.settings.name)
            await self._transport.declare(queue)
            await self._transport.consume(
                queue.name, partial(self._on_control, exchange), prefetch=_CONTROL_PREFETCH
            )

    async def _follow_classes(self) -> None:
        if not self._transport.capabilities.streams:
            return  # clients refuse other classes than the default one there
        for key in self.settings.keyring:
            queue = classes_queue(key.hex_id, self.settings.pool)
            await self._transport.declare(queue)
            await self._transport.consume(
                queue.name, partial(self._on_control, queue.name), prefetch=_CONTROL_PREFETCH
            )

    def _on_control(self, source: str, delivery: Delivery) -> None:
        delivery.ack()
        try:
            ear = delivery.queue  # answers come to it straight
            frame, key = open_frame(delivery.body, self.settings.keyring, queue=source, also=(ear,))
        except FlameError as problem:
            _log.warning("control.refused", reason=str(problem))
            return
        act = self._verbs().get(frame.verb) if isinstance(frame, ControlFrame) else None
        if act is None:
            _log.warning("control.unknown", source=source)
        else:
            act(frame, key)  # type: ignore[arg-type]  # a ControlFrame, as checked above

    def _verbs(self) -> dict[str, Callable[[ControlFrame, Key], None]]:
        return {
            "hello": self._answer_hello,
            "cancel": self._cancel,
            "expire": self._expire,
            "class": self._learn_class,
            "drain": self._drain_if_named,
            "answer": self._tombstones.take,
            "leads": self._leases.take_leads,
            "leased": self._leases.take_answer,
            "reclaim": self._leases.take_reclaim,
        }

    def _answer_hello(self, frame: ControlFrame, key: Key) -> None:
        reply = str(frame.arguments.get("reply", ""))
        self._answer(ControlFrame(reply, "here", self._standing()), key)

    def _answer(self, frame: ControlFrame, key: Key) -> None:
        self._outbox.publish(frame.queue, encode(frame, key), lambda: None, otherwise=lambda: None)

    def _cancel(self, frame: ControlFrame, key: Key) -> None:
        self._intake.cancel(
            str(frame.arguments.get("client")),
            _counters(frame),
            spare_running=bool(frame.arguments.get("spare_running")),
        )

    def _reconnected(self) -> None:
        """We may have missed what was said meanwhile."""
        self._outbox.reconnected()
        self._leases.reconnected()
        self._chore(self._tombstones.learn())

    def _expire(self, frame: ControlFrame, key: Key) -> None:
        client, reply = (str(frame.arguments.get(name, "")) for name in ("client", "reply"))
        started = self._intake.expire(client, _counters(frame))
        if started:
            told: dict[str, Plain] = {"client": client, "counters": tuple(sorted(started))}
            self._answer(ControlFrame(reply, "running", told), key)

    def _learn_class(self, frame: ControlFrame, key: Key) -> None:
        name = str(frame.arguments.get("name"))
        if frame.arguments.get("pool", self.settings.pool) != self.settings.pool:
            return
        try:
            fits = self._pool.could_ever(name)
        except FlameError as problem:
            _log.warning("control.class_refused", reason=str(problem))
            return
        if fits and not self._draining and name not in self._intake.class_names:
            self._chore(self._consume_class(name))

    async def _consume_class(self, name: str) -> None:
        while True:
            try:
                await self._intake.add_class(name)
            except FlameError as problem:
                _log.warning("worker.class_failed", resource_class=name, reason=str(problem))
                await asyncio.sleep(_TRY_AGAIN_S)
            else:
                return

    def _drain_if_named(self, frame: ControlFrame, key: Key) -> None:
        if frame.arguments.get("worker") == self.settings.name and self._leaving is None:
            # No chore: stop() ends those, and the drain itself comes to stop().
            self._leaving = asyncio.ensure_future(self.drain())

    def _chore(self, work: Coroutine[None, None, None]) -> None:
        chore = asyncio.ensure_future(work)
        self._chores.add(chore)
        chore.add_done_callback(self._chores.discard)

    # ── chores ───────────────────────────────────────────────────────────────

    async def _report_health(self) -> None:
        path = self.settings.health_file
        while path is not None:
            temporary = path.with_suffix(".tmp")
            try:
                temporary.write_text(json.dumps({**self._facts(), "at": time()}))
                temporary.replace(path)
            except OSError as problem:  # the folder is missing, or the disk full: it may pass
                _log.warning("worker.health_file_failed", reason=str(problem))
            await asyncio.sleep(_HEALTH_EVERY_S)

    async def _keep_room_for_the_aged(self) -> None:
        """Calls that have waited long get room, or others would never leave them any (14)."""
        aging = Aging()
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            # A refill that failed with the connection has nobody else to ask for the next.
            self._intake.refill()
            try:
                waiting = {
                    name: self._pool.granted[name]
                    for name in self._intake.class_names
                    if self._dispatcher.waits(name) or await self._intake.backlog(name)
                }
            except FlameError as problem:
                _log.debug("worker.backlog_unknown", reason=str(problem))
            else:
                self._keep_room_for(aging.look(waiting, asyncio.get_running_loop().time()))

    def _keep_room_for(self, class_name: str | None) -> None:
        if class_name != self._pool.kept_for:
            self._pool.kept_for = class_name
            if class_name is not None:
                _log.info("worker.keeps_room", resource_class=class_name)
            self._dispatcher.pump()

    def _facts(self) -> dict[str, str | int | float | bool]:
        """What ``flame workers`` shows."""
        slots = list(self._pool.slots())
        return {
            "worker": self.settings.name,
            "pool": self.settings.pool,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "slots": len(slots),
            "busy": sum(bool(slot.batches) for slot in slots),
            "held": self._held,
            "gpus": len(self._gpus),
            "capacity": str(self._capacity),
            "python": platform.python_version(),
            "format": FORMAT_VERSION,
            "store": mask_url(self.settings.store_url or ""),
            "connected": self._transport.connected,
            "draining": self._draining,
            "started_at": self._started_at,
            "clock": time(),
            "labels": ",".join(f"{k}={v}" for k, v in self.settings.labels.items()),
            **{f"count_{name}": n for name, n in self._intake.counts.items()},
        }

    def _standing(self) -> dict[str, Plain]:
        """The same, and what runs."""
        now = asyncio.get_running_loop().time()
        return {**self._facts(), "running": running_calls(self._pool.slots(), now)}


def _counters(frame: ControlFrame) -> frozenset[int]:
    counters = frame.arguments.get("counters", ())
    numbers = counters if isinstance(counters, tuple) else ()
    return frozenset(number for number in numbers if isinstance(number, int))


def _check_gpus(capacity: Capacity, found: int) -> None:
    """Cards that are not there would be missed at each start of a slot, while its calls wait."""
    if capacity.gpu > found:
        raise ConfigError(
            f"gpu={capacity.gpu:g} is more than this worker can hand out (GPUs found: {found}): "
            "reserve fewer, or see that the driver and nvidia-ml-py are installed, and what "
            "CUDA_VISIBLE_DEVICES of the worker leaves out"
        )
