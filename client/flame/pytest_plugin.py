"""Fixtures for tests of programs that use Flame; pytest finds them by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from flame.client import Client

__all__ = ["flame_client"]


@pytest.fixture(scope="session")
def flame_client() -> Iterator[Client]:
    """A client of an embedded cluster that lives as long as the test session."""
    from flame.testing import embedded

    with embedded() as client:
        yield client
