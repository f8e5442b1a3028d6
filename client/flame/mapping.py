"""``service.map``: a million calls without a million futures.

Input is read lazily, a chunk at a time; a chunk is one record that collects the outcomes of its
calls. At most ``_AHEAD_CALLS`` are on their way or waiting to be consumed, and fewer if
``_AHEAD_BYTES`` do not hold their arguments and results, so a slow consumer holds up the reading of
the input, and memory stays bounded however long the input is. How large results will be is learned
from those that were read; until then they are taken for as large as a message carries.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from itertools import islice
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from flame.arguments import find_futures
from flame.bell import Bell
from flame.futures import ObjectFuture
from flame.lanes import Lane
from flame.packaging import local_code
from flame.progress import Bar
from flame.streams import Items
from flame_broker.codec import encode_arguments, encode_scalars
from flame_broker.errors import FlameError, PackagingError
from flame_broker.messages import FRAME_CALLS, INLINE_BYTES, SHORT_FRAME_CALLS, Call, Result

if TYPE_CHECKING:
    from flame.calls import Caller

__all__ = ["MapResults"]

_AHEAD_CALLS: Final = 4096
_AHEAD_BYTES: Final = 32 * 1024 * 1024
_SLOW_S: Final = 0.01  # for the items of one chunk; a list gives 64 in microseconds
_WEIGHT: Final = 0.3  # of a chunk whose results are smaller than expected; larger count at once
_CHUNKS_A_SIZE: Final = 4  # the first chunks are small, so that short maps spread over workers


class _Stream(NamedTuple):
    """The outcome of a generator call."""

    items: list[Result]
    outcome: Result


Outcome = Result | BaseException | ObjectFuture[Any] | _Stream


class _Chunk:
    """The calls of one frame, as one record."""

    ends_with_client = True

    def __init__(self, lane: Lane, counters: list[int]) -> None:
        self.published = 0
        self.gate = lane.gate
        self.lane: Lane | None = lane
        self.counters = counters
        self.outcomes: dict[int, Outcome] = {}
        self.streams: dict[int, Items] = {}
        self.futures: list[ObjectFuture[Any]] = []
        self.nbytes = 0
        self.result_bytes = 0
        self._bell = Bell()

    def settle(self, result: Result) -> None:
        """Take the outcome of one call."""
        outcomes = self.outcomes
        outcomes[result.counter] = result
        self.result_bytes += len(result.payload)
        if len(outcomes) == len(self.counters):
            self._bell.ring()

    def put(self, counter: int, outcome: Outcome) -> None:
        """Note an outcome; the last one wakes the consumer."""
        self.outcomes[counter] = outcome
        if self._full():
            self._bell.ring()

    def in_order(self) -> list[Outcome]:
        """All outcomes, in the order of the calls."""
        outcomes = self.outcomes
        for counter, items in self.streams.items():
            outcome = outcomes[counter]
            if isinstance(outcome, Result) and outcome.index:
                outcomes[counter] = _Stream(items.ready, outcome)
        return [outcomes[counter] for counter in self.counters]

    def fail_call(self, counter: int, exc: BaseException) -> None:
        """Take a failure that came from no worker."""
        self.put(counter, exc)

    def follow(self, result: Result) -> Result | None:
        """Take an item, or the outcome of a stream: given back when every item is here."""
        return self.streams.setdefault(result.counter, Items()).add(result)

    def take_progress(self, fraction: float, text: str) -> None:
        """A map shows the progress of the whole."""

    def take_sign_of_life(self) -> None:
        """Nobody asks whether one call of a map runs."""

    def forget_locks(self) -> None:
        """A bell has none that anybody could hold."""

    def wait(self, timeout: float | None) -> bool:
        """Wait for all outcomes."""
        return self._bell.wait_for(self._full, timeout)

    def _full(self) -> bool:
        return len(self.outcomes) == len(self.counters)


class MapResults(Iterator[Any]):
    """The results of a map, in order.

    An exception that a call raised is raised at its place; iterating may go on after it. Closing
    (or leaving) early cancels what has not been consumed.

    Args:
        caller: Makes the calls.
        inputs: Argument tuples.
        chunk: Calls in a frame; None begins with small ones.
        total: How many there are, if that is known; for the progress bar.
    """

    def __init__(
        self,
        caller: Caller,
        inputs: Iterable[tuple[Any, ...]],
        *,
        chunk: int | None = None,
        total: int | None = None,
    ) -> None:
        self._caller = caller
        self._session, self._lane = caller.board()
        self._inputs = iter(inputs)
        self._sizes = _sizes(chunk, self._lane)
        self._chunks: deque[_Chunk] = deque()
        self._current: deque[Outcome] = deque()
        self._ahead_calls = 0
        self._ahead_bytes = 0
        self._result_bytes = float(INLINE_BYTES)  # of one call, as expected
        self._exhausted = False
        self._slow = False  # the input made us wait
        self._broken: BaseException | None = None
        self._bar = Bar(caller.options.label, total)
        self._fill()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        if not self._current:
            self._advance()
        outcome = self._current.popleft()
        try:
            if isinstance(outcome, ObjectFuture):
                return outcome.result()
            if isinstance(outcome, BaseException):
                raise outcome
            value, exc = self._open(outcome)
            if exc is None:
                return value
            raise exc
        except StopIteration as exc:
            # Passed on, it would end the loop over us as if all were done (PEP 479).
            raise RuntimeError("a call of the map raised StopIteration") from exc

    def _open(self, outcome: Result | _Stream) -> tuple[Any, BaseException | None]:
        label = self._caller.options.label
        if isinstance(outcome, _Stream):
            return self._session.desk.open_stream(*outcome, label)
        return self._session.desk.open_outcome(outcome, label)

    def close(self) -> None:
        """Stop: read no more input, cancel what is on its way. Safe to call twice."""
        self._exhausted = True
        chunks, self._chunks = self._chunks, deque()
        for chunk in chunks:
            self._session.courier.abandon(chunk.counters)
            for future in chunk.futures:
                future.cancel()
        self._current.clear()
        self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_chunks", None):
            self.close()

    def _advance(self) -> None:
        """Make the oldest chunk the current one, and read on in the input."""
        self._fill()
        if not self._chunks:
            self._bar.close()
            if self._broken is not None:
                broken, self._broken = self._broken, None
                raise broken
            raise StopIteration
        chunk = self._chunks[0]
        if not self._session.courier.may_block() and not chunk.wait(0):
            raise FlameError(
                "waiting for the results of a map inside a done-callback would stop the client "
                "itself; start what must wait in a thread of your own"
            )
        self._bar.wait(chunk.wait)
        self._chunks.popleft()
        self._ahead_calls -= len(chunk.counters)
        self._ahead_bytes -= chunk.nbytes
        self._learn(chunk)
        self._current.extend(chunk.in_order())
        self._bar.advance(len(chunk.counters))
        self._fill()

    def _learn(self, chunk: _Chunk) -> None:
        more = chunk.result_bytes / len(chunk.counters) - self._result_bytes
        self._result_bytes += more if more > 0 else _WEIGHT * more

    def _may_read(self) -> bool:
        expected = self._ahead_bytes + self._ahead_calls * self._result_bytes
        return not self._exhausted and self._ahead_calls < _AHEAD_CALLS and expected < _AHEAD_BYTES

    def _fill(self) -> None:
        """Read as far ahead as is allowed."""
        while self._may_read():
            self._read_chunk(1 if self._slow else next(self._sizes))
            if self._slow and self._chunks and self._chunks[0].wait(0):
                return  # whoever waits for results need not wait for the input as well

    def _read_chunk(self, size: int) -> None:
        since = monotonic()
        batch = self._read_inputs(size)
        self._slow = monotonic() - since > _SLOW_S
        if not batch:
            return
        courier = self._session.courier
        chunk = _Chunk(self._lane, [*islice(courier.counters, len(batch))])
        # The hot path of a map: done for the whole chunk wherever that saves time.
        calls: list[Call] = []
        for counter, args in zip(chunk.counters, batch, strict=True):
            payload = encode_scalars(args)
            if payload is None or len(payload) > INLINE_BYTES:
                self._add_other(chunk, calls, counter, args)
            else:
                calls.append(Call(counter, payload))
        chunk.nbytes = sum([len(call.payload) for call in calls])
        courier.pending.records.update(dict.fromkeys([call.counter for call in calls], chunk))
        self._chunks.append(chunk)
        self._ahead_calls += len(chunk.counters)
        self._ahead_bytes += chunk.nbytes
        courier.submit_all(self._lane, calls)

    def _read_inputs(self, size: int) -> list[tuple[Any, ...]]:
        batch: list[tuple[Any, ...]] = []
        try:
            batch.extend(islice(self._inputs, size))
        # The input is the user's iterator: what it raises comes out after the results before it.
        except Exception as exc:  # noqa: BLE001
            self._broken = exc
        self._exhausted = len(batch) < size
        return batch

    def _add_other(
        self, chunk: _Chunk, calls: list[Call], counter: int, args: tuple[Any, ...]
    ) -> None:
        """A call whose arguments are more than a few scalars."""
        try:
            with local_code:
                encoded = encode_arguments(args, {})
        except PackagingError as exc:
            if find_futures(args):
                self._add_future(chunk, counter, args)
            else:
                chunk.put(counter, self._caller.blame(args, {}) or exc)
            return
        if encoded.nbytes > INLINE_BYTES:
            self._add_future(chunk, counter, args)
        else:
            calls.append(Call(counter, encoded.join(), encoded.refs))

    def _add_future(self, chunk: _Chunk, counter: int, args: tuple[Any, ...]) -> None:
        """A call that cannot leave at once goes by itself; its future stands in for the outcome."""
        future = self._caller.submit(args, {})
        future.ends_with_client = True
        chunk.futures.append(future)
        Future.add_done_callback(future, lambda _: chunk.put(counter, future))


def _sizes(chunk: int | None, lane: Lane) -> Iterator[int]:
    """How many calls the next chunks hold."""
    if chunk is not None:
        if chunk < 1:
            raise ValueError(f"chunk={chunk}: expected 1 or more calls")
        while True:
            yield min(chunk, SHORT_FRAME_CALLS)
    size = 1
    while size < FRAME_CALLS:
        yield from [size] * _CHUNKS_A_SIZE
        size *= 2
    while True:
        yield lane.frame_calls
