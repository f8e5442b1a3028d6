"""The embedded cluster: what ``flame.connect()`` starts when nothing is configured.

A broker in this process, a worker whose children run the calls, and a folder under ``FLAME_HOME``
as the object store. It needs no server and ends with the program.
"""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path

from flame_broker.config import load
from flame_broker.keys import Keyring
from flame_worker.daemon import Worker, WorkerSettings

__all__ = ["EmbeddedCluster", "embedded"]

_numbers = count(1)


class EmbeddedCluster:
    """A whole cluster inside this process; ``start`` and ``stop`` run in the client's loop.

    Args:
        home: Folder for the key, the store and the cache; ``FLAME_HOME`` by default.
        slots: Children; by default one a cpu.

    Attributes:
        url: Broker URL, for transports of this process only.
        store_url: The object store.
        keyring: The keys.
    """

    def __init__(self, *, home: Path | None = None, slots: int | None = None) -> None:
        settings = load()
        self._home = home or settings.home
        self._slots = slots
        self.url = f"memory://embedded-{os.getpid()}-{next(_numbers)}"
        self.store_url = settings.store_url or (self._home / "store").absolute().as_uri()
        self.keyring: Keyring = settings.keyring
        self._worker: Worker | None = None

    async def start(self) -> None:
        """Start the worker and its children."""
        self._worker = Worker(
            WorkerSettings(
                broker_url=self.url,
                store_url=self.store_url,
                keyring=self.keyring,
                home=self._home,
                slots=self._slots,
                name=f"embedded-{os.getpid()}",
            )
        )
        await self._worker.start()

    async def stop(self) -> None:
        """End the children and forget what was queued."""
        worker, self._worker = self._worker, None
        if worker is not None:
            await worker.stop()


def embedded() -> EmbeddedCluster:
    """The cluster behind the entry point ``flame.clusters: embedded``."""
    return EmbeddedCluster()
