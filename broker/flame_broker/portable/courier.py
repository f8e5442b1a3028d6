"""The thread that carries a transport's orders to the broker, one after another."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Final, Generic, TypeVar

from flame_broker.backoff import Backoff
from flame_broker.errors import BrokerUnavailable, FlameError
from flame_broker.logs import get_logger
from flame_broker.portable.link import Dialect, Link
from flame_broker.transport import QueueSpec

__all__ = ["Courier"]

_log = get_logger("flame.broker")
_Result = TypeVar("_Result")
_CAP_S: Final = 5.0


class _Order(Generic[_Result]):
    """One thing to do, and the future that waits for it."""

    def __init__(self, work: Callable[[Link], _Result], future: asyncio.Future[_Result]) -> None:
        self.work, self.future = work, future
        self.result: _Result
        self.error: Exception | None = None

    def settle(self) -> None:
        """Tell the future, in its loop."""
        if self.future.done():
            return
        if self.error is None:
            self.future.set_result(self.result)
        else:
            self.future.set_exception(self.error)


class Courier:
    """Carries out orders in the order given, connecting again when the broker was away.

    An order is tried until its future is done, which its deadline sees to. What was declared is
    declared anew on every new connection.

    Args:
        dialect: The broker.
        name: Shown in the thread's name.
        on_reconnect: Called in the loop when a lost connection is back.
    """

    def __init__(self, dialect: Dialect, name: str, on_reconnect: Callable[[], None]) -> None:
        self.connected = False
        self._dialect, self._on_reconnect = dialect, on_reconnect
        self._loop = asyncio.get_running_loop()
        self._orders: SimpleQueue[_Order[Any] | None] = SimpleQueue()
        self._done: deque[_Order[Any]] = deque()
        self._stopping = threading.Event()
        self._backoff = Backoff(cap_s=_CAP_S)
        self._link: Link | None = None
        self._was_connected = False
        self._last_error: Exception | None = None
        # Touched by the thread only:
        self._queues: dict[str, QueueSpec] = {}
        self._exchanges: dict[str, str] = {}
        self._thread = threading.Thread(target=self._run, name=f"{name}-courier", daemon=True)
        self._thread.start()

    def order(
        self, work: Callable[[Link], _Result], *, deadline_s: float
    ) -> asyncio.Future[_Result]:
        """Have something done.

        The future raises:
            BrokerUnavailable: It was not done within the deadline.
            FlameError: What the work raised.
        """
        future: asyncio.Future[_Result] = self._loop.create_future()
        timer = self._loop.call_later(deadline_s, self._expire, future, deadline_s)
        future.add_done_callback(lambda _: timer.cancel())
        self._orders.put(_Order(work, future))
        return future

    def declare(self, spec: QueueSpec, link: Link) -> None:
        """Work for an order: declare a queue, now and on every new connection."""
        link.declare(spec)
        self._queues[spec.name] = spec

    def declare_exchange(self, name: str, kind: str, link: Link) -> None:
        """Work for an order: declare an exchange, now and on every new connection."""
        link.declare_exchange(name, kind)
        self._exchanges[name] = kind

    def delete(self, queue: str, link: Link) -> None:
        """Work for an order: delete a queue and forget its declaration."""
        self._queues.pop(queue, None)
        link.delete(queue)

    def refresh(self, link: Link) -> None:
        """Work for an order: keep our expiring queues, and clear up after the dead."""
        for spec in self._queues.values():
            if spec.exclusive or "x-expires" in spec.arguments:
                link.declare(spec)
        link.tidy()

    def stop(self) -> None:
        """Finish what was ordered before (if the broker answers), disconnect and end the thread."""
        self._orders.put(None)
        self._stopping.set()

    @property
    def alive(self) -> bool:
        """Whether its thread still runs."""
        return self._thread.is_alive()

    def _expire(self, future: asyncio.Future[Any], deadline_s: float) -> None:
        if not future.done():
            cause = f": {self._last_error}" if self._last_error else ""
            message = f"{self._dialect} did not answer within {deadline_s:g} s{cause}"
            future.set_exception(BrokerUnavailable(message))

    def _run(self) -> None:
        while (order := self._orders.get()) is not None:
            self._carry_out(order)
        self._drop_link()

    def _carry_out(self, order: _Order[Any]) -> None:
        while not order.future.done():
            try:
                order.result = order.work(self._link or self._connect())
            except FlameError as exc:
                order.error = exc
            except self._dialect.failures as exc:
                self._lost(exc)
                self._stopping.wait(self._backoff.next_s())
                continue
            self._report(order)
            return

    def _connect(self) -> Link:
        if self._stopping.is_set():
            raise BrokerUnavailable(f"{self._dialect} is closed: {self._last_error}")
        self._link = link = self._dialect.connect()
        for name, kind in self._exchanges.items():
            link.declare_exchange(name, kind)
        for spec in self._queues.values():
            link.declare(spec)
        self.connected = True
        self._last_error = None
        self._backoff.reset()
        if self._was_connected:
            _log.info("broker_reconnected", broker=str(self._dialect))
            self._call_soon(self._on_reconnect)
        self._was_connected = True
        return link

    def _lost(self, exc: Exception) -> None:
        if self._last_error is None:
            _log.warning("broker_lost", broker=str(self._dialect), error=str(exc))
        self._last_error = exc
        self._drop_link()

    def _drop_link(self) -> None:
        link, self._link, self.connected = self._link, None, False
        if link is not None:
            link.close()

    def _report(self, order: _Order[Any]) -> None:
        self._done.append(order)
        if len(self._done) == 1:  # else the loop was woken already
            self._call_soon(self._settle_all)

    def _settle_all(self) -> None:
        while self._done:
            self._done.popleft().settle()

    def _call_soon(self, callback: Callable[[], None]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback)
