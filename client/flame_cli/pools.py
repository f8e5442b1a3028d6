"""Which pools a command looks at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from flame_broker.topology import DEFAULT_POOL

if TYPE_CHECKING:
    from flame.questions import Questions

__all__ = ["pools_with_workers"]

_ANSWER_S: Final = 0.5


def pools_with_workers(cluster: Questions) -> list[str]:
    """The default pool, and those that have workers: a broker does not list its queues."""
    if not cluster.reaches_workers:
        return [DEFAULT_POOL]
    named = {str(facts["pool"]) for facts in cluster.workers(_ANSWER_S) if facts.get("pool")}
    return sorted({DEFAULT_POOL, *named})
