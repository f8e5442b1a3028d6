"""``flame.Executor``: the cluster as a ``concurrent.futures.Executor``."""

from __future__ import annotations

import concurrent.futures
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from time import monotonic
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, Unpack

from flame.calls import Caller
from flame.client import default_client
from flame.leaving import leaving
from flame.options import ServiceOptions, make_options
from flame.packaging import TargetCache, pack_target
from flame.progress import Bar
from flame.waiting import wait_for_all
from flame.window import Gate
from flame_broker.errors import FlameError, PackagingError

if TYPE_CHECKING:
    from flame.client import Client
    from flame.futures import ObjectFuture

__all__ = ["Executor"]

P = ParamSpec("P")
R = TypeVar("R")


class _Executors:
    """The executors of this process; the interpreter does not end before their calls have."""

    def __init__(self) -> None:
        self._made: weakref.WeakSet[Executor] = weakref.WeakSet()
        self._lock = threading.Lock()
        self.ending = False

    def add(self, executor: Executor) -> None:
        """Note one to be waited for."""
        with self._lock:
            self._made.add(executor)

    def finish(self) -> None:
        """Accept no more calls anywhere, and wait for those that were made."""
        with self._lock:
            self.ending = True
            made = [*self._made]
        for executor in made:
            executor.shutdown(wait=False)
        leaving.wait_for(future for executor in made for future in executor.pending_futures())

    def forget_locks(self) -> None:
        """In a forked child: locks that were held at the fork stay held for ever."""
        self._lock = threading.Lock()
        for executor in [*self._made]:
            executor.forget_locks()


_executors = _Executors()


class Executor(concurrent.futures.Executor):
    """Runs functions on the workers; a drop-in for the standard library's executors.

    As theirs do, it keeps the program from ending before its calls have, shut down or not. Unlike
    theirs, a ``with`` block that Ctrl-C leaves does not wait: it cancels what has not started.

    A function is packed when it is first submitted and known by identity from then on: if its
    closure or the globals it uses change later, workers keep what was sent first. ``cancel()``
    of a future also stops a call that runs.

    Args:
        max_workers: At most so many calls at once; None for as many as the workers take.
        client: Who sends the calls; by default the client that was connected last.
        service_options: As for ``Runner.service``.

    Raises:
        ValueError: ``max_workers`` is not positive, or an option has an impossible value.

    >>> with Executor() as executor:
    ...     print(list(executor.map(pow, [2, 3], [5, 2])))
    [32, 9]
    """

    def __init__(
        self,
        max_workers: int | None = None,
        *,
        client: Client | None = None,
        **service_options: Unpack[ServiceOptions],
    ) -> None:
        if max_workers is not None and max_workers <= 0:
            raise ValueError("max_workers must be greater than 0")
        make_options(self, echo=True, given=service_options)  # wrong ones are refused here
        self._client = client
        self._options = service_options
        self._gate = None if max_workers is None else Gate(max_workers)
        self._callers = TargetCache()
        self._lock = threading.Lock()
        self._shut = False
        _executors.add(self)

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> ObjectFuture[R]:
        """Start ``fn(*args, **kwargs)`` on a worker.

        Raises:
            RuntimeError: The executor was shut down, or the program ends.
        """
        with self._lock:
            if _executors.ending:
                raise RuntimeError("cannot schedule new futures after interpreter shutdown")
            if self._shut:
                raise RuntimeError("cannot schedule new futures after shutdown")
            caller: Caller = self._callers.find(fn, lambda: self._make_caller(fn))
            future = self._submit(caller, args, kwargs)
            future.owner = self
            return future

    def map(
        self,
        fn: Callable[..., R],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,  # calls are packed as they come
        buffersize: int | None = None,
    ) -> Iterator[R]:
        """Call for each item; the results in order, with a progress bar on a terminal.

        Args:
            fn: What to call.
            iterables: The first arguments, the second, and so on; the shortest ends it.
            timeout: Seconds from now on, after which reading a result raises ``TimeoutError``.
            chunksize: Without effect, as with threads.
            buffersize: How many calls may be ahead of the results that were read, as in Python
                3.14; by default all are submitted at once.
        """
        if buffersize is not None and not isinstance(buffersize, int):
            raise TypeError("buffersize must be an integer or None")
        if buffersize is not None and buffersize < 1:
            raise ValueError("buffersize must be None or > 0")
        deadline = None if timeout is None else monotonic() + timeout
        calls = (self.submit(fn, *args) for args in zip(*iterables, strict=False))
        futures = deque(islice(calls, buffersize))
        bar = Bar(
            futures[0].label if futures else "", None if buffersize is not None else len(futures)
        )
        return _in_order(futures, calls, deadline, bar)

    def _submit(self, caller: Caller, args: Any, kwargs: Any) -> ObjectFuture[Any]:
        try:
            return caller.submit(args, kwargs)
        except PackagingError as exc:
            # The standard library's executors report this through the future.
            return caller.failed(exc)

    def _make_caller(self, fn: Callable[..., Any]) -> Caller:
        if not callable(fn):
            raise TypeError(f"expected a function, found a {type(fn).__name__}")
        if self._client is None:
            self._client = default_client()
        options = make_options(fn, echo=True, given=self._options)
        return Caller(self._client, pack_target(fn), options, gate=self._gate)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more calls.

        Args:
            wait: Return when all calls have ended. If not, the program waits for them as it ends.
            cancel_futures: Cancel the calls that have not started. Those that are published are
                asked back from the workers, and end as cancelled when a worker says so.

        Raises:
            FlameError: This would wait inside a done-callback, which runs in the client's thread.
        """
        with self._lock:
            futures = self.pending_futures()
            if wait and futures:
                self._check_may_wait()
            self._shut = True
        if cancel_futures:
            self._recall(futures)
        if wait:
            wait_for_all(futures)

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._leave()
        else:
            self.shutdown(wait=True)

    def _leave(self) -> None:
        """Ctrl-C left the ``with`` block: nobody waits for what runs, not the end either."""
        for future in self.pending_futures():
            future.ends_with_client = True
        self.shutdown(wait=False, cancel_futures=True)

    def _check_may_wait(self) -> None:
        if self._client is not None and not self._client.session.desk.may_block():
            raise FlameError(
                "waiting for an executor's calls inside a done-callback would stop the client "
                "itself; use shutdown(wait=False) there"
            )

    def forget_locks(self) -> None:
        """In a forked child: see ``ObjectFuture.forget_locks``."""
        self._lock = threading.Lock()

    def pending_futures(self) -> list[ObjectFuture[Any]]:
        """Our futures that are not done; the client's table has every one."""
        if self._client is None:
            return []
        return [future for future in self._client.pending_futures() if future.owner is self]

    def _recall(self, futures: list[ObjectFuture[Any]]) -> None:
        published = [future for future in futures if not future.recall()]
        if published and self._client is not None:
            self._client.session.desk.recall(published)


def _in_order(
    futures: deque[ObjectFuture[R]],
    more: Iterator[ObjectFuture[R]],
    deadline: float | None,
    bar: Bar,
) -> Iterator[R]:
    """The results, in order; whoever leaves early cancels the rest."""
    try:
        while futures:
            futures.extend(islice(more, 1))
            left = None if deadline is None else max(0.0, deadline - monotonic())
            if not bar.wait(futures[0].wait, left):
                raise TimeoutError(f"{futures[0]!r} is not done in time")
            # Popped before the result is out: nothing here keeps either of them alive.
            yield futures.popleft().result(0)
            bar.advance(1)
    finally:
        for future in futures:
            future.cancel()
        bar.close()


os.register_at_fork(after_in_child=_executors.forget_locks)
# As concurrent.futures.thread does it; registered after it and after the client, so that this is
# called before them: the calls may need pools of threads, which take no work once their turn has
# come. A function of atexit would be too late.
threading._register_atexit(_executors.finish)  # type: ignore[attr-defined]  # noqa: SLF001
