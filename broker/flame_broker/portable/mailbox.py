"""The part of kombu that all its brokers share: envelopes into and out of queues."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from uuid import uuid4

from kombu.connection import Connection
from kombu.transport import virtual

__all__ = ["Mailbox"]


class Mailbox:
    """One kombu connection with one channel.

    Args:
        url: One broker; kombu's own way to read it.
        options: kombu's transport options.
    """

    def __init__(self, url: str, options: Mapping[str, object]) -> None:
        connection: Any = Connection
        # The transport itself connects once; `Connection.connect` would wait 2 s and try again.
        self._transport: Any = connection(url, transport_options=dict(options)).transport
        self._connection = self._transport.establish_connection()
        self.channel: Any = self._transport.create_channel(self._connection)

    def send(self, queue: str, body: bytes, headers: Mapping[str, str | int]) -> None:
        """Put a message into a queue.

        It goes by the nameless exchange: kombu restores a message by the route it came, so a copy
        sent through an exchange would come back as many.
        """
        message = self.channel.prepare_message(body, headers=dict(headers))
        self.channel.basic_publish(message, exchange="", routing_key=queue)

    def open(self, envelope: Mapping[str, Any]) -> tuple[bytes, Mapping[str, object]]:
        """Body and headers of a message that was received by other means."""
        message = self.channel.Message(envelope, channel=self.channel)
        return bytes(message.body or b""), message.headers

    def listen(self, queue: str, on_message: Callable[[Any], None]) -> None:
        """Have ``receive`` call back with kombu's messages."""
        forget: Any = virtual.QoS.ack

        def receive(message: Any) -> None:
            # kombu forgets the message here (the broker does not): what is in hand is our own
            # account, so that it survives this connection.
            forget(self.channel.qos, message.delivery_tag)
            on_message(message)

        self.channel.basic_consume(queue, False, receive, uuid4().hex)

    def receive(self, *, credit: int, timeout_s: float) -> None:
        """Wait for messages, and call back for what comes."""
        self.channel.basic_qos(0, credit, False)
        try:
            self._transport.drain_events(self._connection, timeout=timeout_s)
        except TimeoutError:
            return

    def close(self) -> None:
        """Disconnect; what a request under way brings is still received."""
        self._transport.close_connection(self._connection)
