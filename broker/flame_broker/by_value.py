"""Code that travels by value, where cloudpickle alone falls short.

- Modules that import each other: cloudpickle puts a module's content into the arguments that make
  it, so two modules that hold each other never end. Here an empty module is made first.
- Functions under ``functools.cache`` or ``lru_cache``: cloudpickle sends them by name, which means
  nothing on a worker that lacks the module. Here the function travels, and gets a cache there.
"""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import Any

import cloudpickle

__all__ = ["CachedFunction", "reduce_cached", "reduce_module"]

CachedFunction = functools._lru_cache_wrapper  # noqa: SLF001  # its only name


def reduce_module(module: ModuleType) -> Any:
    """How to pickle a module: as cloudpickle does, with its content after the module itself."""
    make, arguments = cloudpickle.Pickler.dispatch_table[ModuleType](module)
    if len(arguments) == 1:
        return make, arguments
    name, content = arguments
    return make, (name, {}), content, None, None, _fill


def reduce_cached(cached: CachedFunction[Any]) -> Any:
    """How to pickle a function with a cache; ``NotImplemented`` where its name will do."""
    if _has_a_name(cached):
        return NotImplemented
    return _cache_again, (cached.__wrapped__, cached.cache_parameters())


def _has_a_name(cached: CachedFunction[Any]) -> bool:
    """Whether a worker finds it by module and name."""
    found: Any = sys.modules.get(cached.__module__)
    if cached.__module__ in {"__main__", *cloudpickle.list_registry_pickle_by_value()}:
        return False
    for part in cached.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is cached


def _fill(module: ModuleType, content: dict[str, Any]) -> None:
    vars(module).update(content)


def _cache_again(function: Any, parameters: dict[str, Any]) -> Any:
    return functools.lru_cache(**parameters)(function)
