"""The items of a generator call, one after another as they arrive."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Generic, Protocol, TypeVar

from flame_broker.messages import Result, Status

__all__ = ["ItemStream", "Items", "StreamSource", "call_in", "no_generator"]

T = TypeVar("T")


class Items:
    """What has arrived of one generator call: its items by index, and its outcome.

    Both may come in any order and more than once. When a worker is lost in the middle of a
    stream, another run begins again at index 0: of two items with one index the first to arrive
    counts, and of two outcomes the first whose items are all here.

    Attributes:
        ready: The items from the first one on, as far as none is missing.
        large: One of them lies in the store.
    """

    __slots__ = ("_ahead", "_outcome", "large", "ready")

    def __init__(self) -> None:
        self.ready: list[Result] = []
        self.large = False
        self._ahead: dict[int, Result] = {}
        self._outcome: Result | None = None

    def add(self, result: Result) -> Result | None:
        """Take an item or an outcome.

        Returns:
            The outcome, if with this every item before it is here.
        """
        if result.status is Status.ITEM:
            self._add_item(result)
        elif self._outcome is None or result.index < self._outcome.index:
            self._outcome = result
        outcome = self._outcome
        if outcome is None or outcome.index > len(self.ready):
            return None
        if outcome.status is Status.OK and outcome.index < len(self.ready):
            self.ready = self.ready[: outcome.index]  # an earlier run had given more
        return outcome

    def _add_item(self, item: Result) -> None:
        if item.index >= len(self.ready):
            self._ahead.setdefault(item.index, item)
        while (following := self._ahead.pop(len(self.ready), None)) is not None:
            self.large = self.large or following.ref is not None
            self.ready.append(following)


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

    def check_end(self) -> None:
        """Raise what the call raised, or TypeError if it returned a value and gave no items."""


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
        item = self._next_item()
        if item is None:
            try:
                self._source.check_end()
            except StopIteration as exc:
                # Passed on, it would be taken for the end of the stream (PEP 479).
                raise RuntimeError("the call raised StopIteration") from exc
            raise StopIteration
        return self._open(item)

    def __aiter__(self) -> ItemStream[T]:
        return self

    async def __anext__(self) -> T:
        await self._news()
        item = self._next_item()
        if item is None:
            self._source.check_end()
            raise StopAsyncIteration
        if item.ref is not None:
            return await asyncio.get_running_loop().run_in_executor(None, self._open, item)
        return self._open(item)

    async def _news(self) -> None:
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()
        with self._source.listening(lambda: call_in(loop, arrived.set)):
            while not self._has_news():
                await arrived.wait()
                arrived.clear()

    def _next_item(self) -> Result | None:
        # Asked for once: the list is another one when the end leaves items out.
        items = self._source.items
        return items[self._position] if self._position < len(items) else None

    def _has_news(self) -> bool:
        # "done" is read first: an item that comes before the end is then seen for certain.
        return self._source.done() or self._next_item() is not None

    def _open(self, item: Result) -> T:
        value: T = self._source.open_item(item)
        self._position += 1
        return value


def no_generator(label: str, found: str) -> TypeError:
    """The error for whoever wants the stream of a call that returned a value."""
    return TypeError(f"{label} returned {found}, not a generator: get() gives it")


def call_in(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
    """Call back in a loop of the user's, unless it was closed while we waited."""
    try:
        loop.call_soon_threadsafe(callback)
    except RuntimeError:
        return
