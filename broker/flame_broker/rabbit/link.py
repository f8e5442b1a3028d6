"""A connection that is kept: made, restored, watched, and made again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import pika

from flame_broker.backoff import Backoff
from flame_broker.errors import BrokerUnavailable
from flame_broker.logs import get_logger
from flame_broker.rabbit.address import RabbitAddress
from flame_broker.rabbit.channel import ChannelGone, ChannelRefused
from flame_broker.rabbit.connection import ConnectFailed, Connection, parameters_for

__all__ = ["Link"]

_STEADY_S: Final = 10.0  # a connection that was up this long was no failed attempt
# Pika bounds the phases of a handshake, and heartbeats a silent connection. A broker that starts up
# may do neither: answer heartbeats, and never the one request that everything waits for.
_CONNECT_S: Final = 20.0
_RESTORE_S: Final = 60.0

_NEXT_STEP: Final = (
    "is the broker running there, and does FLAME_BROKER_URL name it? (`flame config show` prints "
    "what applies)"
)

_log = get_logger("flame.broker")


class Link:
    """One connection to one of several hosts, for as long as the link is open.

    Args:
        address: Hosts and login.
        name: Shown by the broker's management pages.
        restore: Makes a new connection usable: channels, queues, consumers. Called again after
            ``disturb``, and after it raised ``ChannelGone`` or ``ChannelRefused``.
        on_up: Called when ``restore`` is through.
        on_down: Called when the link is no longer up.

    Attributes:
        address: Where to.
        up: Set while the connection stands and is restored.
        trouble: Where, as whom, and what went wrong last, in words.
        server: Product and version of the host that answered last.
    """

    def __init__(
        self,
        address: RabbitAddress,
        name: str,
        *,
        restore: Callable[[Connection], Awaitable[None]],
        on_up: Callable[[], None],
        on_down: Callable[[], None],
    ) -> None:
        self.up = asyncio.Event()
        self.server = ""
        self.address = address
        self._note("not opened")
        self._name = name
        self._restore = restore
        self._on_up = on_up
        self._on_down = on_down
        self._backoff = Backoff()
        self._connection: Connection | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._failure: ConnectFailed | None = None
        self._first: asyncio.Future[None] | None = None  # up, or known to be hopeless
        self._disturbed: asyncio.Future[None] | None = None

    async def open(self, deadline_s: float) -> None:
        """Connect, and keep the connection from now on.

        Raises:
            BrokerUnavailable: No host took us within the deadline, or all of them said no.
            ConfigError: The TLS files cannot be used.
        """
        parameters = list(parameters_for(self.address, self._name))
        loop = asyncio.get_running_loop()
        self._first = loop.create_future()
        self._keeper = loop.create_task(self._keep(parameters), name=self._name)
        self._keeper.add_done_callback(self._report_end)
        ends = {self._first, self._keeper}
        await asyncio.wait(ends, timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED)
        if self._keeper.done():
            self._keeper.result()
        if not self.up.is_set():
            raise BrokerUnavailable(f"{self.trouble}; {_NEXT_STEP}") from self._failure

    async def close(self) -> None:
        """Give the connection up. Safe to call twice."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()
            await asyncio.wait({keeper})
        if self._connection is not None:
            await self._connection.close()
        self._go_down()
        self._note("closed")

    def disturb(self) -> None:
        """Have the standing connection restored again: the broker closed its channel."""
        if self._disturbed is not None and not self._disturbed.done():
            self._disturbed.set_result(None)

    async def _keep(self, parameters: Sequence[pika.ConnectionParameters]) -> None:
        while True:
            self._connection = await self._connect(parameters)
            self.server = self._connection.server
            while not self._connection.lost.done():
                await self._serve(self._connection)
            lost = self._connection.lost.result()
            self._note(lost)
            _log.warning("broker_connection_lost", link=self._name, reason=lost)

    async def _connect(self, parameters: Sequence[pika.ConnectionParameters]) -> Connection:
        while True:
            failures: dict[str, ConnectFailed] = {}
            for host in parameters:
                try:
                    return await _open(host)
                except ConnectFailed as exc:
                    failures[f"{host.host}:{host.port}"] = self._failure = exc
            reasons = "; ".join(f"{host}: {exc}" for host, exc in failures.items())
            self.trouble = f"RabbitMQ at {reasons} ({self.address.login})"
            if all(exc.final for exc in failures.values()):
                self._settle_first()
            await asyncio.sleep(self._backoff.next_s())

    async def _serve(self, connection: Connection) -> None:
        """Restore the connection and watch it until it is lost or disturbed; then a pause."""
        loop = asyncio.get_running_loop()
        disturbed = self._disturbed = loop.create_future()
        since = loop.time()
        try:
            async with asyncio.timeout(_RESTORE_S):
                await self._restore(connection)
        except (ChannelGone, ChannelRefused) as exc:
            self._restore_failed(str(exc))
        except TimeoutError:
            self._restore_failed(f"the broker left a request unanswered for {_RESTORE_S:g} s")
            await connection.close()
        else:
            self._go_up()
            ends = {connection.lost, disturbed}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            self._go_down()
        if loop.time() - since > _STEADY_S:
            self._backoff.reset()
        await asyncio.sleep(self._backoff.next_s())

    def _report_end(self, keeper: asyncio.Task[None]) -> None:
        """Say it aloud if a fault of ours ends the keeping: everything else would only wait."""
        if not keeper.cancelled() and (fault := keeper.exception()) is not None:
            self._note(f"nobody keeps it any more: {fault!r}")
            asyncio.get_running_loop().call_exception_handler(
                {"message": f"the link {self._name!r} is kept no more", "exception": fault}
            )

    def _note(self, trouble: str) -> None:
        self.trouble = f"{self.address}: {trouble}"

    def _restore_failed(self, trouble: str) -> None:
        self._note(trouble)
        _log.warning("broker_restore_failed", link=self._name, reason=trouble)

    def _go_up(self) -> None:
        self.up.set()
        self._settle_first()
        _log.debug("broker_connected", link=self._name)
        self._on_up()

    def _go_down(self) -> None:
        if self.up.is_set():
            self.up.clear()
            self._on_down()

    def _settle_first(self) -> None:
        if self._first is not None and not self._first.done():
            self._first.set_result(None)


async def _open(host: pika.ConnectionParameters) -> Connection:
    try:
        async with asyncio.timeout(_CONNECT_S):
            return await Connection.open(host)
    except TimeoutError as exc:
        raise ConnectFailed(f"the handshake was not over after {_CONNECT_S:g} s") from exc
