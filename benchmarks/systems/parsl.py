"""Parsl with its HighThroughputExecutor: one local block of two workers."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import parsl
from parsl.config import Config
from parsl.executors import HighThroughputExecutor
from parsl.providers import LocalProvider

import targets
from processes import descendants
from system import System, Target


@cache
def app(target: Target) -> Any:
    """The Parsl app of a target, made once as a decorator would."""
    return parsl.python_app(target)


class Parsl(System):
    """The executor's defaults, on loopback and without the encryption of its sockets."""

    def start(self) -> None:
        """Start the interchange and the workers, and wait until a worker answers."""
        executor = HighThroughputExecutor(
            address="127.0.0.1",
            max_workers_per_node=self.lab.worker_processes,
            provider=LocalProvider(init_blocks=1, min_blocks=1, max_blocks=1),
            encrypted=False,
        )
        config = Config(
            executors=[executor],
            strategy="none",
            run_dir=str(self.lab.workdir / "parsl"),
            initialize_logging=False,
        )
        self.kernel = parsl.load(config)
        self.call(targets.noop, 0)

    def call(self, target: Target, *args: Any) -> Any:
        """Submit and wait."""
        return app(target)(*args).result()

    def burst(self, target: Target, arguments: Iterable[Any]) -> list[Any]:
        """Separate futures."""
        task = app(target)
        return [future.result() for future in [task(argument) for argument in arguments]]

    def roles(self) -> dict[str, list[int]]:
        """Interchange, manager and workers, all descendants of the client."""
        return {"worker": descendants()}

    def stop(self) -> None:
        """Shut the kernel down."""
        self.kernel.cleanup()
        parsl.clear()


SYSTEM = Parsl
