"""Futures inside arguments: found wherever plain containers or dataclasses hold them.

Nothing is searched for on the usual path: a future cannot be pickled, and only when that fails are
the arguments walked, the futures awaited, and their values put in their places.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

__all__ = ["find_futures", "replace_futures"]


def find_futures(value: object) -> list[Future[Any]]:
    """Every future in a value: itself, or in lists, tuples, sets, dicts and dataclasses."""
    return list(_futures(value, set()))


def _futures(value: object, seen: set[int]) -> Iterator[Future[Any]]:
    if isinstance(value, Future):
        yield value
        return
    parts = _parts(value)
    if parts is None or id(value) in seen:
        return
    seen.add(id(value))
    for part in parts:
        yield from _futures(part, seen)


def _parts(value: object) -> list[object] | None:
    """What a container holds; None for anything that is not one of those we look into."""
    if isinstance(value, (list, tuple, set, frozenset)):
        return [*value]
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    return None


def replace_futures(value: object, resolve: Callable[[Future[Any]], object]) -> Any:
    """A copy of the value with each future replaced by what ``resolve`` gives for it.

    Containers without a future in them are taken over as they are.
    """
    if isinstance(value, Future):
        return resolve(value)
    if not find_futures(value):
        return value
    if isinstance(value, dict):
        pairs = (
            (replace_futures(key, resolve), replace_futures(item, resolve))
            for key, item in value.items()
        )
        return _like(value, dict(pairs))
    if isinstance(value, (list, tuple, set, frozenset)):
        return _like(value, [replace_futures(item, resolve) for item in value])
    return _replace_fields(value, resolve)


def _like(old: Any, new: Any) -> Any:
    """The new content in the old one's type; named tuples take their fields one by one."""
    if type(old) in (list, dict):
        return new
    if hasattr(old, "_fields"):
        return type(old)(*new)
    return type(old)(new)


def _replace_fields(value: Any, resolve: Callable[[Future[Any]], object]) -> Any:
    twin = copy.copy(value)
    for field in dataclasses.fields(value):
        if hasattr(value, field.name):
            replaced = replace_futures(getattr(value, field.name), resolve)
            # Frozen dataclasses refuse plain assignment; the twin is ours alone.
            object.__setattr__(twin, field.name, replaced)
    return twin
