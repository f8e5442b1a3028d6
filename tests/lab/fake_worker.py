"""A worker for tests of the client: in this process, over the in-process transport, no children.

It verifies, decodes and runs calls one after another in its own thread, so client tests need
neither a broker nor processes. It can hold calls back, answer twice, and say what it has seen.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import threading
import time
from collections.abc import Callable, Coroutine
from types import GeneratorType
from typing import Any

from flame_broker.codec import Encoded, decode_arguments, decode_value, encode_value
from flame_broker.connect import open_transport
from flame_broker.errors import CallCancelled, CallExpired
from flame_broker.frames import decode, encode
from flame_broker.keys import Keyring
from flame_broker.messages import (
    INLINE_BYTES,
    Call,
    CallFrame,
    ControlFrame,
    Event,
    EventFrame,
    EventKind,
    Priority,
    Result,
    ResultFrame,
    Status,
    Target,
)
from flame_broker.objects import ObjectRef
from flame_broker.outcomes import encode_error, encode_failure
from flame_broker.store import Store
from flame_broker.topology import (
    calls_queue,
    control_exchange,
    control_queue,
    logs_exchange,
)
from flame_broker.transport import Delivery, Transport, Unroutable

__all__ = ["FakeWorker"]


class FakeWorker:
    """Consumes the queues of one resource class until it is closed.

    Args:
        url: A ``memory://`` URL.
        key_text: The client's key.
        store: Where large values and targets lie.
        resources: The resource class.

    Attributes:
        frames: Every frame of calls it has received.
        cancelled: The counters of all cancel messages.
        expired: The counters that it was asked about because their queue timeout is over.
        running: The counters that it then says it has started.
        hellos: How often somebody asked who is there.
        repeat: How often each result is sent.
    """

    def __init__(self, url: str, key_text: str, store: Store, resources: str = "c1") -> None:
        self.frames: list[CallFrame] = []
        self.cancelled: list[int] = []
        self.expired: list[int] = []
        self.running: set[int] = set()
        self.hellos = 0
        self.repeat = 1
        self.url, self.key_text, self._store = url, key_text, store
        self.keyring = Keyring.parse(key_text)
        self._resources = resources
        self._key = self.keyring.signer
        self._targets: dict[Target, Callable[..., Any]] = {}
        self._open = threading.Event()
        self._open.set()
        self._held: list[CallFrame] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.transport: Transport = open_transport(url, name="fake worker")

    def start(self) -> FakeWorker:
        """Begin to consume."""
        self._thread.start()
        self.run(self._start())
        return self

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run something in the worker's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    def hold(self) -> None:
        """Receive calls but do not run them."""
        self._open.clear()

    def release(self) -> None:
        """Run what was held and what comes."""

        async def go() -> None:
            self._open.set()
            held, self._held = self._held, []
            for frame in held:
                self._run_frame(frame)

        self.run(go())

    def close(self) -> None:
        """Leave."""
        self.run(self.transport.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def send(self, frame: Any, routing_key: str, exchange: str = "", body: bytes = b"") -> None:
        """Publish any frame, or any bytes."""

        async def go() -> None:
            await self.transport.publish(
                routing_key, body or encode(frame, self._key), exchange=exchange, mandatory=False
            )

        self.run(go())

    async def _start(self) -> None:
        key = self._key.hex_id
        await self.transport.open()
        await self.transport.declare_exchange(control_exchange(key), "fanout")
        await self.transport.declare_exchange(logs_exchange(key), "topic")
        ear = control_queue(key, "fake")
        await self.transport.declare(ear)
        await self.transport.consume(ear.name, self._on_control, prefetch=0)
        for priority in Priority:
            queue = calls_queue(key, "default", self._resources, priority)
            await self.transport.declare(queue)
            await self.transport.consume(queue.name, self._on_calls, prefetch=0)

    def _on_control(self, delivery: Delivery) -> None:
        frame = decode(delivery.body, self.keyring)
        assert isinstance(frame, ControlFrame)
        if frame.verb == "cancel":
            counters: Any = frame.arguments["counters"]
            self.cancelled.extend(counters)
            self._give_up({*counters})
        if frame.verb == "expire":
            self._answer_expire(frame)
        if frame.verb == "hello":
            self.hellos += 1
            reply = str(frame.arguments["reply"])
            here = ControlFrame(reply, "here", {"worker": "fake", "pool": "default"})
            self.transport.publish(reply, encode(here, self._key))
        delivery.ack()

    def _answer_expire(self, frame: ControlFrame) -> None:
        counters: Any = frame.arguments["counters"]
        self.expired.extend(counters)
        reply, started = str(frame.arguments["reply"]), self.running.intersection(counters)
        if started:
            running = ControlFrame(reply, "running", {"counters": tuple(started)})
            self.transport.publish(reply, encode(running, self._key))

    def _give_up(self, counters: set[int]) -> None:
        for frame in self._held:
            for call in frame.calls:
                if call.counter in counters:
                    payload = encode_failure(CallCancelled, "cancelled before it started")
                    self._answer(frame, [Result(call.counter, Status.FAILED, payload)])

    def _answer(self, frame: CallFrame, results: list[Result]) -> None:
        reply = ResultFrame(frame.reply, frame.client, "fake", tuple(results))
        sent = self.transport.publish(frame.reply, encode(reply, self._key))
        sent.add_done_callback(_ignore_unroutable)

    def _on_calls(self, delivery: Delivery) -> None:
        frame = decode(delivery.body, self.keyring, queue=delivery.queue)
        assert isinstance(frame, CallFrame)
        self.frames.append(frame)
        if self._open.is_set():
            self._run_frame(frame)
        else:
            self._held.append(frame)
        delivery.ack()

    def _run_frame(self, frame: CallFrame) -> None:
        results: list[Result] = []
        for call in frame.calls:
            if call.counter in self.cancelled:
                continue
            results.extend(self._run_call(frame, call))
        for _ in range(self.repeat):
            self._answer(frame, results)

    def _run_call(self, frame: CallFrame, call: Call) -> list[Result]:
        if frame.expires_at and time.time() >= frame.expires_at:
            return [Result(call.counter, Status.FAILED, encode_failure(CallExpired, "too late"))]
        try:
            value = self._target(frame.spec.target)(*self._arguments(call)[0], **self._kwargs)
            if isinstance(value, GeneratorType):
                items = [self._result(call, item, Status.ITEM, n) for n, item in enumerate(value)]
                return [*items, self._result(call, None if items else [], Status.OK, len(items))]
            return [self._result(call, value, Status.OK, 0)]
        except Exception as exc:  # noqa: BLE001  # the target may raise anything
            return [Result(call.counter, Status.ERROR, encode_error(exc))]

    def _arguments(self, call: Call) -> tuple[Any, Any]:
        payload = call.payload or self._store.get(call.refs[0].key)
        args, self._kwargs = decode_arguments(payload, load_ref=self._load)
        return args, self._kwargs

    def _load(self, ref: ObjectRef) -> Any:
        return decode_value(self._store.get(ref.key))

    def _result(self, call: Call, value: Any, status: Status, index: int) -> Result:
        encoded = encode_value(value)
        if encoded.nbytes <= INLINE_BYTES:
            return Result(call.counter, status, encoded.join(), None, index)
        return Result(call.counter, status, b"", self._put(encoded), index)

    def _put(self, encoded: Encoded) -> ObjectRef:
        payload = encoded.join()
        digest = hashlib.sha256(payload).hexdigest()
        self._store.put(f"objects/{digest}", payload)
        return ObjectRef(f"objects/{digest}", len(payload), digest)

    def _target(self, target: Target) -> Callable[..., Any]:
        if target not in self._targets:
            if target.sha256:
                found = decode_value(self._store.get(f"targets/{target.sha256}"))
            else:
                module, _, qualname = target.name.partition(":")
                found = importlib.import_module(module)
                for part in qualname.split("."):
                    found = getattr(found, part)
            self._targets[target] = found
        return self._targets[target]

    def say(self, frame: CallFrame, kind: EventKind, text: str, fraction: float = 0.0) -> None:
        """Send output or progress of the first call of a frame."""
        exchange = logs_exchange(self._key.hex_id)
        event = Event(frame.calls[0].counter, kind, text, fraction)
        said = EventFrame(exchange, frame.client, "fake", frame.spec.label, (event,))
        self.send(said, frame.client, exchange)


def _ignore_unroutable(sent: asyncio.Future[None]) -> None:
    exc = sent.exception()
    if exc is not None and not isinstance(exc, Unroutable):
        raise exc
