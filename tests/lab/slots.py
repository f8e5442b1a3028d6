"""One slot with an owner that writes down everything it hears."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle

from flame_broker.codec import decode_value, encode_arguments, encode_value
from flame_broker.messages import Call, CallSpec, EventKind, Result, Status, Target
from flame_broker.outcomes import decode_error, decode_failure
from flame_worker.slots import Batch, Lost, Slot, SlotSettings, SpooledResult
from lab.wait import eventually

__all__ = ["SlotLab", "slot_lab"]


class SlotLab:
    """The owner of a slot, and a client of it: gives calls of local functions, reads outcomes.

    Attributes:
        slot: The slot.
        results: By counter, in the order of arrival.
        ended: Batches that ended, one way or the other, in order.
        seconds: What ``on_done`` said.
        output: ``(kind, line)`` by counter.
        progress: ``(fraction, text)`` by counter.
        lost: Deaths of children.
        children: How many have started.
    """

    def __init__(self, directory: Path, /, **settings: Any) -> None:
        self.cache_dir = directory / "cache" / "objects"
        self.spool_dir = directory / "spool"
        self.cache_dir.mkdir(parents=True)
        self.spool_dir.mkdir()
        chosen = SlotSettings(
            cache_dir=self.cache_dir.parent, spool_dir=self.spool_dir, worker="w1", **settings
        )
        self.slot = Slot(0, settings=chosen, owner=self)
        self.results: dict[int, list[Result | SpooledResult]] = {}
        self.ended: list[Batch] = []
        self.seconds = 0.0
        self.output: dict[int, list[tuple[EventKind, str]]] = {}
        self.progress: dict[int, list[tuple[float, str]]] = {}
        self.lost: list[Lost] = []
        self.children = 0
        self._counters = count(1)

    def on_results(self, slot: Slot, batch: Batch, results: list[Result | SpooledResult]) -> None:
        """Write down results; each call must belong to its batch."""
        assert {r.counter for r in results} <= {call.counter for call in batch.calls}
        for result in results:
            self.results.setdefault(result.counter, []).append(result)

    def on_done(self, slot: Slot, batch: Batch, seconds: float) -> None:
        """Write down the end of a batch; it may end once."""
        assert batch not in self.ended
        self.ended.append(batch)
        self.seconds += seconds

    def on_output(
        self, slot: Slot, batch: Batch, counter: int, kind: EventKind, lines: list[str]
    ) -> None:
        """Write down lines."""
        self.output.setdefault(counter, []).extend((kind, line) for line in lines)

    def on_progress(
        self, slot: Slot, batch: Batch, counter: int, fraction: float, text: str
    ) -> None:
        """Write down progress."""
        self.progress.setdefault(counter, []).append((fraction, text))

    def on_ready(self, slot: Slot) -> None:
        """Count the children that came up."""
        self.children += 1

    def on_lost(self, slot: Slot, lost: Lost) -> None:
        """Write down a death; what it names may end once."""
        named = [*lost.unsent, *lost.unstarted, *([lost.running] if lost.running else [])]
        for batch in {id(batch): batch for batch, _ in named}.values():
            assert batch not in self.ended
            self.ended.append(batch)
        self.lost.append(lost)

    def batch(
        self, function: Callable[..., Any] | str, argses: Iterable[tuple[Any, ...]], **spec: Any
    ) -> Batch:
        """A batch with one call for each tuple of arguments."""
        with _by_value(function):
            target, path = self._pack(function)
            payloads = [encode_arguments(args, {}).join() for args in argses]
        calls = [Call(next(self._counters), payload) for payload in payloads]
        return Batch(CallSpec(target, **spec), "client", calls, path)

    def give(
        self, function: Callable[..., Any] | str, *argses: tuple[Any, ...], **spec: Any
    ) -> Batch:
        """Give a batch to the slot."""
        batch = self.batch(function, argses, **spec)
        self.slot.give(batch)
        return batch

    async def run(
        self, function: Callable[..., Any] | str, *argses: tuple[Any, ...], **spec: Any
    ) -> list[Any]:
        """Give a batch, wait for its end, and return the outcomes of its calls."""
        batch = self.give(function, *argses, **spec)
        await self.until_ended(batch)
        return [self.outcome(call.counter) for call in batch.calls]

    async def call(self, function: Callable[..., Any] | str, *args: Any, **spec: Any) -> Any:
        """Run one call; returns its value or its error."""
        (outcome,) = await self.run(function, args, **spec)
        return outcome

    async def until_ended(self, *batches: Batch) -> None:
        """Wait for the end of batches."""
        await eventually(
            lambda: all(batch in self.ended for batch in batches), 60, "the end of a batch",
            poll_s=0.002,
        )  # fmt: skip

    def outcome(self, counter: int) -> Any:
        """The value or error of a call; None if it has no final result."""
        results = [r for r in self.results.get(counter, []) if r.status is not Status.ITEM]
        if not results:
            return None
        (result,) = results
        return self.value(result)

    def value(self, result: Result | SpooledResult) -> Any:
        """What a result carries."""
        if isinstance(result, SpooledResult):
            data = result.path.read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (result.size, result.sha256)
            return decode_value(data)
        decoders = {Status.ERROR: decode_error, Status.FAILED: decode_failure}
        if result.status in decoders:
            return decoders[result.status](result.payload, f"client-{result.counter}")
        return decode_value(result.payload)

    def lines(self, counter: int, kind: EventKind = EventKind.STDOUT) -> list[str]:
        """What a call wrote."""
        return [line for of_kind, line in self.output.get(counter, []) if of_kind is kind]

    def store(self, payload: bytes) -> str:
        """Put an object into the node's cache; returns its sha256."""
        sha256 = hashlib.sha256(payload).hexdigest()
        (self.cache_dir / sha256).write_bytes(payload)
        return sha256

    def _pack(self, function: Callable[..., Any] | str) -> tuple[Target, Path | None]:
        if isinstance(function, str):
            return Target(function), None
        payload = encode_value(function).join()
        sha256 = self.store(payload)
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        target = Target(function.__qualname__, sha256, len(payload), python)
        return target, self.cache_dir / sha256


@contextmanager
def _by_value(function: Callable[..., Any] | str) -> Iterator[None]:
    """Pickle what a test module defines by value: the child cannot import that module."""
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    if not isinstance(module, ModuleType) or "test_" not in module.__name__:
        yield
        return
    cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(module)


@asynccontextmanager
async def slot_lab(directory: Path, /, **settings: Any) -> AsyncIterator[SlotLab]:
    """A started slot, closed at the end."""
    lab = SlotLab(directory, **settings)
    await lab.slot.start()
    try:
        yield lab
    finally:
        await lab.slot.close(grace_s=5)
