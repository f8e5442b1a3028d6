"""The embedded cluster: what ``flame.connect()`` starts when nothing is configured.

A broker in this process, a worker whose children run the calls, an orchestrator, and folders under
``FLAME_HOME`` for objects and the history. It needs no server and ends with the program; the
history stays.
"""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from flame_broker.config import load
from flame_broker.keys import Key, Keyring, generate_key
from flame_infra.history import EmbeddedHistory

if TYPE_CHECKING:
    from flame_worker.daemon import Worker

__all__ = ["EmbeddedCluster", "embedded"]

_numbers = count(1)


class EmbeddedCluster:
    """A whole cluster inside this process; ``start`` and ``stop`` run in the client's loop.

    Args:
        home: Folder for the key, the store and the cache; ``FLAME_HOME`` by default.
        slots: Children; by default one a cpu.
        works: Whether it runs calls; else it only answers from the history.

    Attributes:
        url: Broker URL, for transports of this process only.
        store_url: The object store.
        keyring: A key that no other cluster has: several programs share the history, and by its
            key each keeps its own calls.
    """

    def __init__(
        self, *, home: Path | None = None, slots: int | None = None, works: bool = True
    ) -> None:
        settings = load()
        self._home = home or settings.home
        self._slots = slots
        self.url = f"memory://embedded-{os.getpid()}-{next(_numbers)}"
        self.store_url = settings.store_url or (self._home / "store").absolute().as_uri()
        self.keyring = Keyring([Key.parse(generate_key())])
        self._works = works
        self._history = EmbeddedHistory(
            self.url, self.keyring, self._home, self.store_url, at_once=not works
        )
        self._worker: Worker | None = None

    async def start(self) -> None:
        """Start the worker and its children; the orchestrator follows in the background."""
        if self._works:
            await self._start_worker()
        await self._history.start()

    async def _start_worker(self) -> None:
        from flame_worker.daemon import Worker, WorkerSettings  # not where only questions are asked

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
        """End the children, and the calls that were queued; the history says so."""
        worker, self._worker = self._worker, None
        if worker is not None:
            await worker.stop()
        await self._history.stop()


def embedded(*, works: bool = True) -> EmbeddedCluster:
    """The cluster behind the entry point ``flame.clusters: embedded``.

    Args:
        works: Whether it runs calls; else it only answers from the history.
    """
    return EmbeddedCluster(works=works)
