"""Redis: kombu's envelope, with queue declarations and consumers of our own.

A list that is empty does not exist in Redis, so what is declared stands in one hash, and bindings
in one hash for each exchange; every process sees them, which kombu's tables do not offer. Fanout
therefore reaches queues and not only those who listen at the moment. Streams are Redis streams.

Version 6.2 or newer. Whether data outlive Redis is a matter of its own configuration
(``appendonly``).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import cycle
from typing import Any, Final

import redis
from kombu.exceptions import KombuError

from flame_broker.errors import ConfigError
from flame_broker.portable.address import PortableAddress
from flame_broker.portable.link import Letter, Parcel, Receipt, Subscription
from flame_broker.portable.mailbox import Mailbox
from flame_broker.portable.redis_lists import RedisLists, Taken
from flame_broker.topics import binding_takes
from flame_broker.transport import Capabilities, QueueKind, QueueSpec, Unroutable

__all__ = ["RedisDialect", "RedisLink"]

_QUEUES: Final = "flame.queues"
_EXCHANGE: Final = "flame.exchange."
_KIND: Final = b""  # the field of an exchange's hash that is no queue
_MAX_MESSAGE_BYTES: Final = 16 * 1024 * 1024
_STREAM_MESSAGES: Final = 10_000
_WAIT_S: Final = 1.0  # how long Redis keeps a blocking read of a stream open
_EXCLUSIVE_VISIBILITIES: Final = 3  # an owner silent for so many visibility times is gone
_KOMBU_OPTIONS: Final = {
    "priority_steps": [0],  # one list for a queue: each priority of ours is a queue
    "socket_timeout": 10,
    "socket_connect_timeout": 5,
    "socket_keepalive": True,
}


class RedisDialect:
    """Redis at one or more hosts.

    URL options: ``visibility_s``, how long a message stays with a process that no longer says so
    (60 seconds; renewed three times as often).
    """

    product = "Redis"
    failures: tuple[type[Exception], ...] = (redis.RedisError, OSError, KombuError)
    capabilities = Capabilities(
        durable=False,
        confirms=True,
        dead_letters=False,
        redelivery=True,
        fanout=True,
        max_message_bytes=_MAX_MESSAGE_BYTES,
        streams=True,
        returns_in_order=True,
    )

    def __init__(self, url: str) -> None:
        self._address = PortableAddress.parse(url, ["visibility_s"])
        self.visibility_s = self._address.seconds("visibility_s", 60, minimum=1)
        self._hosts = cycle(self._address.urls)

    def connect(self) -> RedisLink:
        """Connect to the next host."""
        return RedisLink(next(self._hosts), self.visibility_s)

    def __str__(self) -> str:
        return self._address.masked


class RedisLink:
    """One connection to Redis, with the commands that kombu lacks beside it."""

    def __init__(self, url: str, visibility_s: float) -> None:
        self._visibility_s = visibility_s
        self._mailbox = Mailbox(url, _KOMBU_OPTIONS)
        self._client: Any = redis.Redis(connection_pool=self._mailbox.channel.pool)
        self._lists = RedisLists(self._client)
        self._subscription: Subscription | None = None
        self._stream = False
        self._run_id = self._server_run()

    def declare(self, spec: QueueSpec) -> None:
        """Write down a queue and its bindings; an expiring one is good for its time from now."""
        for exchange, _ in spec.bindings:
            if not self._client.hexists(_EXCHANGE + exchange, _KIND):
                raise ConfigError(f"queue {spec.name!r} is bound to {exchange!r}: not declared")
        with self._client.pipeline() as pipe:
            pipe.hset(_QUEUES, spec.name, self._entry(spec))
            for exchange in {exchange for exchange, _ in spec.bindings}:
                keys = [key for bound, key in spec.bindings if bound == exchange]
                pipe.hset(_EXCHANGE + exchange, spec.name, json.dumps(keys))
            pipe.execute()

    def _entry(self, spec: QueueSpec) -> str:
        expires_s = int(spec.arguments.get("x-expires", 0)) / 1000
        if spec.exclusive:
            expires_s = self._visibility_s * _EXCLUSIVE_VISIBILITIES
        return json.dumps(
            {
                "until": time.time() + expires_s if expires_s else 0,
                "limit": int(spec.arguments.get("x-max-length", 0)),
                "stream": spec.kind is QueueKind.STREAM,
                "exchanges": sorted({exchange for exchange, _ in spec.bindings}),
            }
        )

    def declare_exchange(self, name: str, kind: str) -> None:
        """Write down an exchange."""
        self._client.hset(_EXCHANGE + name, _KIND, kind)

    def delete(self, queue: str) -> None:
        """Remove a queue, its messages and its bindings."""
        entry = self._entries([queue]).get(queue, {})
        with self._client.pipeline() as pipe:
            pipe.hdel(_QUEUES, queue)
            pipe.delete(queue)
            for exchange in entry.get("exchanges", ()):
                pipe.hdel(_EXCHANGE + exchange, queue)
            pipe.execute()

    def depth(self, queue: str) -> int | None:
        """Messages ready in a queue, or None if it was not declared."""
        entry = self._entries([queue]).get(queue)
        if entry is None or _expired(entry):
            return None
        return int(self._client.xlen(queue) if entry["stream"] else self._client.llen(queue))

    def publish(self, letter: Letter) -> None:
        """Store a copy in every queue that the message goes to."""
        targets = self._route(letter.exchange, letter.key)
        if letter.mandatory and not targets:
            where = f"exchange {letter.exchange!r} with key {letter.key!r}"
            raise Unroutable(f"no queue takes what is sent to {where}")
        for queue, entry in targets.items():
            if entry["stream"]:
                self._append(queue, letter, entry["limit"] or _STREAM_MESSAGES)
            else:
                self._put(queue, letter, entry["limit"])

    def _route(self, exchange: str, key: str) -> dict[str, Mapping[str, Any]]:
        names = self._bound(exchange, key) if exchange else [key]
        entries = self._entries(names)
        return {name: entry for name, entry in entries.items() if not _expired(entry)}

    def _bound(self, exchange: str, key: str) -> list[str]:
        bound = self._client.hgetall(_EXCHANGE + exchange)
        kind = bound.pop(_KIND, b"").decode()
        return [
            queue.decode()
            for queue, patterns in bound.items()
            if any(binding_takes(kind, pattern, key) for pattern in json.loads(patterns))
        ]

    def _entries(self, names: list[str]) -> dict[str, Mapping[str, Any]]:
        found = self._client.hmget(_QUEUES, names) if names else []
        pairs = zip(names, found, strict=True)
        return {name: json.loads(entry) for name, entry in pairs if entry is not None}

    def _put(self, queue: str, letter: Letter, limit: int) -> None:
        self._mailbox.send(queue, letter.body, letter.headers)
        if limit:
            self._client.ltrim(queue, 0, limit - 1)

    def _append(self, stream: str, letter: Letter, limit: int) -> None:
        fields = {"body": letter.body, "headers": json.dumps(dict(letter.headers))}
        self._client.xadd(stream, fields, maxlen=limit, approximate=True)

    def subscribe(self, subscription: Subscription) -> None:
        """Read a list, or a stream from where the subscription stands."""
        queue = subscription.queue
        self._subscription = subscription
        self._stream = bool(self._entries([queue]).get(queue, {}).get("stream"))

    def receive(self, credit: int) -> None:
        """Wait a moment for what a list or a stream has."""
        assert self._subscription is not None
        queue = self._subscription.queue
        if self._stream:
            self._read_stream(queue, credit)
        else:
            for taken in self._lists.receive(queue, credit):
                self._subscription.on_parcel(self._parcel(queue, taken))

    def _parcel(self, queue: str, taken: Taken) -> Parcel:
        body, headers = self._mailbox.open(taken.envelope)
        return Parcel(queue, body, headers, taken.redelivered, Receipt(queue, taken.tag))

    def _read_stream(self, queue: str, credit: int) -> None:
        assert self._subscription is not None
        after = {queue: self._subscription.position or "0"}
        read = self._client.xread(after, count=credit, block=int(_WAIT_S * 1000))
        for entry_id, fields in read[0][1] if read else ():
            self._subscription.position = entry_id.decode()
            headers = json.loads(fields[b"headers"])
            parcel = Parcel(queue, fields[b"body"], headers, False, Receipt(queue, ""))
            self._subscription.on_parcel(parcel)

    def ack(self, receipt: Receipt) -> None:
        """Forget a message in hand; a stream's stays."""
        if receipt.tag:
            self._lists.ack(receipt.tag)

    def hold(self, receipts: Iterable[Receipt]) -> None:
        """Start the visibility time of messages in hand anew."""
        self._lists.hold([receipt.tag for receipt in receipts if receipt.tag])

    def give_back(self, receipts: Iterable[Receipt]) -> None:
        """Put messages in hand back into their lists."""
        self._lists.give_back(receipt.tag for receipt in receipts if receipt.tag)

    def tidy(self) -> None:
        """Restore what dead consumers held, and delete queues whose owner is gone.

        Raises:
            redis.ConnectionError: The server was restarted since this link was made. redis-py
                connects again without a word, but what was declared may be gone.
        """
        if self._server_run() != self._run_id:
            raise redis.ConnectionError("the server was restarted")
        self._lists.restore(self._visibility_s)
        for name, entry in self._client.hgetall(_QUEUES).items():
            if _expired(json.loads(entry)):
                self.delete(name.decode())

    def _server_run(self) -> str:
        return str(self._client.info("server")["run_id"])

    def close(self) -> None:
        """Disconnect. Where the server was gone already, there is nothing to be done."""
        with suppress(*RedisDialect.failures):
            self._lists.close()
        with suppress(*RedisDialect.failures):
            self._mailbox.close()


def _expired(entry: Mapping[str, Any]) -> bool:
    return bool(entry["until"]) and entry["until"] < time.time()
