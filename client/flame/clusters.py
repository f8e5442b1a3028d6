"""Clusters that live in this process, as the entry points ``flame.clusters`` give them."""

from __future__ import annotations

from typing import Protocol

from flame_broker.errors import ConfigError
from flame_broker.keys import Keyring

__all__ = ["Cluster", "embedded_cluster"]


class Cluster(Protocol):
    """A cluster that lives in this process."""

    url: str
    store_url: str
    keyring: Keyring

    async def start(self) -> None:
        """Start it in the running loop; ``url`` and the others hold from then on."""

    async def stop(self) -> None:
        """End it and all its processes."""


def embedded_cluster(*, works: bool = True) -> Cluster:
    """The one that is used with no broker configured: whoever provides it calls it ``embedded``.

    Args:
        works: Whether it runs calls; else it only answers from the history.

    Raises:
        ConfigError: None is installed.
    """
    from importlib.metadata import entry_points

    found = [*entry_points(group="flame.clusters", name="embedded")]
    if not found:
        raise ConfigError(
            "no broker is configured and no embedded cluster is installed: set FLAME_BROKER_URL"
        )
    cluster: Cluster = found[0].load()(works=works)
    return cluster
