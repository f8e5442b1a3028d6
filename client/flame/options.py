"""From the options that users write to the ones that travel; what is wrong is refused here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from numbers import Real
from time import time
from typing import Any, Final, TypedDict

from flame.calls import CallOptions
from flame.futures import ObjectFuture
from flame.lanes import Terms
from flame.limit import Limit
from flame.packaging import target_name
from flame.retry import Retry
from flame_broker.errors import ConfigError, FlameError
from flame_broker.messages import Priority, is_plain, parse_call_id
from flame_broker.resources import ResourceRequirement
from flame_broker.topology import DEFAULT_POOL, check_pool

__all__ = ["ServiceOptions", "check_callable", "make_options", "make_terms", "seconds"]

_KEY_CHARACTERS: Final = 500


class ServiceOptions(TypedDict, total=False):
    """What ``Runner.service`` and ``Executor`` take."""

    stateful: bool | None
    autoscale: bool | None
    warmup: int
    resreq: ResourceRequirement | str | None
    retry: Retry | None
    timeout: float | timedelta | None
    queue_timeout: float | timedelta | None
    priority: str
    pool: str
    delivery: str
    track: bool


def check_callable(obj: object) -> Callable[..., Any]:
    """The object, if it is something this version can serve: a function of any kind.

    Raises:
        FlameError: It is a class, or an instance whose methods would be the service.
        TypeError: It is nothing one could call.
    """
    if isinstance(obj, type):
        raise FlameError(
            f"services of classes are not there yet: give a function that makes a {obj.__name__}"
        )
    if callable(obj):
        return obj
    kind = type(obj).__name__
    if type(obj).__module__ != "builtins" and _public_methods(obj):
        raise FlameError(
            f"services of instances are not there yet: give a function, or a bound method of the "
            f"{kind} (each child then has its own copy of the {kind} and changes only that, until "
            "it is replaced, so do not rely on state)"
        )
    raise TypeError(f"expected a function, found a {kind}")


def _public_methods(obj: object) -> list[str]:
    found = inspect.getmembers_static(type(obj), callable)
    return [name for name, _ in found if not name.startswith("_")]


def make_options(obj: object, *, echo: bool, given: ServiceOptions) -> CallOptions:
    """Check the options of a service.

    Raises:
        ConfigError: An option that is not there yet, or two that do not go together.
        ResourceError: ``resreq`` makes no sense.
        TypeError: There is no such option, or its value is of a wrong type.
        ValueError: An option has a value that it cannot have.
    """
    unknown = given.keys() - ServiceOptions.__optional_keys__
    if unknown:
        names = ", ".join(sorted(ServiceOptions.__optional_keys__))
        raise TypeError(f"unknown option {min(unknown)!r}: expected one of {names}")
    retry = _retry(given.get("retry"))
    at_most_once = _is_at_most_once(given.get("delivery", "at_least_once"))
    warmup: object = given.get("warmup", 0)
    if not isinstance(warmup, int) or warmup < 0:
        raise ValueError(f"warmup={warmup!r}: expected 0 or more, as an integer")
    if _switch("stateful", given.get("stateful")):
        raise ValueError(
            "stateful=True is for instances, which are not served yet: calls share no state"
        )
    autoscale = _switch("autoscale", given.get("autoscale"))
    if retry is not None and at_most_once:
        raise ConfigError(
            "delivery='at_most_once' never starts a call twice, and retry= does: leave one of the "
            "two out"
        )
    kept = retry is not None or at_most_once
    if kept and autoscale is False:
        raise ConfigError(
            "autoscale=False counts the calls that this client has on their way, and those with "
            "retry= or delivery='at_most_once' are kept by the orchestrator: leave one of the two "
            "out"
        )
    return CallOptions(
        label=target_name(obj).rpartition(":")[2].rpartition(".")[2],
        resources=_resource_class(given.get("resreq")),
        timeout_s=seconds("timeout", given.get("timeout")),
        queue_timeout_s=seconds("queue_timeout", given.get("queue_timeout")),
        priority=_priority(given.get("priority", "normal")),
        pool=_pool(given.get("pool", DEFAULT_POOL)),
        echo=echo,
        limit=max(1, warmup) if autoscale is False else None,
        track=bool(given.get("track", True)),
        retry=retry,
        kept=kept,
        at_most_once=at_most_once,
    )


def make_terms(
    not_before: datetime | timedelta | float | None = None,
    key: str = "",
    after: Iterable[ObjectFuture[Any] | str] = (),
    limit: Limit | None = None,
) -> Terms:
    """Check what one call asks of the orchestrator.

    Raises:
        TypeError: It is no time, no key, no call or no limit.
        ValueError: A time without its zone, or one that cannot be; a call that nobody follows.
    """
    _check_key(key)
    if limit is not None and not isinstance(limit, Limit):
        raise TypeError(f"limit={limit!r}: expected flame.Limit('license', 4), or None")
    limitation = None if limit is None else limit.limitation
    calls = tuple(dict.fromkeys(map(_call_to_await, [after] if isinstance(after, str) else after)))
    return Terms(_earliest(not_before), key, calls, limitation)


def _call_to_await(call: ObjectFuture[Any] | str) -> str:
    if isinstance(call, str):
        parse_call_id(call)
        return call
    if not isinstance(call, ObjectFuture):
        raise TypeError(f"after={call!r}: expected futures of calls, or their ids")
    lane = call.lane
    if lane is not None and lane.keeping is None and not lane.exchange:
        raise ValueError(
            f"after={call!r}: nobody follows that call, since its service has track=False or the "
            "broker knows no orchestrator"
        )
    return call.id


def _earliest(not_before: datetime | timedelta | float | None) -> float:
    if not_before is None:
        return 0.0
    if isinstance(not_before, datetime):
        if not_before.tzinfo is None:
            raise ValueError(
                f"not_before={not_before!r}: a time needs its zone, as in "
                "datetime.now(UTC) + timedelta(hours=1); workers may be elsewhere"
            )
        return max(0.0, not_before.timestamp())
    delay_s = _as_seconds(not_before)
    if delay_s is None:
        raise TypeError(
            f"not_before={not_before!r}: expected a datetime with its zone, or from now on a "
            "timedelta or seconds"
        )
    if not 0 <= delay_s < float("inf"):
        raise ValueError(f"not_before={not_before}: expected 0 seconds or more from now on")
    return time() + delay_s


def _check_key(key: object) -> None:
    if not isinstance(key, str):
        raise TypeError(f"key={key!r}: expected text")
    if not is_plain(key):
        raise ValueError(f"key={key!r}: expected text without a zero or half a character")
    if len(key) > _KEY_CHARACTERS:
        raise ValueError(f"key={key[:20]!r}…: expected at most {_KEY_CHARACTERS} characters")


def _retry(value: object) -> Retry | None:
    if value is not None and not isinstance(value, Retry):
        raise TypeError(f"retry={value!r}: expected flame.Retry(attempts=3, …), or None")
    return value


def _is_at_most_once(delivery: object) -> bool:
    if delivery not in ("at_least_once", "at_most_once"):
        raise ValueError(f"delivery={delivery!r}: expected 'at_least_once' or 'at_most_once'")
    return delivery == "at_most_once"


def seconds(name: str, value: float | timedelta | None) -> float:
    """A duration in seconds, 0 for none.

    Raises:
        TypeError: It is no duration.
        ValueError: It is not more than 0.
    """
    if value is None:
        return 0.0
    found = _as_seconds(value)
    if found is None:
        raise TypeError(f"{name}={value!r}: expected seconds as a number, a timedelta, or None")
    if not 0 < found < float("inf"):
        raise ValueError(f"{name}={value}: expected more than 0 seconds, or None for no limit")
    return found


def _as_seconds(value: object) -> float | None:
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, bool):
        return None
    return float(value) if isinstance(value, Real) else None


def _switch(name: str, value: object) -> bool | None:
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: expected True or False, or None for the default")
    return value


def _resource_class(resreq: ResourceRequirement | str | None) -> str:
    request = ResourceRequirement.from_string(resreq) if isinstance(resreq, str) else resreq
    if request is not None and not isinstance(request, ResourceRequirement):
        raise TypeError(f"resreq={resreq!r}: expected text such as 'cpu=2,mem=4g,gpu=1'")
    return (request or ResourceRequirement()).class_name


def _priority(name: str) -> Priority:
    try:
        return Priority(name)
    except ValueError:
        names = ", ".join(repr(one.value) for one in Priority)
        raise ValueError(f"priority={name!r}: expected one of {names}") from None


def _pool(name: object) -> str:
    try:
        return check_pool(name)
    except ValueError as exc:
        raise ValueError(f"pool={name!r}: {exc}") from None
