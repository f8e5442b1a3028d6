"""Runnables: programs that a YAML file names and configures, run by ``flame run``."""

from __future__ import annotations

from flame.runnable.base import Runnable
from flame.runnable.registry import TagError
from flame.runnable.safe import SafeExecutionContext

__all__ = ["Runnable", "SafeExecutionContext", "TagError"]
