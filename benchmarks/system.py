"""What a measured system has to offer: the interface between `measure` and `systems/*.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Target = Callable[..., Any]
"""A function of the module `targets`."""


RABBITMQ_LIMIT_BYTES = 128 * 1024**2
"""RabbitMQ's default `max_message_size`; a larger message closes the channel."""


class Unsupported(Exception):
    """The system has no way to do this; the reason is printed in place of the number."""


@dataclass(frozen=True, slots=True)
class Lab:
    """The services and folders that one measured system may use."""

    amqp_url: str
    store_url: str
    s3_endpoint: str
    workdir: Path
    worker_processes: int = 2


class System(ABC):
    """One system under measurement, seen from its client.

    A driver process makes one object, calls `start` once, measures, and calls `stop` once.
    """

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    @abstractmethod
    def start(self) -> None:
        """Bring the worker processes up; return when they are ready for a first call."""

    def connect(self) -> None:  # noqa: B027 - most systems have no client apart from their cluster
        """Make the client. The cold burst's clock runs from just before this."""

    @abstractmethod
    def call(self, target: Target, *args: Any) -> Any:
        """Run one call and wait for its result."""

    @abstractmethod
    def burst(self, target: Target, arguments: Iterable[Any]) -> list[Any]:
        """Submit one call for each argument as separate futures; return all results."""

    def map(self, target: Target, count: int) -> Iterable[Any]:
        """Run `target` over `range(count)` with the system's own batching, in any order."""
        raise Unsupported("no map that batches calls")

    def roles(self) -> dict[str, list[int]]:
        """Process ids by role, besides the client's own; by default none."""
        return {}

    @abstractmethod
    def stop(self) -> None:
        """Stop everything that `start` and `connect` brought up."""
