"""``RunnerService``: a function of yours, run by the workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from dataclasses import replace
from datetime import datetime, timedelta
from functools import cached_property, partial
from operator import length_hint
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from flame.calls import Caller, CallOptions
from flame.lanes import Terms
from flame.packaging import NOTHING, PackedTarget
from flame_broker.errors import ConfigError, FlameError

if TYPE_CHECKING:
    from flame.client import Client
    from flame.futures import ObjectFuture
    from flame.limit import Limit
    from flame.mapping import MapResults
    from flame.schedule import Schedule

__all__ = ["RunnerService"]

R = TypeVar("R")


class RunnerService(Generic[R]):
    """Calls a function on the workers; ``Runner.service`` makes one.

    >>> def double(value: int) -> int: ...
    >>> service = runner.service(double)
    >>> service(21).get()
    42
    """

    def __init__(self, client: Client, packed: PackedTarget, options: CallOptions) -> None:
        self._caller = Caller(client, packed, options)
        self._packed = packed
        self._options = options
        self._closed = False

    @property
    def name(self) -> str:
        """What its calls are called on the console."""
        return self._options.label

    def __call__(self, *args: Any, **kwargs: Any) -> ObjectFuture[R]:
        """Start a call and return at once.

        Futures and object references may stand in the arguments, also in lists, tuples, sets,
        dicts and dataclasses: the call starts when the futures are done, and gets the values.

        Raises:
            PackagingError: An argument cannot be pickled.
            ConfigError: An argument is over 64 KiB and no object store is configured.
        """
        if self._closed:
            raise self._is_closed()
        return self._caller.submit(args, kwargs)

    def options(
        self,
        *,
        not_before: datetime | timedelta | float | None = None,
        key: str = "",
        after: Iterable[ObjectFuture[Any] | str] = (),
        limit: Limit | None = None,
    ) -> Callable[..., ObjectFuture[R]]:
        """The same service, with terms for the calls that are made by what this returns.

        The orchestrator keeps such calls and has them run.

        Args:
            not_before: When a call may start: a ``datetime`` with its zone, or a ``timedelta`` or
                seconds from now on.
            key: What is to be done once: a second call with the same key does not run, its future
                gets the outcome of the first. The key is free again when the history forgets it.
            after: Calls that have to succeed first: their futures or ids. If one of them does not,
                the call ends as ``CallCancelled``, and says which.
            limit: How many calls with the same key may be under way at a time.

        Raises:
            ConfigError: The service has a limit of its own, ``autoscale=False``.
            TypeError: It is no time, no key, no call or no limit.
            ValueError: A time without its zone, or one that cannot be; a call that is not tracked.

        >>> nightly = service.options(not_before=timedelta(hours=8), key="report-2026-11-26")
        >>> nightly("accounts.csv").get()
        """
        from flame.options import make_terms

        terms = make_terms(not_before, key, after, limit)
        return partial(self._submit_kept, terms)

    def _submit_kept(self, terms: Terms, /, *args: Any, **kwargs: Any) -> ObjectFuture[R]:
        if self._closed:
            raise self._is_closed()
        return self._keeper.submit(args, kwargs, terms)

    @cached_property
    def _keeper(self) -> Caller:
        """Makes the calls that the orchestrator keeps."""
        if self._options.kept:
            return self._caller
        if self._options.limit is not None:
            raise ConfigError(
                f"{self.name} has autoscale=False, which counts the calls that this client has on "
                "their way; those with options() are kept by the orchestrator"
            )
        return Caller(self._caller.client, self._packed, replace(self._options, kept=True))

    def schedule(
        self,
        cron: str,
        /,
        *args: Any,
        name: str,
        timezone: str = "UTC",
        catch_up: str = "latest",
        overlap: bool = True,
        **kwargs: Any,
    ) -> Schedule:
        """Have the orchestrator make a call again and again, on a cron expression.

        It does so without this program, with the options of this service, and keeps the results.
        The schedule of this name is changed if there is one, so a program may say the same each
        time that it starts. A parameter of the function that is called as one of ours is given by
        position, or with ``functools.partial``.

        Args:
            cron: Minute, hour, day, month and weekday, as ``"0 3 * * mon-fri"``; with six fields
                the first is seconds. Also ``@hourly``, ``@daily``, ``@weekly``, ``@monthly``.
            args: The arguments of every call.
            name: By which it is known: letters, digits, ``.``, ``_`` and ``-``.
            timezone: On whose clocks, as ``"Europe/Berlin"``. A time that these skip is due when
                they go on; one that they repeat only once, unless the hour is ``*``.
            catch_up: What becomes of times that passed while no orchestrator ran: ``"none"``
                (nothing), ``"latest"`` (one call) or ``"all"`` (a call for each, at most 100).
            overlap: False makes no call while an earlier one of the schedule has not ended.
            kwargs: The arguments by name.

        Raises:
            PackagingError: An argument cannot be pickled, or is a future.
            ConfigError: There is no object store for what needs one, or ``autoscale=False``.
            FlameError: The expression names no time, or there is no such time zone.
            NoOrchestrator: No orchestrator runs here.
            TypeError: A value of a wrong type.
            ValueError: A name or a policy that cannot be.

        >>> service.schedule("0 3 * * *", "accounts.csv", timezone="Europe/Berlin", name="nightly")
        <flame.Schedule nightly>
        """
        from flame.schedule import Timetable, put_schedule

        if self._closed:
            raise self._is_closed()
        times = Timetable.checked(name, cron, timezone, catch_up, overlap)
        return put_schedule(self._caller, args, kwargs, times)

    def map(
        self, iterable: Iterable[Any], *more: Iterable[Any], chunk: int | None = None
    ) -> MapResults:
        """Call once for each item, or with one item of each iterable, as ``map`` does.

        Input is read lazily, at most 4,096 calls ahead of the results that were consumed, or as
        many as keep arguments and results that are not consumed within about 32 MiB.

        Args:
            iterable: The first arguments.
            more: The second arguments, and so on; the shortest ends it.
            chunk: How many items are read and sent together, up to 256; by default few at first.

        Returns:
            The results in order. What a call raised is raised at its place.
        """
        from flame.mapping import MapResults

        if self._closed:
            raise self._is_closed()
        inputs = zip(iterable, *more, strict=False)
        total = min((length_hint(one, 0) for one in (iterable, *more) if _sized(one)), default=None)
        return MapResults(self._caller, inputs, chunk=chunk, total=total)

    def ready(self, timeout: float | None = None) -> bool:
        """Whether a worker answers: one round trip through this service's queue.

        Args:
            timeout: Seconds to wait; None for ever.
        """
        # Its own timeout is the one that counts.
        options = replace(
            self._options, queue_timeout_s=0.0, retry=None, kept=False, at_most_once=False
        )
        probe = Caller(self._caller.client, NOTHING, options)
        future = probe.submit((), {})
        if future.wait(timeout):
            future.result(0)
            return True
        future.cancel()
        return False

    def close(self) -> None:
        """Accept no more calls; those that were made go on. Safe to call twice."""
        self._closed = True

    def __enter__(self) -> RunnerService[R]:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<RunnerService {self.name}{', closed' if self._closed else ''}>"

    def _is_closed(self) -> FlameError:
        return FlameError(f"the service {self.name} is closed; runner.service() makes a new one")


def _sized(iterable: object) -> bool:
    return isinstance(iterable, Sized)
