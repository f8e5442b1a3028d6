"""For tests of programs that use Flame: a cluster inside the test's own process.

The pytest fixture ``flame_client`` gives the same, one for the whole session.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from flame.client import Client, connect_embedded

__all__ = ["embedded"]


@contextmanager
def embedded() -> Iterator[Client]:
    """An embedded cluster, whatever broker is configured; gone at the end.

    >>> with embedded() as client:
    ...     assert Runner(client=client).service(len)([1, 2]).get() == 2
    """
    with connect_embedded() as client:
        yield client
