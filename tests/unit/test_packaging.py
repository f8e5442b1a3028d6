"""How code travels: by name where it is installed, else by value with the modules beside it."""

from __future__ import annotations

import fnmatch
import functools
import gc
import importlib
import json
import operator
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle
import pytest

from flame.packaging import PackedTarget, TargetCache, pack_target, target_name
from flame_broker.codec import decode_value
from flame_broker.errors import PackagingError

FACTOR = 3


def triple(value: int) -> int:
    return value * FACTOR


class Scaler:
    def __init__(self, factor: int) -> None:
        self.factor = factor

    def scale(self, value: int) -> int:
        return value * self.factor

    __call__ = scale


def run_elsewhere(packed: PackedTarget, folder: Path, *args: Any) -> Any:
    """Load a target in a process that has nothing of ours but the codec, and call it."""
    blob = folder / "target"
    blob.write_bytes(packed.blob or b"")
    program = (
        "import json, sys; from flame_broker.codec import decode_value\n"
        "target = decode_value(open(sys.argv[1], 'rb').read())\n"
        "print(json.dumps(target(*json.loads(sys.argv[2]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(blob), json.dumps(args)],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("obj", "name"),
    [
        (len, "builtins:len"),
        (operator.add, "_operator:add"),
        (json.dumps, "json:dumps"),
        (str.upper, "builtins:str.upper"),
        (textwrap.TextWrapper.fill, "textwrap:TextWrapper.fill"),
    ],
)
def test_installed_code_goes_by_name(obj: Any, name: str) -> None:
    packed = pack_target(obj)
    assert packed.blob is None
    assert packed.target.sha256 == ""
    assert packed.target.name.endswith(name.partition(":")[2])
    module, _, qualname = packed.target.name.partition(":")
    found: Any = importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    assert found is obj


@pytest.mark.parametrize(
    "obj",
    [
        triple,
        lambda value: value * 3,
        functools.partial(operator.mul, 3),
        Scaler(3).scale,
        Scaler(3),
    ],
    ids=["function", "lambda", "partial", "bound method", "callable object"],
)
def test_local_code_goes_by_value(obj: Any, tmp_path: Path) -> None:
    packed = pack_target(obj)
    assert packed.blob is not None
    assert packed.key == f"targets/{packed.target.sha256}"
    assert packed.target.size == len(packed.blob)
    assert packed.target.python == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert run_elsewhere(packed, tmp_path, 7) == 21


def test_a_closure_takes_its_values_along(tmp_path: Path) -> None:
    offset = 100

    def shift(value: int) -> int:
        return value + offset

    assert run_elsewhere(pack_target(shift), tmp_path, 7) == 107


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A program's module that imports another one beside it."""
    (tmp_path / "beside_deep.py").write_text("LIMIT = 5\ndef clip(n): return min(n, LIMIT)\n")
    (tmp_path / "beside_near.py").write_text(
        "import beside_deep\n"
        "from beside_deep import clip\n"
        "def near(n): return clip(n) + beside_deep.LIMIT\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("beside_near")
    yield module
    for name in ("beside_near", "beside_deep"):
        del sys.modules[name]


def test_modules_beside_the_program_travel_along(beside: ModuleType, tmp_path: Path) -> None:
    assert run_elsewhere(pack_target(beside.near), tmp_path, 9) == 10


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Makes a module in a folder of ``sys.path`` and gives its function."""

    def make(where: str) -> Any:
        folder = tmp_path / where
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "guest.py").write_text("def visit(n): return n + 1\n")
        monkeypatch.syspath_prepend(str(folder))
        return importlib.import_module("guest").visit

    yield make
    sys.modules.pop("guest", None)


@pytest.mark.parametrize(
    ("where", "described", "by_name"),
    [
        ("target", "guest-1.0.dist-info/RECORD", True),
        ("target", "other-1.0.dist-info/RECORD", False),
        ("project", "guest.egg-info/SOURCES.txt", False),
        ("shared/lib/python3/site-packages", "", True),
        ("plain", "", False),
    ],
)
def test_what_was_installed_into_any_folder_goes_by_name(
    guest: Callable[[str], Any], tmp_path: Path, where: str, described: str, *, by_name: bool
) -> None:
    """As ``pip install --target`` does it; not what lies beside it, nor a project's own code."""
    if described:
        record = tmp_path / where / described
        record.parent.mkdir(parents=True)
        record.write_text(f"{described.partition('-')[0].removesuffix('.egg')}.py,,\n")
    assert (pack_target(guest(where)).blob is None) is by_name


@pytest.fixture
def circular(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A module beside the program that imports another, which imports it in turn."""
    (tmp_path / "falling.py").write_text(
        "import rising\ndef fall(n): return 0 if n == 0 else 1 + rising.rise(n - 1)\n"
    )
    (tmp_path / "rising.py").write_text(
        "import falling\ndef rise(n): return 0 if n == 0 else 1 + falling.fall(n - 1)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("falling")
    for name in ("falling", "rising"):
        sys.modules.pop(name, None)


def test_modules_that_import_each_other_travel_along(circular: ModuleType, tmp_path: Path) -> None:
    assert run_elsewhere(pack_target(circular.fall), tmp_path, 5) == 5
    assert run_elsewhere(pack_target(lambda n: [circular.fall(n)]), tmp_path, 4) == [4]


@functools.cache
def fibonacci(n: int) -> int:
    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)


def test_a_cached_function_travels_and_has_a_cache_of_its_own(tmp_path: Path) -> None:
    assert run_elsewhere(pack_target(fibonacci), tmp_path, 60) == 1548008755920
    assert run_elsewhere(pack_target(lambda n: [fibonacci(n)]), tmp_path, 10) == [55]


def test_an_installed_cached_function_goes_by_name() -> None:
    assert pack_target(fnmatch._compile_pattern).blob is None
    packed = pack_target(lambda: fnmatch._compile_pattern)
    assert decode_value(packed.blob or b"")() is fnmatch._compile_pattern


def test_a_module_that_took_anothers_place_is_noticed(
    circular: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack_target(circular.fall)  # from here on the local modules are known
    (tmp_path / "later.py").write_text("def add_one(n): return n + 1\n")
    monkeypatch.delitem(sys.modules, "rising")
    later = importlib.import_module("later")
    try:
        assert run_elsewhere(pack_target(later.add_one), tmp_path, 1) == 2
    finally:
        del sys.modules["later"]


def test_cloudpickles_own_registry_is_left_as_it_was(beside: ModuleType) -> None:
    before = cloudpickle.list_registry_pickle_by_value()
    pack_target(beside.near)
    assert cloudpickle.list_registry_pickle_by_value() == before


def test_a_redefined_function_is_another_target() -> None:
    space: dict[str, Any] = {"__name__": "__main__"}
    exec("def f(): return 1", space)
    first = pack_target(space["f"])
    exec("def f(): return 2", space)
    second = pack_target(space["f"])
    assert first.target.sha256 != second.target.sha256
    assert decode_value(second.blob or b"")() == 2


def test_what_cannot_be_pickled_is_named() -> None:
    lock = threading.Lock()

    def guarded() -> None:
        lock.acquire()

    with pytest.raises(PackagingError, match=r"guarded.*lock"):
        pack_target(guarded)


def test_names_say_what_is_called() -> None:
    assert target_name(len) == "builtins:len"
    assert target_name(functools.partial(len)) == "builtins:len"
    assert target_name(Scaler(1)).endswith(":Scaler")


def test_a_function_is_packed_once_as_long_as_it_lives() -> None:
    cache = TargetCache()
    made: list[int] = []

    def fn() -> None: ...

    def make() -> int:
        made.append(1)
        return len(made)

    assert [cache.find(fn, make) for _ in range(3)] == [1, 1, 1]
    del fn
    gc.collect()
    assert cache.find(triple, make) == 2


def test_callables_without_weak_references_are_remembered_too() -> None:
    class Slotted:
        __slots__ = ()

        def __call__(self) -> None: ...

    cache, target = TargetCache(), Slotted()
    assert cache.find(target, object) is cache.find(target, object)
