"""Sentences that several commands end with."""

from __future__ import annotations

from flame_broker.topology import DEFAULT_POOL

__all__ = ["start_worker"]


def start_worker(key_id: str, pool: str = DEFAULT_POOL) -> str:
    """How to get a worker that hears us.

    Args:
        key_id: The key that was asked under; workers with another one do not hear it.
        pool: Where it is missing.
    """
    option = "" if pool == DEFAULT_POOL else f" --pool {pool}"
    return (
        f"start one with flame-worker{option}, with the same broker and the key of id {key_id} "
        "(`flame config show` tells both)"
    )
