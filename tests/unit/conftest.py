"""A client and a worker double, for tests that need no processes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

import flame
from flame_broker.keys import generate_key
from flame_broker.store import open_store
from lab.fake_worker import FakeWorker

_numbers = count()


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[FakeWorker]:
    """A worker that runs calls in this process."""
    store = open_store((tmp_path / "store").as_uri())
    url = f"memory://unit-{next(_numbers)}"
    fake = FakeWorker(url, generate_key(), store)
    yield fake.start()
    fake.close()


@pytest.fixture
def client(worker: FakeWorker, tmp_path: Path) -> Iterator[flame.Client]:
    """A client of that worker."""
    store = (tmp_path / "store").as_uri()
    with flame.connect(worker.url, store=store, key=worker.key_text) as made:
        yield made


@pytest.fixture
def runner(client: flame.Client) -> Iterator[flame.Runner]:
    """A runner of that client."""
    with flame.Runner("unit", client=client) as made:
        yield made
