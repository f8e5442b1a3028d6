"""`concurrent.futures.ProcessPoolExecutor`: no broker, pipes only; the floor among real pools."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from processes import descendants
from system import System, Target


class ProcessPool(System):
    """The standard library's pool with its default start method."""

    def start(self) -> None:
        """Nothing to bring up: the pool starts its processes with the first calls."""

    def connect(self) -> None:
        """Make the pool."""
        self.pool = ProcessPoolExecutor(max_workers=self.lab.worker_processes)

    def call(self, target: Target, *args: Any) -> Any:
        """Submit and wait."""
        return self.pool.submit(target, *args).result()

    def burst(self, target: Target, arguments: Iterable[Any]) -> list[Any]:
        """Separate futures."""
        futures = [self.pool.submit(target, argument) for argument in arguments]
        return [future.result() for future in futures]

    def map(self, target: Target, count: int) -> Iterable[Any]:
        """The pool's map, in chunks of 64."""
        return self.pool.map(target, range(count), chunksize=64)

    def roles(self) -> dict[str, list[int]]:
        """The pool's processes."""
        return {"child": descendants()}

    def stop(self) -> None:
        """Shut the pool down."""
        self.pool.shutdown(cancel_futures=True)


SYSTEM = ProcessPool
