"""How code reaches a worker: by name where the worker can import it, else as a pickle.

By name travel targets of installed packages and of the standard library. Everything else goes by
value with cloudpickle: functions of ``__main__`` and of a notebook, lambdas, closures, partials,
bound methods, and whatever lives in modules beside the program, together with the local modules
that it uses. The pickle is named by its sha256, so a redefined function is another target.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import cloudpickle

from flame.installed import is_installed
from flame_broker.codec import encode_value
from flame_broker.errors import PackagingError
from flame_broker.messages import Target

__all__ = ["NOTHING", "PackedTarget", "TargetCache", "local_code", "pack_target", "target_name"]

_EVERYWHERE = frozenset(
    {
        "cloudpickle",  # which would go on without end to describe itself
        "flame",
        "flame_broker",
        "flame_cli",
        "flame_infra",
        "flame_orchestrator",
        "flame_worker",
    }
)
"""Packages that every worker has, wherever they lie here."""


@dataclass(frozen=True, slots=True)
class PackedTarget:
    """A target, and the pickle that the store must hold for it (None by reference)."""

    target: Target
    blob: bytes | None = None

    @property
    def key(self) -> str:
        """Where the pickle lies in the store."""
        return f"targets/{self.target.sha256}"


NOTHING = PackedTarget(Target("builtins:bool"))
"""A target that every worker has and that does nothing."""


def pack_target(obj: Callable[..., object]) -> PackedTarget:
    """Decide how a callable travels, and pickle it if that must be.

    Raises:
        PackagingError: It refers to something that cannot be pickled; the message says what.
    """
    name = target_name(obj)
    if _is_importable(obj, name):
        return PackedTarget(Target(name))
    blob = _pickle(obj, name)
    digest = hashlib.sha256(blob).hexdigest()
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return PackedTarget(Target(name, digest, len(blob), python), blob)


def target_name(obj: object) -> str:
    """``module:qualname`` of a callable, or of what it wraps."""
    inner = obj
    while isinstance(inner, functools.partial):
        inner = inner.func
    named = inner if hasattr(inner, "__qualname__") else type(inner)
    module = getattr(named, "__module__", None) or "builtins"
    return f"{module}:{getattr(named, '__qualname__', type(inner).__name__)}"


def _is_importable(obj: object, name: str) -> bool:
    """Whether a worker finds this very object under this name."""
    module_name, _, qualname = name.partition(":")
    module = sys.modules.get(module_name)
    if module is None or _is_local(module):
        return False
    found: Any = module
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found is obj


def _pickle(obj: object, name: str) -> bytes:
    try:
        with local_code:
            return encode_value(obj).join()
    except PackagingError as exc:
        raise PackagingError(
            f"{name} cannot be sent: {exc}. It may refer to a lock, a file or a connection; "
            "make those inside the function"
        ) from exc


class _LocalCode:
    """While entered, cloudpickle sends the code of local modules; its registry is then restored."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._added: list[types.ModuleType] = []
        self._known: tuple[int, str] = (0, "")
        self._local: list[types.ModuleType] = []

    def __enter__(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._register()

    def __exit__(self, *exc_info: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                for module in self._added:
                    cloudpickle.unregister_pickle_by_value(module)

    def _register(self) -> None:
        # What is imported next stands last, so a module that replaced another is noticed too.
        imported = len(sys.modules), next(reversed(sys.modules))
        if self._known != imported:
            self._known, self._local = imported, [*_local_modules()]
        before = cloudpickle.list_registry_pickle_by_value()
        self._added = [module for module in self._local if module.__name__ not in before]
        for module in self._added:
            cloudpickle.register_pickle_by_value(module)

    def forget_locks(self) -> None:
        """In a forked child: another thread may have held the lock at the fork."""
        self._lock = threading.Lock()


def _local_modules() -> Iterator[types.ModuleType]:
    # Some entries of sys.modules are no modules, or stand there under a second name too.
    entries: list[tuple[str, object]] = [*sys.modules.items()]
    for name, module in entries:
        known = isinstance(module, types.ModuleType) and module.__name__ == name != "__main__"
        if known and _is_local(cast(types.ModuleType, module)):
            yield cast(types.ModuleType, module)


def _is_local(module: types.ModuleType) -> bool:
    """Whether a worker elsewhere lacks this module: it is neither installed nor built in."""
    name = module.__name__
    if name == "__main__":
        return True
    if name.partition(".")[0] in _EVERYWHERE or name in sys.builtin_module_names:
        return False
    file = getattr(module, "__file__", None)
    if file is not None:
        return not is_installed(name, file)
    # A namespace package has folders; what has neither was made by hand, in a notebook say.
    folders = [*getattr(module, "__path__", ())]
    spec = getattr(module, "__spec__", None)
    if not folders:
        return spec is None
    return not any(is_installed(name, folder) for folder in folders)


local_code = _LocalCode()
"""Enter it to pickle anything that may hold functions or classes of the user's program."""

os.register_at_fork(after_in_child=local_code.forget_locks)


class TargetCache:
    """Remembers what was packed for a callable, as long as the callable lives.

    For ``Executor.submit``, which is given the same function thousands of times. A function is
    known by identity: if its globals or closure change afterwards, workers keep what was sent
    first. ``Runner.service`` packs anew each time.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Any] | None, object, Any]] = {}

    def find(self, fn: Callable[..., object], make: Callable[[], Any]) -> Any:
        """What ``make`` gave for this callable the first time."""
        known = self._entries.get(id(fn))
        if known is not None and (known[1] is fn or (known[0] is not None and known[0]() is fn)):
            return known[2]
        made = make()
        self._entries[id(fn)] = (*self._hold(fn), made)
        return made

    def _hold(self, fn: Callable[..., object]) -> tuple[weakref.ref[Any] | None, object]:
        """A weak reference that clears the entry; a strong one for what takes no weak ones."""
        number, entries = id(fn), self._entries
        try:
            return weakref.ref(fn, lambda _: entries.pop(number, None)), None
        except TypeError:
            return None, fn
