"""A channel with methods to await."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from pika import exceptions
from pika.channel import Channel

from flame_broker.errors import FlameError
from flame_broker.rabbit.connection import Connection

__all__ = ["ChannelGone", "ChannelRefused", "RabbitChannel"]


class ChannelGone(FlameError):
    """The channel went down with its connection; the same may be tried on the next one."""


class ChannelRefused(FlameError):
    """The broker refused a request, and closed the channel to say so.

    Attributes:
        code: AMQP reply code: 403 refused, 404 not found, 405 locked, 406 precondition failed.
    """

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class RabbitChannel:
    """One open channel.

    Attributes:
        raw: Pika's channel, for the hot paths.
        on_refused: Called when the broker closes the channel while its connection lives on.
    """

    def __init__(self) -> None:
        self.raw: Channel = None
        self.on_refused: Callable[[ChannelRefused], None] | None = None
        self._waiting: set[asyncio.Future[Any]] = set()

    @classmethod
    async def open(cls, connection: Connection) -> RabbitChannel:
        """Open a channel on a connection.

        Raises:
            ChannelGone: The connection is lost.
        """
        channel = cls()
        answer = channel._expect()
        try:
            channel.raw = connection.raw.channel(on_open_callback=partial(_settle, answer))
        except exceptions.AMQPError as exc:
            raise ChannelGone(str(exc)) from exc
        channel.raw.add_on_close_callback(channel._on_close)
        await channel._answer(answer)
        return channel

    @property
    def is_open(self) -> bool:
        """Whether requests can be sent on it."""
        return bool(self.raw.is_open)

    async def call(self, method: Callable[..., object], *args: object, **options: object) -> Any:
        """Call one of ``raw``'s methods that take a ``callback``; returns the broker's answer.

        Raises:
            ChannelGone: The connection was lost before the answer.
            ChannelRefused: The broker said no; the channel is closed.
        """
        answer = self._expect()
        try:
            method(*args, **options, callback=partial(_settle, answer))
        except exceptions.AMQPError as exc:
            raise ChannelGone(str(exc) or type(exc).__name__) from exc
        return (await self._answer(answer)).method

    def _expect(self) -> asyncio.Future[Any]:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.add(answer)
        answer.add_done_callback(self._waiting.discard)
        return answer

    async def _answer(self, answer: asyncio.Future[Any]) -> Any:
        outcome = await answer
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def _on_close(self, _channel: Channel, reason: BaseException) -> None:
        error = _translate(reason)
        for answer in tuple(self._waiting):
            _settle(answer, error)
        if isinstance(error, ChannelRefused) and self.on_refused is not None:
            self.on_refused(error)


def _settle(answer: asyncio.Future[Any], outcome: object) -> None:
    """Give an answer; errors travel as values, since a waiter that was cancelled reads none."""
    if not answer.done():
        answer.set_result(outcome)


def _translate(reason: BaseException) -> FlameError:
    if isinstance(reason, exceptions.ChannelClosedByBroker):
        return ChannelRefused(reason.reply_code, reason.reply_text)
    return ChannelGone(str(reason) or type(reason).__name__)
