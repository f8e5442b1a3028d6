"""A wall clock that a test sets while programs run under it."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["SkewedClock"]

# Python imports a module of this name before a program starts.
_CUSTOMISE = """\
import os
import time

_real, _path = time.time, os.environ.get("LAB_CLOCK", "")

def _skewed():
    try:
        with open(_path) as file:
            return _real() + float(file.read() or 0)
    except OSError:
        return _real()

if _path:
    time.time = _skewed
"""


class SkewedClock:
    """Moves ``time.time`` of programs that are started with ``environ``; no interval changes.

    Args:
        folder: For its files.
    """

    def __init__(self, folder: Path) -> None:
        self._modules = folder / "clock"
        self._modules.mkdir()
        (self._modules / "sitecustomize.py").write_text(_CUSTOMISE)
        self.file = folder / "clock" / "offset"

    @property
    def environ(self) -> dict[str, str]:
        """Environment variables for the programs whose clock it is."""
        inherited = os.environ.get("PYTHONPATH", "")
        path = os.pathsep.join(filter(None, (str(self._modules), inherited)))
        return {"PYTHONPATH": path, "LAB_CLOCK": str(self.file)}

    def set(self, offset_s: float) -> None:
        """Show so many seconds more than the machine's clock, from now on."""
        fresh = self.file.with_suffix(".fresh")
        fresh.write_text(str(offset_s))
        fresh.replace(self.file)
