"""A bare AMQP echo: the least that any call over a quorum queue with confirms can cost.

No futures, no codec, no signature, no child process: a client publishes persistent messages with
publisher confirms into a quorum queue; a server process sends each body back to the client's
durable reply queue, confirmed too, and then acks.

The server is this module as a program: `python -m systems.amqp_echo URL`.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

import pika
from pika.adapters.asyncio_connection import AsyncioConnection
from pika.channel import Channel

import targets
from system import RABBITMQ_LIMIT_BYTES, Lab, System, Target, Unsupported

CALLS, REPLIES = "bench.echo.calls", "bench.echo.replies"
QUORUM = {"x-queue-type": "quorum"}
PERSISTENT = pika.BasicProperties(delivery_mode=2)
PREFETCH = 2_000
WINDOW = 2_000

OnMessage = Callable[[Channel, Any, Any, bytes], None]


async def open_channel(url: str) -> Channel:
    """Connect and open a channel with both queues declared."""
    loop = asyncio.get_running_loop()
    opened: asyncio.Future[Channel] = loop.create_future()

    def declare(channel: Channel) -> None:
        channel.basic_qos(prefetch_count=PREFETCH)
        channel.queue_declare(CALLS, durable=True, arguments=QUORUM, callback=lambda _: None)
        channel.queue_declare(REPLIES, durable=True, callback=lambda _: opened.set_result(channel))

    AsyncioConnection(
        pika.URLParameters(url),
        on_open_callback=lambda connection: connection.channel(on_open_callback=declare),
        on_open_error_callback=lambda _, error: opened.set_exception(error),
        custom_ioloop=loop,
    )
    return await opened


async def confirm_and_consume(
    channel: Channel, queue: str, on_confirm: Callable[[Any], None], on_message: OnMessage
) -> None:
    """Switch confirms on and consume; return when the broker has agreed to both."""
    ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    channel.confirm_delivery(on_confirm)
    channel.basic_consume(queue, on_message, callback=ready.set_result)
    await ready


async def serve(url: str) -> None:
    """Echo for ever."""
    channel = await open_channel(url)

    def answer(channel: Channel, method: Any, properties: Any, body: bytes) -> None:
        channel.basic_publish("", REPLIES, body, PERSISTENT)
        channel.basic_ack(method.delivery_tag)

    await confirm_and_consume(channel, CALLS, lambda frame: None, answer)
    print("ready", flush=True)
    await asyncio.Event().wait()


class Traffic:
    """The client's side: what it has sent, what is confirmed, what has come back."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.sent = self.confirmed = 0
        self.replies: list[bytes] = []
        self.wanted = 0
        self.done: asyncio.Future[None] | None = None
        self.backlog: list[bytes] = []

    def on_confirm(self, frame: Any) -> None:
        """Note a confirm, which may stand for several."""
        self.confirmed = frame.method.delivery_tag
        self.finish()

    def on_reply(self, channel: Channel, method: Any, properties: Any, body: bytes) -> None:
        """Keep a reply, and send what waits for room."""
        channel.basic_ack(method.delivery_tag)
        self.replies.append(body)
        if self.backlog:
            self.publish(self.backlog.pop())
        elif len(self.replies) == self.wanted:
            self.finish()

    def publish(self, body: bytes) -> None:
        """Send one message."""
        self.channel.basic_publish("", CALLS, body, PERSISTENT, mandatory=True)
        self.sent += 1

    def finish(self) -> None:
        """Wake the waiter once everything has come back and is confirmed."""
        complete = len(self.replies) == self.wanted and self.confirmed >= self.sent
        if complete and self.done is not None and not self.done.done():
            self.done.set_result(None)

    async def exchange(self, bodies: list[bytes]) -> list[bytes]:
        """Send all bodies, at most `WINDOW` under way, and wait for all replies and confirms."""
        self.replies, self.wanted = [], len(bodies)
        self.done = asyncio.get_running_loop().create_future()
        self.backlog = bodies[WINDOW:][::-1]
        for body in bodies[:WINDOW]:
            self.publish(body)
        await self.done
        return self.replies


class AmqpEcho(System):
    """One echo server process; one message for each call."""

    calls_per_message = 1

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.loop = asyncio.new_event_loop()

    def start(self) -> None:
        """Start the server and wait until it consumes."""
        command = [sys.executable, "-m", "systems.amqp_echo", self.lab.amqp_url]
        self.server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.server.stdout is not None
        if self.server.stdout.readline().strip() != "ready":
            raise RuntimeError("the echo server did not become ready")

    def connect(self) -> None:
        """Open the client's connection."""

        async def opening() -> Traffic:
            traffic = Traffic(await open_channel(self.lab.amqp_url))
            channel = traffic.channel
            await confirm_and_consume(channel, REPLIES, traffic.on_confirm, traffic.on_reply)
            return traffic

        self.traffic = self.loop.run_until_complete(opening())

    def call(self, target: Target, *args: Any) -> Any:
        """Send one message and wait for its reply."""
        if target is targets.echo:
            if len(args[0]) > RABBITMQ_LIMIT_BYTES:
                raise Unsupported("over RabbitMQ's limit of 128 MiB for one message")
            return self.loop.run_until_complete(self.traffic.exchange([args[0]]))[0]
        return self.burst(target, args)[0]

    def burst(self, target: Target, arguments: Iterable[Any]) -> list[Any]:
        """Send all as text, packed; nothing is computed."""
        if target is targets.nap:
            raise Unsupported("an echo runs nothing")
        texts = [b"%d" % value for value in arguments]
        size = self.calls_per_message
        bodies = [b" ".join(texts[at : at + size]) for at in range(0, len(texts), size)]
        replies = self.loop.run_until_complete(self.traffic.exchange(bodies))
        return [int(text) for reply in replies for text in reply.split()]

    def map(self, target: Target, count: int) -> Iterable[Any]:
        """The same as a burst."""
        return self.burst(target, range(count))

    def roles(self) -> dict[str, list[int]]:
        """The echo server."""
        return {"worker": [self.server.pid]}

    def stop(self) -> None:
        """End the server; the connection ends with this process."""
        self.server.kill()
        self.server.wait()


SYSTEM = AmqpEcho

if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
