"""Ray: a local cluster with two CPUs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache
from typing import Any

import ray
from ray.util.multiprocessing import Pool

from processes import descendants, title
from system import System, Target

OBJECT_STORE_BYTES = 2 * 1024**3


@cache
def remote(target: Target) -> Any:
    """The Ray function of a target, made once as a decorator would."""
    return ray.remote(target)


class Ray(System):
    """Ray as `ray.init` sets it up on one machine, without dashboard and usage reports."""

    def start(self) -> None:
        """Start the cluster's daemons; workers are started for `num_cpus` beforehand."""
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        ray.init(
            num_cpus=self.lab.worker_processes,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=OBJECT_STORE_BYTES,
            _node_ip_address="127.0.0.1",
            _temp_dir=str(self.lab.workdir),
        )
        self.pool: Pool | None = None

    def call(self, target: Target, *args: Any) -> Any:
        """Submit and wait."""
        return ray.get(remote(target).remote(*args))

    def burst(self, target: Target, arguments: Iterable[Any]) -> list[Any]:
        """Separate object references, fetched together."""
        task = remote(target)
        return list(ray.get([task.remote(argument) for argument in arguments]))

    def map(self, target: Target, count: int) -> Iterable[Any]:
        """Ray's multiprocessing pool, in chunks of 64."""
        if self.pool is None:
            self.pool = Pool(self.lab.worker_processes)
        return self.pool.imap_unordered(target, range(count), chunksize=64)

    def roles(self) -> dict[str, list[int]]:
        """Idle workers rename themselves; everything else is a daemon or an agent of one."""
        roles: dict[str, list[int]] = {"worker": [], "daemon": []}
        for pid in descendants():
            roles["worker" if title(pid).startswith("ray::IDLE") else "daemon"].append(pid)
        return roles

    def stop(self) -> None:
        """Stop the cluster."""
        if self.pool is not None:
            self.pool.terminate()
        ray.shutdown()


SYSTEM = Ray
