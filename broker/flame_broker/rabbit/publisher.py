"""Messages on their way out: sent at once, confirmed later, sent again after a lost connection."""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Final

from pika import exceptions, spec

from flame_broker.errors import BrokerUnavailable, ConfigError, FlameError, PayloadTooLarge
from flame_broker.logs import get_logger
from flame_broker.rabbit.channel import ChannelRefused, RabbitChannel
from flame_broker.rabbit.connection import Connection
from flame_broker.transport import Unroutable

__all__ = ["MAX_MESSAGE_BYTES", "Publisher"]

MAX_MESSAGE_BYTES: Final = 16 * 1024 * 1024
"""RabbitMQ 4's default ``max_message_size`` (3.x: 128 MiB)."""

_PERSISTENT: Final = spec.BasicProperties(delivery_mode=2)
_TRANSIENT: Final = spec.BasicProperties(delivery_mode=1)
_NACK_PAUSE_S: Final = 0.25
_RENEW_AT: Final = frozenset({12, 48, 192, 768})
"""After so many refusals of one message, 3 s to 3 min, a new channel is tried.

Seen on 3.10: a channel opened while a quorum queue elects its leader, since a node was killed, may
have all that it sends there refused for ever, and the same message goes through on another one.
"""

_NEVER: Final = float("inf")
_ACCESS_REFUSED: Final = 403
_NOT_FOUND: Final = 404
_REFUSED_EXCHANGE: Final = re.compile(r"exchange '([^']*)'")
_REFUSED_SIZE: Final = re.compile(r"message size (\d+)")

_log = get_logger("flame.broker")


@dataclass(slots=True, eq=False)
class _Message:
    future: asyncio.Future[None]
    exchange: str
    routing_key: str
    body: bytes
    properties: spec.BasicProperties
    mandatory: bool
    deadline: float
    refusals: int = 0

    def fail(self, error: FlameError) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class Publisher:
    """The publishing half of a transport.

    A message is in one of two places: ``_waiting`` (nothing to send it on, or the broker blocks
    publishers) or ``_sent`` (on the wire, by delivery tag). Its future is done when it leaves both.

    Args:
        trouble: Says what keeps the broker away, for error messages.
        on_refused: Called when the broker closed the channel: it must be restored.
    """

    def __init__(self, *, trouble: Callable[[], str], on_refused: Callable[[], None]) -> None:
        self._trouble = trouble
        self._on_refused = on_refused
        self._channel: RabbitChannel | None = None
        self._flowing = False
        self._waiting: deque[_Message] = deque()
        self._sent: OrderedDict[int, _Message] = OrderedDict()
        self._tag = 0
        self._blocked_since: float | None = None
        self._blocked_s = 0.0  # how long the deadline clock has stood still, all told
        self._sweep_at = _NEVER
        self._sweeper: asyncio.TimerHandle | None = None
        self._retrier: asyncio.TimerHandle | None = None
        self._drained: asyncio.Future[None] | None = None
        self._closed = False

    def publish(
        self,
        routing_key: str,
        body: bytes,
        *,
        exchange: str,
        headers: Mapping[str, str | int] | None,
        mandatory: bool,
        persistent: bool,
        deadline_s: float,
    ) -> asyncio.Future[None]:
        """Send a message now or as soon as there is a connection; see ``Transport.publish``."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        if headers:
            properties = spec.BasicProperties(
                headers=dict(headers), delivery_mode=2 if persistent else 1
            )
        else:
            properties = _PERSISTENT if persistent else _TRANSIENT
        deadline = self._clock(loop) + deadline_s
        message = _Message(future, exchange, routing_key, body, properties, mandatory, deadline)
        if len(body) > MAX_MESSAGE_BYTES:
            message.fail(_too_large(len(body), MAX_MESSAGE_BYTES))
        elif self._closed:
            message.fail(BrokerUnavailable("the transport is closed"))
        else:
            if self._flowing:
                self._send(message)
            else:
                self._waiting.append(message)
            if deadline < self._sweep_at:
                self._sweep_by(loop, deadline)
        return future

    async def restore(self, connection: Connection) -> None:
        """Open a channel in confirm mode on a new connection; nothing is sent before ``resume``."""
        channel = await RabbitChannel.open(connection)
        await channel.call(channel.raw.confirm_delivery, partial(self._on_confirm, channel))
        channel.on_refused = self._on_channel_refused
        channel.raw.add_on_return_callback(self._on_return)
        connection.raw.add_on_connection_blocked_callback(self._on_blocked)
        connection.raw.add_on_connection_unblocked_callback(self._on_unblocked)
        self._channel = channel

    def resume(self) -> None:
        """Send what has waited, the oldest first."""
        self._flowing = self._channel is not None and self._blocked_since is None
        while self._flowing and self._waiting:
            message = self._waiting.popleft()
            if not message.future.done():
                self._send(message)

    def suspend(self) -> None:
        """Stop sending: the connection is gone. What it took unconfirmed goes out again."""
        self._flowing = False
        self._channel = None
        self._on_unblocked()
        self._waiting.extendleft(reversed(self._sent.values()))
        self._sent.clear()
        self._tag = 0

    async def drain(self, timeout_s: float) -> None:
        """Wait until nothing is outstanding, the time is up, or for nothing: the broker blocks."""
        if not (self._sent or self._waiting) or self._blocked_since is not None:
            return
        self._drained = asyncio.get_running_loop().create_future()
        await asyncio.wait({self._drained}, timeout=timeout_s)

    def close(self) -> None:
        """Fail what is still outstanding, and take no more."""
        self._closed = True
        self._flowing = False
        for message in chain(self._sent.values(), self._waiting):
            message.fail(BrokerUnavailable("the transport was closed before the broker confirmed"))
        self._sent.clear()
        self._waiting.clear()
        for timer in (self._sweeper, self._retrier):
            if timer is not None:
                timer.cancel()

    def _send(self, message: _Message) -> None:
        assert self._channel is not None
        try:
            self._channel.raw.basic_publish(
                message.exchange,
                message.routing_key,
                message.body,
                message.properties,
                message.mandatory,
            )
        except (exceptions.ChannelWrongStateError, exceptions.ConnectionWrongStateError):
            self._flowing = False  # it is going down; suspend() follows
            self._waiting.append(message)
        except (exceptions.AMQPError, UnicodeError) as exc:  # a name that AMQP cannot carry
            message.fail(ConfigError(f"cannot send to {message.routing_key!r}: {exc!r}"))
        else:
            self._tag += 1
            self._sent[self._tag] = message

    def _on_confirm(self, channel: RabbitChannel, frame: Any) -> None:
        if channel is not self._channel:
            return  # given up: its tags are those of other messages now
        method = frame.method
        acked = type(method) is spec.Basic.Ack
        tag = method.delivery_tag
        if not method.multiple:
            self._conclude(self._sent.pop(tag, None), acked)
        else:
            sent = self._sent
            while sent and next(iter(sent)) <= tag:
                self._conclude(sent.popitem(last=False)[1], acked)
        if self._drained is not None and not (self._sent or self._waiting):
            self._drained.set_result(None)
            self._drained = None

    def _conclude(self, message: _Message | None, acked: bool) -> None:
        if message is None or message.future.done():
            return
        if acked:
            message.future.set_result(None)
        else:
            self._waiting.append(message)  # a full queue or a failed node: try until its deadline
            message.refusals += 1
            if self._retrier is None:
                loop = asyncio.get_running_loop()
                self._retrier = loop.call_later(_NACK_PAUSE_S, self._retry)

    def _retry(self) -> None:
        self._retrier = None
        if not self._flowing:
            return
        if any(message.refusals in _RENEW_AT for message in self._waiting):
            self._renew()
        else:
            self.resume()

    def _renew(self) -> None:
        """Send everything again on a new channel."""
        channel = self._channel
        _log.warning("publish_refused", reason=f"{len(self._waiting)} messages, again and again")
        self.suspend()
        if channel is not None and channel.is_open:
            channel.raw.close()
        self._on_refused()

    def _on_return(self, _channel: object, method: Any, _properties: object, body: bytes) -> None:
        """Fail the oldest message that looks like this one: their confirms come later, in bulk."""
        for message in self._sent.values():
            if (
                message.body == body
                and message.routing_key == method.routing_key
                and message.exchange == method.exchange
                and not message.future.done()
            ):
                where = method.exchange or "the default exchange"
                message.fail(Unroutable(f"no queue for {method.routing_key!r} at {where}"))
                return

    def _on_channel_refused(self, error: ChannelRefused) -> None:
        """The broker closed the channel for one message: find it, so that the rest can go on."""
        _log.warning("publish_refused", reason=str(error))
        exchange = _REFUSED_EXCHANGE.search(str(error))
        size = _REFUSED_SIZE.search(str(error))
        for message in self._sent.values():
            if size and len(message.body) >= int(size[1]):
                message.fail(PayloadTooLarge(str(error)))
            elif exchange and error.code == _NOT_FOUND and message.exchange == exchange[1]:
                message.fail(Unroutable(str(error)))
            elif exchange and error.code == _ACCESS_REFUSED and message.exchange == exchange[1]:
                message.fail(ConfigError(str(error)))
        self._on_refused()

    def _on_blocked(self, *_: object) -> None:
        """Keep messages here while the broker is out of memory or disk; the clock stands still."""
        loop = asyncio.get_running_loop()
        if self._blocked_since is None:
            self._blocked_since = loop.time()
            self._flowing = False
            _log.warning("broker_blocks_publishers")

    def _on_unblocked(self, *_: object) -> None:
        if self._blocked_since is None:
            return
        loop = asyncio.get_running_loop()
        self._blocked_s += loop.time() - self._blocked_since
        self._blocked_since = None
        self._sweep(loop)
        self.resume()

    def _clock(self, loop: asyncio.AbstractEventLoop) -> float:
        """Seconds by the deadline clock, which stands still while the broker blocks us."""
        now = loop.time() if self._blocked_since is None else self._blocked_since
        return now - self._blocked_s

    def _sweep_by(self, loop: asyncio.AbstractEventLoop, deadline: float) -> None:
        """Set the one timer that watches all deadlines."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._sweep_at = deadline
        delay_s = max(0.0, deadline - self._clock(loop))
        self._sweeper = loop.call_later(delay_s, self._sweep, loop)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        """Fail what is past its deadline; set the timer for the next one."""
        self._sweep_at = _NEVER
        if self._blocked_since is not None:
            return  # the end of the alarm sets it again
        now = self._clock(loop)
        for message in chain(self._sent.values(), self._waiting):
            if message.deadline <= now:
                message.fail(
                    BrokerUnavailable(f"no confirm within the deadline: {self._trouble()}")
                )
        self._waiting = deque(m for m in self._waiting if not m.future.done())
        alive = (m for m in chain(self._sent.values(), self._waiting) if not m.future.done())
        earliest = min((message.deadline for message in alive), default=_NEVER)
        if earliest < _NEVER:
            self._sweep_by(loop, earliest)


def _too_large(size: int, limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"a message of {size} bytes is over the broker's limit of {limit} bytes")
