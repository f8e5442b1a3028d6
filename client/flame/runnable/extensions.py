"""Extensions: the modules whose classes a YAML file names, and how they reach a worker.

A local one is a folder or a ``.py`` file. It travels by value, as a zip named by its sha256, and is
imported on the worker from a folder that lasts as long as the call. Anything else must be
installed where it is imported.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Final

from flame_broker.errors import ConfigError

__all__ = [
    "Extension",
    "PackedExtension",
    "imported",
    "locate_extensions",
    "unpack",
]

MAX_PACKED_BYTES: Final = 64 * 1024 * 1024
"""Of one extension, as a zip. Data belongs into the object store."""

_ADDRESSES: Final = ("http://", "https://", "ssh://", "git@", "git+")
_EPOCH: Final = (1980, 1, 1, 0, 0, 0)  # the same files give the same zip


@dataclass(frozen=True, slots=True)
class Extension:
    """A module that a file calls by ``name``.

    Args:
        name: Of the module.
        location: As the file has it.
        entry: The module's file or folder; None for an installed one.
    """

    name: str
    location: str
    entry: Path | None = None

    def pack(self) -> PackedExtension | None:
        """What a worker needs to import it; None for an installed one.

        Raises:
            ConfigError: It is too large.
        """
        if self.entry is None:
            return None
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
            for name, file in self._files(self.entry):
                packed.writestr(zipfile.ZipInfo(name, _EPOCH), file.read_bytes())
        blob = archive.getvalue()
        if len(blob) > MAX_PACKED_BYTES:
            raise ConfigError(
                f"extension {self.name!r}: {self.location} is {len(blob)} bytes as a zip, over the "
                f"limit of {MAX_PACKED_BYTES}: move data out of it"
            )
        return PackedExtension(self.name, hashlib.sha256(blob).hexdigest(), blob)

    def _files(self, entry: Path) -> Iterator[tuple[str, Path]]:
        """What to pack, by the names that a worker imports it under."""
        if entry.is_dir():
            for file in _source_files(entry):
                yield f"{self.name}/{file.relative_to(entry).as_posix()}", file
        elif Path(self.location).suffix == ".py":
            yield f"{self.name}.py", entry
        else:
            for file in _source_files(entry.parent):
                yield file.relative_to(entry.parent).as_posix(), file


@dataclass(frozen=True, slots=True)
class PackedExtension:
    """An extension on its way to a worker.

    Args:
        name: Of the module.
        sha256: Of the zip.
        blob: The zip.
    """

    name: str
    sha256: str
    blob: bytes = field(repr=False)


def locate_extensions(named: Mapping[str, str], folder: Path) -> list[Extension]:
    """Find out what the locations of a file mean.

    Args:
        named: Name to location.
        folder: Where relative paths start: the folder of the file.

    Raises:
        ConfigError: A path is not there or holds no such module, or an address is named.
    """
    return [_locate(name, location, folder) for name, location in named.items()]


def unpack(packed: Iterable[PackedExtension], folder: Path) -> list[Extension]:
    """Lay packed extensions out below a folder, each in one of its own name.

    Raises:
        ConfigError: A zip is damaged.
    """
    found = []
    for one in packed:
        if hashlib.sha256(one.blob).hexdigest() != one.sha256:
            raise ConfigError(f"extension {one.name!r} arrived damaged")
        root = folder / one.name
        with zipfile.ZipFile(io.BytesIO(one.blob)) as archive:
            archive.extractall(root)
        entry = root / one.name
        found.append(
            Extension(one.name, str(root), entry if entry.is_dir() else root / f"{one.name}.py")
        )
    return found


@contextmanager
def imported(extensions: Iterable[Extension]) -> Iterator[dict[str, ModuleType]]:
    """Import extensions; afterwards the process knows nothing of the local ones any more.

    Raises:
        ConfigError: A module cannot be imported; the cause is what its import raised.
    """
    known, path = {*sys.modules}, [*sys.path]
    local = [one.entry for one in extensions if one.entry is not None]
    try:
        yield {one.name: _import(one) for one in extensions}
    finally:
        sys.path[:] = path
        for name in {*sys.modules} - known:
            file = getattr(sys.modules[name], "__file__", None) or ""
            if any(Path(file).is_relative_to(entry.parent) for entry in local):
                del sys.modules[name]


def _locate(name: str, location: str, folder: Path) -> Extension:
    if location.startswith(_ADDRESSES):
        raise ConfigError(
            f"extension {name!r}: {location} cannot be fetched: this version reads extensions from "
            "local paths only; clone it and name the folder"
        )
    path = folder / Path(location).expanduser()
    if path.exists():
        return Extension(name, location, _entry(name, path.resolve()))
    if _looks_like_path(location):
        raise ConfigError(f"extension {name!r}: there is no {path}")
    return Extension(name, location)


def _looks_like_path(location: str) -> bool:
    return location.startswith(("/", ".", "~")) or location.endswith(".py") or "/" in location


def _entry(name: str, path: Path) -> Path:
    if path.is_file():
        if path.suffix == ".py":
            return path
        raise ConfigError(f"extension {name!r}: {path} is neither a folder nor a .py file")
    for root in (path, path / "src"):
        for entry in (root / name, root / f"{name}.py"):
            if entry.is_file() or (entry / "__init__.py").is_file():
                return entry
    if (path / "__init__.py").is_file():
        return path
    raise ConfigError(
        f"extension {name!r}: {path} has no module {name!r}; expected {name}.py, "
        f"{name}/__init__.py or __init__.py in it"
    )


def _import(extension: Extension) -> ModuleType:
    name, entry = extension.name, extension.entry
    if entry is not None and name in sys.modules:
        raise ConfigError(
            f"extension {name!r}: another module of this name is loaded, "
            f"{getattr(sys.modules[name], '__file__', 'a builtin')}; call the extension otherwise"
        )
    try:
        if entry is None:
            return importlib.import_module(name)
        if entry.stem == name:
            sys.path.insert(0, str(entry.parent))
            importlib.invalidate_caches()
            return importlib.import_module(name)
        return _import_as(name, entry)
    # A module's own code runs while it is imported, and may raise anything.
    except Exception as exc:
        raise ConfigError(_import_problem(extension, exc)) from exc


def _import_as(name: str, entry: Path) -> ModuleType:
    """Import a file or package whose own name is another one."""
    package = entry.is_dir()
    spec = importlib.util.spec_from_file_location(
        name,
        entry / "__init__.py" if package else entry,
        submodule_search_locations=[str(entry)] if package else None,
    )
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:  # it goes on; the next import must not find a module that failed half-way
        del sys.modules[name]
        raise
    return module


def _import_problem(extension: Extension, exc: Exception) -> str:
    name = extension.name
    if isinstance(exc, ModuleNotFoundError) and exc.name == name:
        return (
            f"extension {name!r}: {extension.location} is neither a path nor installed here; "
            f"install it, or let `flame run -i` do so"
        )
    advice = ""
    if isinstance(exc, ModuleNotFoundError):
        advice = (
            f"; install {exc.name!r} where it runs, or let `flame run -i` install the extension"
        )
    elif isinstance(exc, SyntaxError):
        advice = f" ({exc.filename}:{exc.lineno})"
    return f"extension {name!r} cannot be imported: {type(exc).__name__}: {exc}{advice}"


def _source_files(folder: Path) -> Iterator[Path]:
    """The files of a folder, sorted, without what is hidden, compiled or an environment."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == "__pycache__" or path.suffix == ".pyc":
            continue
        if path.is_dir():
            if not (path / "pyvenv.cfg").exists():
                yield from _source_files(path)
        elif path.is_file():
            yield path
