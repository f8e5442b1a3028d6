"""The items of a generator call, one after another as they arrive."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Generic, Protocol, TypeVar

from flame_broker.messages import Result

__all__ = ["ItemStream", "StreamSource"]

T = TypeVar("T")


class StreamSource(Protocol):
    """What a stream reads: a future that collects items."""

    @property
    def items(self) -> list[Result]:
        """What has arrived, encoded."""

    def done(self) -> bool:
        """Whether the call has ended."""

    def wait_for(self, condition: Callable[[], bool], timeout: float | None) -> bool:
        """Wait until something holds that the courier brings about."""

    def listening(self, listener: Callable[[], object]) -> AbstractContextManager[None]:
        """Have ``listener`` called at each item and at the end."""

    def open_item(self, item: Result) -> Any:
        """Decode an item."""

    def raise_failure(self) -> None:
        """Raise what the call raised, if it did."""


class ItemStream(Generic[T]):
    """Iterates over a stream from its start; several may read one call, each at its own pace.

    Works with ``for`` and with ``async for``. It ends when the call ends; if the call failed it
    raises what the call raised, after the items that came before.
    """

    def __init__(self, source: StreamSource) -> None:
        self._source = source
        self._position = 0

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        self._source.wait_for(self._has_news, None)
        if not self._has_item():
            try:
                self._source.raise_failure()
            except StopIteration as exc:
                # Passed on, it would be taken for the end of the stream (PEP 479).
                raise RuntimeError("the call raised StopIteration") from exc
            raise StopIteration
        return self._take()

    def __aiter__(self) -> ItemStream[T]:
        return self

    async def __anext__(self) -> T:
        await self._news()
        if not self._has_item():
            self._source.raise_failure()
            raise StopAsyncIteration
        if self._source.items[self._position].ref is not None:
            return await asyncio.get_running_loop().run_in_executor(None, self._take)
        return self._take()

    async def _news(self) -> None:
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()
        with self._source.listening(lambda: call_in(loop, arrived.set)):
            while not self._has_news():
                await arrived.wait()
                arrived.clear()

    def _has_item(self) -> bool:
        return self._position < len(self._source.items)

    def _has_news(self) -> bool:
        # "done" is read first: an item that comes before the end is then seen for certain.
        return self._source.done() or self._has_item()

    def _take(self) -> T:
        value: T = self._source.open_item(self._source.items[self._position])
        self._position += 1
        return value


def call_in(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
    """Call back in a loop of the user's, unless it was closed while we waited."""
    try:
        loop.call_soon_threadsafe(callback)
    except RuntimeError:
        return
