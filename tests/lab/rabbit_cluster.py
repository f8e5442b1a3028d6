"""Three RabbitMQ nodes on this machine that are one cluster, to kill one of them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

from lab.rabbit import RabbitNode
from lab.wait import wait_until

__all__ = ["RabbitCluster"]

_SIZE = 3


class RabbitCluster:
    """One cluster of three nodes; a quorum queue has a member on each.

    Example:
        >>> with RabbitCluster() as brokers:
        ...     brokers.leader_of("work").kill()
    """

    def __init__(self) -> None:
        first = RabbitNode(management=False)
        joining = [RabbitNode(management=False, joins=first) for _ in range(_SIZE - 1)]
        self.nodes = [first, *joining]

    @property
    def url(self) -> str:
        """Address of the default virtual host that names every node."""
        return self.url_of(*(node.port for node in self.nodes))

    @staticmethod
    def url_of(*ports: int) -> str:
        """Address of the default virtual host at these ports, tried in this order."""
        hosts = ";".join(f"127.0.0.1:{port}" for port in ports)
        return f"amqp://guest:guest@{hosts}/"

    def start(self) -> Self:
        """Start a node, and two that join it; or those again that were killed."""
        self.nodes[0].start()
        with ThreadPoolExecutor() as threads:
            list(threads.map(RabbitNode.start, self.nodes))
        wait_until(lambda: self._counted() == _SIZE, 30, lambda: f"{self._counted()} nodes joined")
        return self

    def leader_of(self, queue: str) -> RabbitNode:
        """The node that leads a quorum queue, or keeps a classic one."""
        listing = self._any().ctl("list_queues", "--no-table-headers", "name", "leader", "pid")
        for line in listing.splitlines():
            name, leader, process = line.split("\t")
            if name == queue:
                return next(n for n in self.nodes if n.name in (leader, _node_of(process)))
        raise AssertionError(f"no queue {queue}: {listing}")

    def members_of(self, queue: str) -> list[RabbitNode]:
        """The nodes that have a member of a quorum queue."""
        listing = self._any().ctl("list_queues", "--no-table-headers", "name", "members")
        rows = dict(line.split("\t") for line in listing.splitlines())
        return [node for node in self.nodes if node.name in rows[queue]]

    def close(self) -> None:
        """Kill all nodes and remove what they wrote."""
        for node in reversed(self.nodes):  # the first one owns the epmd of all
            node.close()

    def _any(self) -> RabbitNode:
        return next(node for node in self.nodes if node.running)

    def _counted(self) -> int:
        return int(self._any().ctl("eval", "length(rabbit_nodes:all_running())."))

    def __enter__(self) -> Self:
        """Start it."""
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()


def _node_of(process: str) -> str:
    """The node in an Erlang process id as rabbitmqctl prints it: ``<name@host.1.2.3>``."""
    return process.strip("<>").rsplit(".", 3)[0]
