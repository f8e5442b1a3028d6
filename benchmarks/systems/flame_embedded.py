"""Flame with nothing configured: broker, worker and store in the client's process and its children.

The default is one slot a CPU.
"""

from __future__ import annotations

import os
from types import MappingProxyType

import flame
from processes import descendants
from systems.flame import FlameSystem

VARIABLES = ("FLAME_BROKER_URL", "FLAME_STORE_URL", "FLAME_KEY", "FLAME_KEY_FILE", "FLAME_CONFIG")


class FlameEmbedded(FlameSystem):
    """The embedded default."""

    own_figures = MappingProxyType({})

    def start(self) -> None:
        """Nothing to bring up: the cluster starts with the client."""
        for name in VARIABLES:
            os.environ.pop(name, None)

    def new_client(self) -> flame.Client:
        """Connect as a program without any configuration does."""
        return flame.connect()

    def roles(self) -> dict[str, list[int]]:
        """The daemon is a part of the client."""
        return {"child": descendants()}


SYSTEM = FlameEmbedded
