"""``ObjectFuture``: the outcome of one call, a ``concurrent.futures.Future`` in every respect.

*Finished* and *materialised* are two things. The courier's thread only notes the encoded outcome;
whoever asks for the result decodes it, or downloads it when it is large, in his own thread.

Most futures are never waited for one by one, so what waiting needs (a condition, lists of waiters
and callbacks) is made when it is first asked for. The settling side looks for a condition and, if
there is none, writes the state: no other thread runs between the two, since CPython changes threads
at calls and at backward jumps only. Whoever makes a condition later sees the state.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import CancelledError, Future, InvalidStateError
from concurrent.futures._base import (
    CANCELLED,
    CANCELLED_AND_NOTIFIED,
    FINISHED,
    PENDING,
)
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from flame.bell import Bell
from flame.streams import Items, ItemStream, call_in, no_generator
from flame.window import Gate
from flame_broker.errors import CallCancelled, FlameError, StoreError
from flame_broker.logs import get_logger
from flame_broker.messages import Result, Status, call_id
from flame_broker.objects import ObjectRef

if TYPE_CHECKING:
    from flame.desk import Desk
    from flame.lanes import Lane

__all__ = ["ObjectFuture"]

_log = get_logger("flame.client")

T = TypeVar("T")
_Opened = tuple[Any, BaseException | None]
_OVER = (CANCELLED, CANCELLED_AND_NOTIFIED, FINISHED)


class ObjectFuture(Future[T]):
    """The outcome of a call, to come.

    Made by services and executors, never by hand. Beyond ``concurrent.futures.Future`` it can be
    awaited, names its call (``id``), and gives a reference instead of the value (``ref``).
    """

    # Class attributes stand for "not yet": a fresh future is three attributes, not ten.
    _state = PENDING
    _outcome: Result | None = None
    _opened: _Opened | None = None
    _ref: ObjectRef | None = None
    _items: Items | None = None
    _progress: tuple[float, str] = (0.0, "")
    _started = False
    _wanted_in_loop = False
    _recalled = False
    ends_with_client = False
    published = 0
    gate: Gate | None = None
    lane: Lane | None = None
    owner: object = None

    def __init__(self, desk: Desk, counter: int, label: str) -> None:
        # Future.__init__ is left out on purpose: __getattr__ makes its parts when needed.
        self._desk = desk
        self._counter = counter
        self._label = label

    def __getattr__(self, name: str) -> Any:
        if name == "_condition":
            return self.__dict__.setdefault(name, threading.Condition())
        if name == "_fetching":
            return self.__dict__.setdefault(name, threading.Lock())
        if name in ("_waiters", "_done_callbacks", "_listeners"):
            return self.__dict__.setdefault(name, [])
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # What users call

    @property
    def id(self) -> str:
        """The call's id, ``<client>-<counter>``, as the command line and logs show it."""
        return call_id(self._desk.client_id, self._counter)

    @property
    def label(self) -> str:
        """The name of what is called."""
        return self._label

    @property
    def progress(self) -> tuple[float, str]:
        """The last ``(fraction, text)`` that the call reported; ``(1.0, …)`` when it is done."""
        return (1.0, self._progress[1]) if self._state == FINISHED else self._progress

    def get(self, timeout: float | None = None) -> T:
        """The result, waited for; with a progress bar on a terminal.

        Args:
            timeout: Seconds to wait; None for ever.

        Raises:
            TimeoutError: Not finished in time; the call goes on.
            concurrent.futures.CancelledError: It was cancelled.
            BaseException: What the call raised, with the remote traceback as its cause.
        """
        if self._state not in _OVER:
            from flame.progress import watch

            if not watch([self], timeout):
                raise TimeoutError(f"{self!r} is not done after {timeout:g} s")
        return self.result(0)

    def ref(self) -> ObjectRef:
        """A reference to the result in the store, waited for.

        A small result came with its message; it is uploaded when this is asked.
        """
        self._await_end(None)
        if self._ref is None:
            outcome = self._outcome
            if outcome is not None and outcome.ref is not None:
                self._ref = outcome.ref
            elif outcome is not None and _is_value(outcome) and not outcome.index:
                self._ref = self._desk.store_value(outcome, None)
            else:
                self._ref = self._desk.store_value(None, self.result())
        return self._ref

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the call has ended, without fetching what it returned.

        Returns:
            False if it was still going after ``timeout`` seconds.
        """
        return self.wait_for(self.done, timeout)

    def stream(self) -> ItemStream[Any]:
        """The items of a generator, as they arrive: an iterator, also an asynchronous one.

        It raises TypeError if the call returned a value; ``[]`` passes for an empty stream.
        """
        return ItemStream(self)

    def logs(self) -> list[str]:
        """The last thousand lines that have arrived; of an attached call, all that are kept."""
        return self._desk.lines_of(self._counter)

    def __await__(self) -> Generator[Any, None, T]:
        return self._arrive().__await__()

    async def _arrive(self) -> T:
        await self.ended()
        if self._is_large():
            return await asyncio.get_running_loop().run_in_executor(None, self.result)
        return self.result()

    async def ended(self) -> None:
        """Await the end of the call without fetching its result; cancelling this cancels it."""
        if self._state in _OVER:
            return
        loop = asyncio.get_running_loop()
        over = asyncio.Event()
        Future.add_done_callback(self, lambda _: call_in(loop, over.set))
        try:
            await over.wait()
        except asyncio.CancelledError:
            self.cancel()
            raise

    # What concurrent.futures promises

    def result(self, timeout: float | None = None) -> T:
        """See ``get``; without the progress bar."""
        if self._state != FINISHED:
            self._await_end(timeout)
        value, exc = self._opened or self._open()
        if exc is None:
            return value  # type: ignore[no-any-return]
        try:
            raise exc
        finally:
            del self, exc  # the traceback holds this frame: break the cycle

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What the call raised, or None; waited for."""
        self._await_end(timeout)
        if self._is_large():
            return None
        try:
            return self._open()[1]
        except StoreError as exc:
            return exc

    def cancel(self) -> bool:
        """Give up on the call: at once here, and soon where it waits or runs.

        Returns:
            True unless it has finished.
        """
        if self._state == PENDING and self._desk.withdraw(self):
            self.settle_cancelled()
        return self.cancelled()

    def recall(self) -> bool:
        """Cancel the call unless it has started, as an executor's shutdown does.

        Returns:
            True if it is cancelled already; else its outcome will say what became of it.
        """
        if not self.published and self.cancel():
            return True
        self._recalled = True
        return False

    def _came_back(self, result: Result) -> bool:
        if result.status is not Status.FAILED:
            return False
        return isinstance(self._desk.open_outcome(result, self._label)[1], CallCancelled)

    def cancelled(self) -> bool:
        """Whether the call was cancelled."""
        return self._state in (CANCELLED, CANCELLED_AND_NOTIFIED)

    def running(self) -> bool:
        """Whether the call is known to run: it has reported progress, output or an item.

        Workers do not announce a start, so False means "not known to".
        """
        return self._started and self._state == PENDING

    def done(self) -> bool:
        """Whether it has finished or was cancelled."""
        return self._state in _OVER

    def set_result(self, result: T) -> None:
        """End the call from here with a result of one's own; for tests, as the stdlib says."""
        self._end_here((result, None))

    def set_exception(self, exception: BaseException | None) -> None:
        """End the call from here with an exception of one's own."""
        self._end_here((None, exception))

    def set_running_or_notify_cancel(self) -> bool:
        """Whether the call is still wanted."""
        return not self.cancelled()

    def _end_here(self, opened: _Opened) -> None:
        if not self._desk.withdraw(self):
            raise InvalidStateError(f"{self!r} has an outcome already")
        self._end(opened)

    def add_done_callback(self, fn: Callable[[Future[T]], object]) -> None:
        """Call ``fn`` with this future when it has ended; in the client's thread, so be brief.

        Registered inside an event loop (as ``asyncio.wrap_future`` does), it is called when a
        large result has been fetched too, so that reading it does not block that loop.
        """
        if asyncio._get_running_loop() is None:  # noqa: SLF001  # documented for this use
            super().add_done_callback(fn)
            return
        self._wanted_in_loop = True
        if self._state in _OVER and self._is_large():
            self._desk.in_background(partial(self._prefetch, lambda: fn(self)))
        else:
            super().add_done_callback(fn)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            f"the future of {self._label} cannot be sent as it is; as an argument it may stand "
            "alone or in lists, tuples, sets, dicts and dataclasses"
        )

    def __repr__(self) -> str:
        state = self._state.lower().partition("_")[0]
        return f"<ObjectFuture {self.id} of {self._label}: {state}>"

    def _get_snapshot(self) -> tuple[bool, bool, Any, BaseException | None]:
        # Python 3.14's asyncio reads a future through this, past result() and exception().
        if self._state != FINISHED:
            return self.done(), self.cancelled(), None, None
        return (True, False, *self._open())

    def went_well(self) -> bool:
        """Whether the call has ended and returned something."""
        if self._opened is not None:
            return self._state == FINISHED and self._opened[1] is None
        return self._state == FINISHED and _is_value(self._outcome)

    def as_argument(self) -> Any:
        """What stands for this finished future in another call: its reference or its value.

        Raises:
            BaseException: What the call raised; it is then the outcome of the other call too.
        """
        if self._ref is None and self._is_large() and _is_value(self._outcome):
            self._ref = self._outcome.ref if self._outcome is not None else None
        return self._ref if self._ref is not None else self.result(0)

    @property
    def counter(self) -> int:
        """The number of the call at its client."""
        return self._counter

    # Called by the courier, in its thread

    def settle(self, result: Result) -> None:
        """Take the outcome. The courier calls it once, for the first terminal result."""
        if self._recalled and self._came_back(result):
            self.settle_cancelled()
            return
        self._outcome = result
        if "_condition" not in self.__dict__:
            self._state = FINISHED
        else:
            self._announce(FINISHED)

    def fail_call(self, counter: int, exc: BaseException) -> None:
        """End without an outcome from a worker."""
        self._end((None, exc))

    def _end(self, opened: _Opened) -> None:
        self._opened = opened
        if "_condition" not in self.__dict__:
            self._state = FINISHED
        else:
            self._announce(FINISHED)

    def settle_cancelled(self) -> None:
        """End as cancelled, for waiters too."""
        if "_condition" not in self.__dict__:
            self._state = CANCELLED_AND_NOTIFIED
        else:
            self._announce(CANCELLED_AND_NOTIFIED)

    def follow(self, result: Result) -> Result | None:
        """Take an item, or the outcome of a stream: given back when every item is here."""
        if self._items is None:
            self._items = Items()
        outcome = self._items.add(result)
        if result.status is Status.ITEM:
            self.take_sign_of_life()
            self._tell_listeners()
        return outcome

    def take_progress(self, fraction: float, text: str) -> None:
        """Take a progress report."""
        self._progress = (fraction, text)
        self.take_sign_of_life()

    def take_sign_of_life(self) -> None:
        """Note that the call runs."""
        self._started = True

    def forget_locks(self) -> None:
        """In a forked child: locks that another thread held at the fork are never released."""
        if "_condition" in self.__dict__:
            self.__dict__["_condition"] = threading.Condition()

    # How it waits and wakes

    def _announce(self, state: str) -> None:
        # The state changes under the lock, because wait() and as_completed() look at it twice.
        with self._condition:
            self._state = state
            for waiter in self._waiters:
                if self._state == CANCELLED_AND_NOTIFIED:
                    waiter.add_cancelled(self)
                elif self.went_well():
                    waiter.add_result(self)
                else:
                    waiter.add_exception(self)
            self._condition.notify_all()
        self._tell_listeners()
        if self._wanted_in_loop and self._is_large():
            self._desk.in_background(partial(self._prefetch, self._call_back))
        else:
            self._call_back()

    def _call_back(self) -> None:
        try:
            self._invoke_callbacks()
        # No Exceptions, so the standard library lets them pass; they would end our loop.
        except (SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError):
            _log.exception("callback.left", call=self.id)

    def _tell_listeners(self) -> None:
        if "_condition" in self.__dict__:
            for listener in [*self._listeners]:
                listener()

    def _await_end(self, timeout: float | None) -> None:
        """Wait for the end; TimeoutError and CancelledError as the standard library has them."""
        if not self.wait_for(self.done, timeout):
            raise TimeoutError(f"{self!r} is not done after {timeout:g} s")
        if self._state != FINISHED:
            raise CancelledError

    # What a stream reads

    @property
    def items(self) -> list[Result]:
        """The items that have arrived, encoded."""
        return [] if self._items is None else self._items.ready

    def wait_for(self, condition: Callable[[], bool], timeout: float | None) -> bool:
        """Wait until something holds that the courier brings about; False if it took too long."""
        if condition():
            return True
        if timeout is not None and timeout <= 0:
            return False
        if not self._desk.may_block():
            raise FlameError(
                f"waiting for {self!r} inside a done-callback would stop the client itself; "
                "start what must wait in a thread of your own"
            )
        bell = Bell()
        with self.listening(bell.ring):
            return bell.wait_for(condition, timeout)

    @contextmanager
    def listening(self, listener: Callable[[], object]) -> Iterator[None]:
        """Have ``listener`` called, in the courier's thread, at each item and at the end."""
        self._condition  # noqa: B018  # from here on, who settles looks for listeners
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    def open_item(self, item: Result) -> Any:
        """Decode an item; large ones are downloaded."""
        value, exc = self._desk.open_outcome(item, self._label)
        if exc is not None:
            raise exc
        return value

    def check_end(self) -> None:
        """Raise what the call raised, or TypeError if it returned a value and gave no items."""
        if not self.went_well():
            self.result(0)
        elif not self.items and self._is_large():
            raise no_generator(self._label, "a large value")
        elif not self.items and not (type(value := self.result(0)) is list and not value):
            raise no_generator(self._label, f"a {type(value).__name__}")

    # How it is read

    def _is_large(self) -> bool:
        outcome = self._outcome
        if self._opened is not None or outcome is None:
            return False
        if outcome.index and self._items is not None and _is_value(outcome):
            return self._items.large
        return outcome.ref is not None

    def _open(self) -> _Opened:
        """The value or the exception, one object whoever asks."""
        outcome = self._outcome
        if outcome is None:
            assert self._opened is not None
            return self._opened
        if outcome.ref is not None or outcome.index:
            with self._fetching:
                opened = self._set_opened(self.__dict__.get("_opened") or self._fetch(outcome))
                self._ref = outcome.ref
                return opened
        # Two threads may both decode a small value; the first one's counts.
        return self._set_opened(self._desk.open_outcome(outcome, self._label))

    def _set_opened(self, opened: _Opened) -> _Opened:
        first: _Opened = self.__dict__.setdefault("_opened", opened)
        self._outcome = None
        return first

    def _fetch(self, outcome: Result) -> _Opened:
        if outcome.index and self._items is not None:
            return self._desk.open_stream(self._items.ready, outcome, self._label)
        return self._desk.open_outcome(outcome, self._label)

    def _prefetch(self, then: Callable[[], object]) -> None:
        """Materialise for an event loop, which must then find a result or an exception."""
        try:
            self._open()
        except StoreError as exc:
            self._set_opened((None, exc))
        then()


def _is_value(outcome: Result | None) -> bool:
    return outcome is not None and outcome.status is Status.OK
