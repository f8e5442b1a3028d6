"""Classes that travel by value, and how a result names them.

A class of the user's ``__main__`` reaches a child by value, in the pickle of a target or an
argument. cloudpickle gives each such class an id, kept on both sides. A result refers to that id
(and to module and name, for a client that was restarted) instead of carrying the class back:
cloudpickle would apply the carried state to the client's own class.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

from cloudpickle import cloudpickle

from flame_broker.errors import PackagingError

__all__ = ["by_reference"]

_made_here: weakref.WeakSet[type] = weakref.WeakSet()
"""Dynamic classes born in this process: nobody else has them, they travel by value."""


def by_reference(cls: type) -> tuple[Any, ...] | None:
    """How to pickle a class that this process received by value; None for any other class."""
    if cls in _made_here:
        return None
    tracker_id = cloudpickle._DYNAMIC_CLASS_TRACKER_BY_CLASS.get(cls)  # noqa: SLF001  # see below
    if tracker_id is None:
        if _is_dynamic(cls):
            _made_here.add(cls)
        return None
    return _find_class, (cls.__module__, cls.__qualname__, tracker_id)


def _is_dynamic(cls: type) -> bool:
    # cloudpickle has no public name for its decision or its ids; a test pins both.
    return not cloudpickle._should_pickle_by_reference(cls)  # noqa: SLF001


def _find_class(module: str, qualname: str, tracker_id: str) -> type:
    """The client's own class: by cloudpickle's id, else by name."""
    tracked = cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID.get(tracker_id)  # noqa: SLF001
    if tracked is not None:
        return tracked  # type: ignore[no-any-return]
    found: Any = sys.modules.get(module)
    for name in qualname.split("."):
        found = getattr(found, name, None)
    if not isinstance(found, type):
        raise PackagingError(
            f"a result holds a {module}.{qualname}, which this program does not define; "
            "define it, or install the module on both sides"
        )
    return found
