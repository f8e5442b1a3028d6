"""Flame: calls, services, runnables and jobs over a message queue.

>>> import flame
>>> with flame.Runner() as runner:
...     square = runner.service(lambda x: x * x)
...     print(runner.get([square(n) for n in range(4)]))
[0, 1, 4, 9]

Names are imported when they are first used, so that ``import flame`` itself costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flame import errors as errors
    from flame.attached import attach as attach
    from flame.client import Client as Client
    from flame.client import connect as connect
    from flame.executor import Executor as Executor
    from flame.futures import ObjectFuture as ObjectFuture
    from flame.limit import Limit as Limit
    from flame.mapping import MapResults as MapResults
    from flame.retry import Retry as Retry
    from flame.runnable.base import Runnable as Runnable
    from flame.runnable.safe import SafeExecutionContext as SafeExecutionContext
    from flame.runner import Runner as Runner
    from flame.schedule import Schedule as Schedule
    from flame.service import RunnerService as RunnerService
    from flame_broker.context import CallContext as CallContext
    from flame_broker.context import current_call as current_call
    from flame_broker.objects import ObjectRef as ObjectRef
    from flame_broker.resources import ResourceRequirement as ResourceRequirement

__version__ = "0.1.0"

_HOMES = {
    "CallContext": "flame_broker.context",
    "Client": "flame.client",
    "Executor": "flame.executor",
    "Limit": "flame.limit",
    "MapResults": "flame.mapping",
    "ObjectFuture": "flame.futures",
    "ObjectRef": "flame_broker.objects",
    "ResourceRequirement": "flame_broker.resources",
    "Retry": "flame.retry",
    "Runnable": "flame.runnable.base",
    "Runner": "flame.runner",
    "RunnerService": "flame.service",
    "SafeExecutionContext": "flame.runnable.safe",
    "Schedule": "flame.schedule",
    "attach": "flame.attached",
    "connect": "flame.client",
    "current_call": "flame_broker.context",
}

__all__ = [  # noqa: PLE0604  # names only, from the table above
    "__version__",
    "errors",
    *_HOMES,
]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("flame.errors")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'flame' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
