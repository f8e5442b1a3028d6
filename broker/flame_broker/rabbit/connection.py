"""One AMQP connection, and why it could not be had."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable, Iterator
from typing import Any, Final

import pika
from pika import exceptions
from pika.adapters.asyncio_connection import AsyncioConnection
from pika.channel import Channel

from flame_broker.errors import ConfigError, FlameError
from flame_broker.rabbit.address import RabbitAddress
from flame_broker.rabbit.stream import StreamServices

__all__ = ["ConnectFailed", "Connection", "parameters_for"]

_TCP_TIMEOUT_S: Final = 3.0  # a host that drops packets must not eat the whole deadline
_HANDSHAKE_TIMEOUT_S: Final = 5.0
_CLOSE_TIMEOUT_S: Final = 2.0
# Pika keeps of the broker's answer to a login only its text.
_LOGIN_REFUSED: Final = "(403)"
_VHOST_REFUSED: Final = "(530)"


class ConnectFailed(FlameError):
    """One host could not be connected to.

    Attributes:
        final: Trying again is of no use: the broker answered, and the answer was no.
    """

    def __init__(self, message: str, *, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


class _Channel(Channel):  # type: ignore[misc]  # pika is untyped
    """A channel that hands over what arrives between Basic.Cancel and Cancel-Ok.

    Pika rejects those messages, and each reject raises the broker's delivery count.
    """

    def _on_deliver(self, method_frame: Any, header_frame: Any, body: bytes) -> None:
        consumer = self._consumers.get(method_frame.method.consumer_tag)
        if consumer is not None:
            consumer(self, method_frame.method, header_frame.properties, body)


class _Connection(AsyncioConnection):  # type: ignore[misc]  # pika is untyped
    def _create_channel(
        self, channel_number: int, on_open_callback: Callable[[Channel], Any] | None
    ) -> Channel:
        return _Channel(self, channel_number, on_open_callback)

    def _on_connection_workflow_done(self, conn_or_exc: Any) -> None:
        # Pika 1.4 passes the class of the exception when a connection is given up half-way, then
        # trips over it in an assertion.
        aborted = isinstance(conn_or_exc, type)
        super()._on_connection_workflow_done(conn_or_exc() if aborted else conn_or_exc)

    def close(self, reply_code: int = 200, reply_text: str = "Normal shutdown") -> None:
        # Pika does not see that a connection is reset between its making and the turn of the loop
        # after that. When the time for the handshake is over, it closes what is closed already.
        if not self.is_closed:
            super().close(reply_code, reply_text)


class Connection:
    """An open connection. Pika's own object is ``raw``.

    Attributes:
        raw: Pika's connection.
        lost: Done, with the reason, when the connection is gone for whatever reason.
    """

    def __init__(self, parameters: pika.ConnectionParameters) -> None:
        loop = asyncio.get_running_loop()
        self._opened: asyncio.Future[None] = loop.create_future()
        self.lost: asyncio.Future[str] = loop.create_future()
        self._services = StreamServices(loop)
        self.raw = _Connection(
            parameters,
            on_open_callback=self._on_opened,
            on_open_error_callback=self._on_refused,
            on_close_callback=self._on_lost,
            custom_ioloop=self._services,
        )

    @classmethod
    async def open(cls, parameters: pika.ConnectionParameters) -> Connection:
        """Connect to one host.

        Raises:
            ConnectFailed: It did not answer, or said no.
        """
        connection = cls(parameters)
        try:
            await asyncio.shield(connection._opened)
        except asyncio.CancelledError:
            await connection.close()
            raise
        return connection

    @property
    def server(self) -> str:
        """Product and version of the host, as it introduced itself."""
        said = self.raw.server_properties or {}
        return f"{said.get('product', 'AMQP server')} {said.get('version', '')}".strip()

    async def close(self) -> None:
        """Say goodbye; hang up if the broker does not answer in 2 s. Never raises."""
        if not (self.raw.is_closed or self.raw.is_closing):
            self.raw.close()
        done, _ = await asyncio.wait({self.lost}, timeout=_CLOSE_TIMEOUT_S)
        if not done:
            self._services.hang_up()
            await asyncio.wait({self.lost}, timeout=_CLOSE_TIMEOUT_S)

    def _on_opened(self, _connection: object) -> None:
        if not self._opened.done():
            self._opened.set_result(None)

    def _on_refused(self, _connection: object, reason: BaseException) -> None:
        if not self._opened.done():
            failure = _explain(reason, heard=self._services.heard)
            failure.__cause__ = reason
            self._opened.set_exception(failure)
            self._opened.exception()  # seen: nobody waits for it after a cancel
        self.lost.set_result(str(reason))

    def _on_lost(self, _connection: object, reason: BaseException) -> None:
        self.lost.set_result(_words(reason))


def parameters_for(address: RabbitAddress, name: str) -> Iterator[pika.ConnectionParameters]:
    """Make pika's parameters, one for each host.

    Args:
        address: Hosts and login.
        name: Shown by the broker's management pages.
    """
    _quieten_pika()
    context = _tls_context(address) if address.tls else None
    for host, port in address.hosts:
        yield pika.ConnectionParameters(
            host=host,
            port=port,
            virtual_host=address.vhost,
            credentials=pika.PlainCredentials(address.user, address.password),
            heartbeat=address.heartbeat_s,
            socket_timeout=_TCP_TIMEOUT_S,
            stack_timeout=_HANDSHAKE_TIMEOUT_S,
            client_properties={"connection_name": name, "product": "Flame"},
            ssl_options=context and pika.SSLOptions(context, address.server_name or host),
        )


def _quieten_pika() -> None:
    """Keep pika's own tracebacks of each lost connection off the user's terminal.

    What happens to a connection is logged here, once and in our words. Who wants pika's story sets
    the level of its logger first.
    """
    logger = logging.getLogger("pika")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.CRITICAL)


def _tls_context(address: RabbitAddress) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=address.ca)
        if address.cert:
            context.load_cert_chain(address.cert, address.key)
    except OSError as exc:
        named = ", ".join(filter(None, (address.ca, address.cert, address.key)))
        raise ConfigError(f"broker URL: cannot use the TLS files ({named}): {exc}") from exc
    return context


def _causes(reason: BaseException) -> Iterator[BaseException]:
    """Unwrap pika's layers: a workflow failed with a phase that failed with the error itself."""
    yield reason
    inner = [*getattr(reason, "exceptions", ())[-1:], getattr(reason, "exception", None)]
    inner += [arg for arg in reason.args if isinstance(arg, BaseException)]
    for cause in inner:
        if cause is not None:
            yield from _causes(cause)


def _explain(reason: BaseException, *, heard: bool) -> ConnectFailed:
    for cause in _causes(reason):
        text = str(cause)
        match cause:
            case exceptions.ProbableAuthenticationError() if _LOGIN_REFUSED in text:
                return ConnectFailed("user or password refused", final=True)
            case exceptions.ProbableAccessDeniedError() if _VHOST_REFUSED in text:
                answer = text.partition(_VHOST_REFUSED)[2].strip(" '\"")
                return ConnectFailed(f"virtual host refused: {answer}", final=True)
            case exceptions.IncompatibleProtocolError() if heard:
                return ConnectFailed("not an AMQP 0-9-1 server", final=True)
            case exceptions.IncompatibleProtocolError():
                # Pika's guess for whoever hangs up first: as a proxy does while the broker starts.
                return ConnectFailed("it hung up before it had said anything")
    return ConnectFailed(_words(reason))


def _words(reason: BaseException) -> str:
    """Say in a few words why a connection failed or ended."""
    *_, root = _causes(reason)
    match root:
        case exceptions.ConnectionClosedByBroker():
            return f"closed by the broker: {root.reply_text}"
        case ConnectionRefusedError():
            return "connection refused"
        case _:
            return str(root) or type(root).__name__
