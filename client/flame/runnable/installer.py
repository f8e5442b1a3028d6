"""``flame run -i``: extensions installed with pip, and what that changed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib import invalidate_caches
from importlib.metadata import distributions
from pathlib import Path

from flame.runnable.extensions import Extension
from flame_broker.errors import ConfigError

__all__ = ["install"]


def install(extensions: Iterable[Extension], say: Callable[[str], object]) -> None:
    """Install extensions into this interpreter's environment.

    A local folder is installed if it is a project (``pyproject.toml`` or ``setup.py``); a module
    without one needs no installation. What is no path is a requirement for pip.

    Args:
        extensions: Which.
        say: Told one line for each package that was installed, updated or removed.

    Raises:
        ConfigError: pip failed; the message has what it printed on standard error.
    """
    for extension in extensions:
        wanted = _requirement(extension)
        if wanted is None:
            continue
        before = _installed()
        _pip_install(extension.name, wanted)
        for line in _changes(before, _installed()):
            say(line)


def _requirement(extension: Extension) -> str | None:
    if extension.entry is None:
        return extension.location
    for folder in (extension.entry, *extension.entry.parents[:2]):
        if _is_project(folder):
            return str(folder)
    return None


def _pip_install(name: str, wanted: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    done = subprocess.run([*command, "--", wanted], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"extension {name!r}: pip could not install {wanted}:\n{done.stderr}")
    invalidate_caches()


def _installed() -> dict[str, str]:
    return {found.name: found.version for found in distributions() if found.name}


def _changes(before: dict[str, str], after: dict[str, str]) -> list[str]:
    lines = []
    for name in sorted({*before, *after}, key=str.lower):
        old, new = before.get(name), after.get(name)
        if old == new:
            continue
        if old is not None:
            lines.append(f"existing {name}-{old} was uninstalled")
        if new is not None:
            lines.append(f"installed {name}-{new}")
    return lines


def _is_project(path: Path) -> bool:
    return (path / "pyproject.toml").is_file() or (path / "setup.py").is_file()
