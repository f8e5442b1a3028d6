"""Messages that nobody honest sends; Hypothesis throws the dice, alike for the same seed.

Each method of ``Forger`` makes a message body of one kind out of an honest frame. The frame's
arguments are a pickle that leaves a mark on the disk where it is loaded, so that a test sees any
unpickling.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, Final

import pika
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from flame_broker.codec import encode_arguments
from flame_broker.connect import open_transport
from flame_broker.frames import FORMAT_VERSION, MAX_FRAME_BYTES, encode
from flame_broker.keys import Key
from flame_broker.messages import Call, CallFrame, CallSpec, Target
from flame_broker.signing import SIGNATURE_BYTES, sign
from flame_broker.transport import Delivery
from lab.inbox import Inbox

__all__ = ["Forger", "Mark", "collect", "draw", "huge_bodies", "publish", "publish_raw"]

_BATCH: Final = 100  # bodies an example: examples cost more than what is in them
_IN_FLIGHT: Final = 1000
_CLAIMS: Final = [b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9"]  # "4 bytes of length follow"
_PREFIX_BYTES: Final = 8
_BODY_AT: Final = _PREFIX_BYTES + SIGNATURE_BYTES


class Mark:
    """Makes a folder wherever it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (str(self.folder), 0o777, True)


class Forger:
    """Makes hostile bodies for one queue.

    Args:
        key: The key of the cluster, to imitate it.
        queue: Where the bodies are meant to go.
        mark: Appears if one of them is unpickled.
    """

    def __init__(self, key: Key, queue: str, mark: Path) -> None:
        self.key = key
        self.queue = queue
        self._mark = Mark(mark)
        self.body = self.honest(queue)
        self._prefix, self._payload = self.body[:_PREFIX_BYTES], self.body[_BODY_AT:]

    def honest(self, queue: str, *, key: Key | None = None, counter: int = 1) -> bytes:
        """A frame as a client makes it, with the marking arguments."""
        arguments = encode_arguments((self._mark,), {}).join()
        spec = CallSpec(Target("builtins:repr"), label="repr")
        frame = CallFrame(queue, "nobody", "hostile", spec, (Call(counter, arguments),))
        return encode(frame, key or self.key)

    def unsigned(self, dice: Random) -> bytes:
        """A pickle, a bare payload, or a frame with noise where the signature belongs."""
        noise = dice.randbytes(SIGNATURE_BYTES)
        bare = dice.choice([pickle.dumps(self._mark), self._payload, self._prefix])
        return dice.choice([bare + noise, self._prefix + noise + self._payload])

    def wrongly_signed(self, dice: Random) -> bytes:
        """A flipped bit, another secret under our key's name, or a frame of another queue."""
        make = dice.choice([self._flipped, self._impersonated, self._misdirected])
        return make(dice)

    def truncated(self, dice: Random) -> bytes:
        """The beginning of an honest frame."""
        return self.varied(dice)[: dice.randrange(len(self.body))]

    def oversized(self, dice: Random) -> bytes:
        """Signed with the right key, and claiming to hold gigabytes."""
        kept = self._payload[: dice.randrange(1, len(self._payload) - 6)]
        return self._signed(kept + dice.choice(_CLAIMS) + dice.randbytes(4))

    def newer(self, dice: Random) -> bytes:
        """Of a later format, well signed or not."""
        version = dice.randrange(FORMAT_VERSION + 1, 256)
        body = self._signed(dice.choice([self._payload, b""]) + dice.randbytes(16), version)
        return dice.choice([body, body[:_BODY_AT] + dice.randbytes(40)])

    def unknown_key(self, dice: Random) -> bytes:
        """Well signed by somebody else."""
        return self.honest(self.queue, key=Key(dice.randbytes(40)))

    def noise(self, dice: Random) -> bytes:
        """Any bytes, bare or behind a good header."""
        bare = dice.randbytes(dice.choice([0, 1, 8, 40, 41, dice.randrange(400)]))
        return dice.choice([bare, self._prefix + bare])

    def varied(self, dice: Random) -> bytes:
        """An honest frame that is never the same twice."""
        return self.honest(self.queue, counter=dice.getrandbits(32))

    def _flipped(self, dice: Random) -> bytes:
        changed = bytearray(self.body)
        for _ in range(dice.choice([1, 1, 2, 20])):
            changed[dice.randrange(_PREFIX_BYTES, len(changed))] ^= dice.randrange(1, 256)
        return bytes(changed)

    def _impersonated(self, dice: Random) -> bytes:
        signature = sign(Key(dice.randbytes(32)), self._prefix, self._payload)
        return self._prefix + signature + self._payload

    def _misdirected(self, dice: Random) -> bytes:
        return self.honest(f"{self.queue}{dice.getrandbits(32):x}")

    def _signed(self, payload: bytes, version: int = FORMAT_VERSION) -> bytes:
        prefix = self.body[:3] + bytes([version]) + self.key.id
        return prefix + sign(self.key, prefix, payload) + payload


def huge_bodies() -> list[bytes]:
    """A few bodies over the limit, by a byte and by much; the last is over our transport's too."""
    sizes = [MAX_FRAME_BYTES + 1] * 4 + [4 * MAX_FRAME_BYTES, 6 * MAX_FRAME_BYTES]
    return [secrets.token_bytes(64) + bytes(size - 64) for size in sizes]


def publish_raw(url: str, queue: str, bodies: Sequence[bytes]) -> None:
    """Publish as somebody else's program would, who does not keep to our limits."""
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    channel.confirm_delivery()
    for body in bodies:
        channel.basic_publish("", queue, body, mandatory=True)
    connection.close()


def draw(make: Callable[[Random], bytes], count: int, number: int) -> list[bytes]:
    """So many bodies; the same ones for the same number."""
    found: list[bytes] = []

    @seed(number)
    @settings(
        max_examples=2 + 2 * count // _BATCH,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**64 - 1).map(Random))
    def gather(dice: Random) -> None:
        if len(found) < count:
            found.extend(make(dice) for _ in range(_BATCH))

    gather()
    assert len(found) >= count, f"only {len(found)} of {count} bodies; seed {number}"
    return found[:count]


def publish(url: str, queue: str, bodies: Sequence[bytes], *, exchange: str = "") -> None:
    """Publish and have them confirmed, many at a time."""
    asyncio.run(_publish(url, queue, bodies, exchange))


async def _publish(url: str, queue: str, bodies: Sequence[bytes], exchange: str) -> None:
    transport = open_transport(url, name="hostile")
    await transport.open()
    try:
        for at in range(0, len(bodies), _IN_FLIGHT):
            part = bodies[at : at + _IN_FLIGHT]
            await asyncio.gather(
                *(transport.publish(queue, body, exchange=exchange) for body in part)
            )
    finally:
        await transport.close()


def collect(url: str, queue: str, count: int) -> list[Delivery]:
    """Take so many messages off a queue."""
    return asyncio.run(_collect(url, queue, count))


async def _collect(url: str, queue: str, count: int) -> list[Delivery]:
    transport = open_transport(url, name="collector")
    await transport.open()
    try:
        inbox = Inbox()
        await transport.consume(queue, inbox, prefetch=500)
        await inbox.until(count, 60)
        return inbox.deliveries
    finally:
        await transport.close()
