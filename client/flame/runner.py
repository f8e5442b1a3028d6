"""``Runner``: functions of your program as services of the cluster."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Self, TypeVar, overload

from flame.client import default_client
from flame.options import ServiceOptions, check_callable, make_options
from flame.packaging import pack_target
from flame.progress import watch
from flame.retry import Retry
from flame.service import RunnerService
from flame.waiting import as_they_end
from flame_broker.errors import ConfigError, FlameError

if TYPE_CHECKING:
    from datetime import timedelta

    from flame.client import Client
    from flame.futures import ObjectFuture
    from flame_broker.objects import ObjectRef
    from flame_broker.resources import ResourceRequirement

__all__ = ["Runner"]

R = TypeVar("R")


class Runner:
    """Makes services and collects their results.

    Args:
        name: A name for what it makes; one is made up if none is given.
        fail_if_exists: Refuse a name that is in use; needs the orchestrator.
        dependencies: Packages that the calls need; not there yet.
        python_version: The Python that the calls need; not there yet.
        client: Who sends the calls; by default the client that was connected last.
        echo: Show on this console what the calls print.

    Raises:
        ConfigError: An option that this version does not have yet.

    >>> with Runner("pi-estimation") as runner:
    ...     estimator = runner.service(estimate_batch)
    ...     results = runner.get([estimator(1000) for _ in range(10)])
    """

    def __init__(
        self,
        name: str | None = None,
        fail_if_exists: bool = False,
        *,
        dependencies: Iterable[str] | None = None,
        python_version: str | None = None,
        client: Client | None = None,
        echo: bool = True,
    ) -> None:
        for option, value in (
            ("fail_if_exists", fail_if_exists),
            ("dependencies", dependencies),
            ("python_version", python_version),
        ):
            if value:
                raise ConfigError(f"Runner({option}=…) is not there yet in this version")
        self.name = name or f"runner-{secrets.token_hex(4)}"
        self._client = client
        self._echo = echo
        self._services: list[RunnerService[Any]] = []
        self._closed = False

    @property
    def client(self) -> Client:
        """Who sends the calls."""
        if self._client is None:
            self._client = default_client()
        return self._client

    def service(  # noqa: PLR0913  # the public contract
        self,
        obj: Callable[..., R],
        stateful: bool | None = None,
        autoscale: bool | None = None,
        warmup: int = 0,
        resreq: ResourceRequirement | str | None = None,
        *,
        retry: Retry | None = None,
        timeout: float | timedelta | None = None,
        queue_timeout: float | timedelta | None = None,
        priority: str = "normal",
        pool: str = "default",
        delivery: str = "at_least_once",
        track: bool = True,
    ) -> RunnerService[R]:
        """Expose a function: each call of the service runs it on a worker.

        The function is packed now; a function that is defined anew needs a new service.

        Args:
            obj: A function, builtin, partial, bound method or callable object.
            stateful: For instances only, which this version does not serve yet.
            autoscale: False runs at most ``warmup`` calls (or one) at a time.
            warmup: How many calls at a time with ``autoscale=False``; else the cluster decides.
            resreq: What a call reserves, such as ``"cpu=2,mem=4g,gpu=1"``.
            retry: Which failures are tried again, how often and when; needs an orchestrator.
            timeout: How long a call may run: seconds or a ``timedelta``.
            queue_timeout: How long a call may wait for a worker.
            priority: ``high``, ``normal`` or ``low``.
            pool: Whose workers.
            delivery: ``at_least_once``: after a lost worker a call runs again; or ``at_most_once``:
                it is never started twice, and a lost run ends as ``WorkerLost``; needs an
                orchestrator.
            track: Keep a record of the calls, where an orchestrator does so.

        Raises:
            PackagingError: The function refers to something that cannot be pickled.
            ConfigError: An option that this version does not have yet.
            ResourceError: ``resreq`` makes no sense.
            ValueError: An option has a value that it cannot have.
        """
        if self._closed:
            raise FlameError(f"the runner {self.name} is closed")
        given = ServiceOptions(
            stateful=stateful,
            autoscale=autoscale,
            warmup=warmup,
            resreq=resreq,
            retry=retry,
            timeout=timeout,
            queue_timeout=queue_timeout,
            priority=priority,
            pool=pool,
            delivery=delivery,
            track=track,
        )
        fn = check_callable(obj)
        options = make_options(fn, echo=self._echo, given=given)
        service: RunnerService[R] = RunnerService(self.client, pack_target(fn), options)
        self._services.append(service)
        return service

    @overload
    def get(self, futures: ObjectFuture[R], timeout: float | None = None) -> R: ...

    @overload
    def get(self, futures: Iterable[Any], timeout: float | None = None) -> list[Any]: ...

    def get(self, futures: Any, timeout: float | None = None) -> Any:
        """The results of one future or of many, in the same order; lists may be nested.

        A progress bar is shown on a terminal.

        Args:
            futures: A future, or lists and tuples of them.
            timeout: Seconds for all together; None for ever.

        Raises:
            TimeoutError: Not all were done in time; the calls go on.
            BaseException: What the first failed call raised.
        """
        nested = _listed(futures)
        if not watch(_flat(nested), timeout):
            raise TimeoutError(f"not all calls were done after {timeout:g} s")
        return _each(nested, lambda future: future.result(0))

    def ref(self, futures: Any) -> Any:
        """The references of one future's result or of many, waited for."""
        return _each(_listed(futures), lambda future: future.ref())

    def wait(self, futures: Any, timeout: float | None = None) -> bool:
        """Wait for one future or for many, without fetching results.

        Returns:
            False if they were not all done after ``timeout`` seconds.
        """
        return watch(_flat(_listed(futures)), timeout)

    def select(self, futures: Any) -> Iterator[ObjectFuture[Any]]:
        """The futures in the order in which they end."""
        return as_they_end(_flat(_listed(futures)))

    def put_object(self, obj: object) -> ObjectRef:
        """Store a value once, to be passed to many calls by its reference."""
        return self.client.put_object(obj)

    def close(self) -> None:
        """Close its services; calls that were made go on. Safe to call twice."""
        self._closed = True
        for service in self._services:
            service.close()
        self._services.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Runner {self.name}{', closed' if self._closed else ''}>"


def _listed(futures: Any) -> Any:
    """Iterators read once and for all; a future stays what it is."""
    from flame.futures import ObjectFuture

    if isinstance(futures, ObjectFuture):
        return futures
    if isinstance(futures, (str, bytes)) or not isinstance(futures, Iterable):
        raise TypeError(f"expected futures, found a {type(futures).__name__}")
    return [_listed(one) for one in futures]


def _flat(nested: Any) -> list[ObjectFuture[Any]]:
    if isinstance(nested, list):
        return [future for one in nested for future in _flat(one)]
    return [nested]


def _each(nested: Any, read: Callable[[ObjectFuture[Any]], Any]) -> Any:
    if isinstance(nested, list):
        return [_each(one, read) for one in nested]
    return read(nested)
