"""Finding what a call runs: by reference in an installed module, by value in the node's cache."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

from flame_broker.codec import decode_value
from flame_broker.errors import PackagingError, StoreError, VersionMismatch

__all__ = ["TargetName", "Targets"]

_KEEP: Final = 256
"""Targets; a program that makes new functions all the time must not fill its workers."""

_PYTHON: Final = f"{sys.version_info.major}.{sys.version_info.minor}"


class TargetName(NamedTuple):
    """What names a target: see ``flame_broker.messages.Target``; ``path`` is where it lies here."""

    name: str
    sha256: str
    python: str
    path: str


class Targets:
    """The targets that this process has loaded."""

    def __init__(self) -> None:
        self._loaded: dict[TargetName, Callable[..., Any]] = {}

    def known(self, target: TargetName) -> Callable[..., Any] | None:
        """The target if it is loaded."""
        return self._loaded.get(target)

    def load(self, target: TargetName) -> Callable[..., Any]:
        """Load a target, once.

        Raises:
            PackagingError: It cannot be found or rebuilt here.
            StoreError: Its code is not in the node's cache.
            VersionMismatch: Its code was pickled by another Python.
        """
        found = _by_value(target) if target.sha256 else _by_reference(target.name)
        if not callable(found):
            raise PackagingError(f"the target {target.name!r} is a {type(found)}, not a callable")
        self._loaded[target] = found
        if len(self._loaded) > _KEEP:
            self._loaded.pop(next(iter(self._loaded)))
        return cast("Callable[..., Any]", found)


def _by_reference(name: str) -> Any:
    module_name, _, qualname = name.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    # A module's own code runs while it is imported, and may raise anything.
    except Exception as exc:
        raise PackagingError(
            f"the worker cannot import the module {module_name!r} of the target {name!r}: "
            f"{type(exc).__name__}: {exc}. Install it on the worker; it looks in {sys.path}"
        ) from exc
    for part in qualname.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as exc:
            raise PackagingError(
                f"the worker's module {module_name!r} has no {qualname!r}; it was loaded from "
                f"{getattr(sys.modules.get(module_name), '__file__', 'an unknown place')}: "
                "is it the same version as the client's?"
            ) from exc
    return found


def _by_value(target: TargetName) -> Any:
    if target.python and target.python != _PYTHON:
        raise VersionMismatch(
            f"the code of {target.name!r} was packed by Python {target.python}, and this worker "
            f"runs Python {_PYTHON}: code by value needs the same one on both sides"
        )
    try:
        payload = Path(target.path).read_bytes()
    except OSError as exc:
        raise StoreError(
            f"the code of {target.name!r} is not in the cache of this node ({exc.strerror}: "
            f"{target.path}). Was it cleared? Then call again: the worker fetches it anew"
        ) from exc
    try:
        return decode_value(payload)
    # Code that is rebuilt imports what it needs, which may raise anything.
    except Exception as exc:
        raise PackagingError(
            f"the worker cannot rebuild the target {target.name!r}: {type(exc).__name__}: {exc}. "
            "Install what it imports on the worker"
        ) from exc
