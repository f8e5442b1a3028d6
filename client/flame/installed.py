"""Which modules are installed: a worker is expected to have these too, so they travel by name."""

from __future__ import annotations

import os
import site
import sys
import sysconfig
from functools import lru_cache
from pathlib import Path
from typing import Final

__all__ = ["is_installed"]

_PACKAGES: Final = frozenset(("site-packages", "dist-packages"))


@lru_cache(maxsize=8192)
def is_installed(module: str, file: str) -> bool:
    """Whether a module is one of the standard library or of an installed package.

    Installed is what lies in this interpreter's folders, or in any ``site-packages``, and what a
    distribution beside it names as its own: so ``pip install --target`` leaves it in a folder that
    is put on ``PYTHONPATH``. An ``.egg-info`` proves nothing, since projects that are worked on
    have one.

    Args:
        module: Its full name.
        file: Its file; of a namespace package, one of its folders.
    """
    path = Path(file).resolve()
    if any(path.is_relative_to(root) for root in _roots()) or not _PACKAGES.isdisjoint(path.parts):
        return True
    top = module.partition(".")[0]
    folders = {Path(entry or os.curdir).resolve() for entry in sys.path}
    return any(path.is_relative_to(f) and top in _distributed(f) for f in folders)


@lru_cache(maxsize=1)
def _roots() -> tuple[Path, ...]:
    """Folders of the standard library and of installed packages."""
    paths = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    paths += site.getsitepackages()
    paths.append(site.getusersitepackages())
    return tuple({Path(path).resolve() for path in paths if path})


@lru_cache(maxsize=256)
def _distributed(folder: Path) -> frozenset[str]:
    """The top names of what the distributions installed in a folder brought."""
    described = [*folder.glob("*.dist-info")]
    if not described:
        return frozenset()
    from importlib.metadata import PathDistribution  # which most programs never need

    files = (file for path in described for file in PathDistribution(path).files or ())
    return frozenset(file.parts[0].partition(".")[0] for file in files)
