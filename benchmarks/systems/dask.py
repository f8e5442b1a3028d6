"""Dask distributed: a local cluster of two processes with one thread each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dask.distributed import Client, LocalCluster

from processes import descendants
from system import System, Target


class Dask(System):
    """Scheduler in the client's process, workers under nannies, as `LocalCluster` sets them up."""

    def start(self) -> None:
        """Start the scheduler and the workers, all on loopback, without the dashboard."""
        self.cluster = LocalCluster(
            n_workers=self.lab.worker_processes,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address=None,
            worker_dashboard_address=None,
            local_directory=str(self.lab.workdir),
        )

    def connect(self) -> None:
        """Connect a client to the cluster."""
        self.client = Client(self.cluster)

    def call(self, target: Target, *args: Any) -> Any:
        """Submit and wait; `pure=False`, or a repeated argument would be answered from memory."""
        return self.client.submit(target, *args, pure=False).result()

    def burst(self, target: Target, arguments: Iterable[Any]) -> list[Any]:
        """Separate futures, gathered."""
        futures = [self.client.submit(target, value, pure=False) for value in arguments]
        return list(self.client.gather(futures))

    def map(self, target: Target, count: int) -> Iterable[Any]:
        """The client's map; Dask has one task for each element whatever the batch size."""
        return list(self.client.gather(self.client.map(target, range(count), pure=False)))

    def roles(self) -> dict[str, list[int]]:
        """Nannies live in the client's process; the worker processes are its descendants."""
        return {"worker": descendants()}

    def stop(self) -> None:
        """Close the client, then the cluster."""
        self.client.close()
        self.cluster.close()


SYSTEM = Dask
