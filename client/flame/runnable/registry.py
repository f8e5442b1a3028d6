"""From a tag (``!ext.Class``) to the class that it means."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from types import ModuleType
from typing import Any

from flame_broker.errors import ConfigError

__all__ = ["Registry", "TagError"]


class TagError(ConfigError):
    """A tag in a YAML file means no class; the message says where, and what it may have meant."""


class Registry:
    """The classes that tags can name: those of the file's extensions.

    ``!ext.Class``, ``!ext.submodule.Class`` and ``!ext.Class.factory_method`` name the extension;
    ``!Class`` alone will do while only one extension has such a class.

    Args:
        modules: The imported extensions by their names in the file.
    """

    def __init__(self, modules: Mapping[str, ModuleType]) -> None:
        self._modules = modules

    def find(self, tag: str) -> Callable[..., Any]:
        """What makes the object that a tag stands for.

        Args:
            tag: Without its ``!``.

        Raises:
            TagError: There is no such class or factory method.
        """
        parts = tag.split(".")
        if not all(part.isidentifier() and not part.startswith("_") for part in parts):
            raise TagError(f"!{tag}: expected names with dots between them, such as !ext.Class")
        if parts[0] in self._modules:
            return self._walk(self._modules[parts[0]], parts)
        homes = [m for m in self._modules.values() if inspect.isclass(vars(m).get(parts[0]))]
        if len(homes) == 1:
            return self._walk(homes[0], ["", *parts])
        if homes:
            raise TagError(f"!{tag}: several extensions have it; write one of {self._full(tag)}")
        raise self._unknown(tag, f"there is no extension or class {parts[0]!r}")

    def _walk(self, found: Any, parts: list[str]) -> Callable[..., Any]:
        tag = ".".join(part for part in parts if part)
        for name in parts[1:]:
            following = _member(found, name)
            if following is None:
                where = getattr(found, "__name__", tag)
                raise self._unknown(tag, f"{where!r} has no {name!r} that a tag can name")
            found = following
        if not callable(found):
            raise self._unknown(tag, "it names a module, not a class")
        return found  # type: ignore[no-any-return]  # of a module that is known at run time only

    def _unknown(self, tag: str, reason: str) -> TagError:
        names = [*self._names()]
        close = get_close_matches(tag, names, n=3, cutoff=0.6)
        close = close or [n for n in names if n.rpartition(".")[2] == tag.rpartition(".")[2]]
        advice = f"; did you mean {' or '.join('!' + name for name in close)}?" if close else ""
        if not self._modules:
            advice = "; the file names no extensions (first document: `name: path/to/extension`)"
        return TagError(f"unknown tag !{tag}: {reason}{advice}")

    def _names(self) -> Iterator[str]:
        for extension, module in self._modules.items():
            for name, value in vars(module).items():
                inside = getattr(value, "__module__", "").partition(".")[0] == extension
                if inspect.isclass(value) and inside and not name.startswith("_"):
                    yield f"{extension}.{name}"

    def _full(self, tag: str) -> str:
        return " or ".join(
            f"!{extension}.{tag}"
            for extension, module in self._modules.items()
            if hasattr(module, tag.partition(".")[0])
        )


def _member(owner: Any, name: str) -> Any:
    """What a tag may name inside a module or class; None for everything else."""
    if inspect.isclass(owner):
        static = inspect.getattr_static(owner, name, None)
        return getattr(owner, name) if isinstance(static, (classmethod, staticmethod)) else None
    if not isinstance(owner, ModuleType):
        return None
    value = vars(owner).get(name) or _submodule(owner, name)
    inner = isinstance(value, ModuleType) and value.__name__ == f"{owner.__name__}.{name}"
    return value if inner or inspect.isclass(value) else None


def _submodule(owner: ModuleType, name: str) -> ModuleType | None:
    full = f"{owner.__name__}.{name}"
    if not hasattr(owner, "__path__"):
        return None
    try:
        return importlib.import_module(full)
    except ModuleNotFoundError as exc:
        if exc.name != full:
            raise
        return None
