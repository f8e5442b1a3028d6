"""A cluster of three brokers loses one: calls go on, and none is lost."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

import flame
from flame_broker.resources import DEFAULT_CLASS
from flame_broker.topology import calls_queue, reply_queue
from lab import TcpProxy
from lab.cluster import LabCluster
from lab.rabbit_cluster import RabbitCluster
from lab.wait import wait_until

SILENCE_S = 30.0
"""Far more than docs/operations.md says: the machine may be busy with three brokers."""

pytestmark = pytest.mark.timeout(400)


def note(folder: str, number: int, seconds: float) -> int:
    with Path(folder, str(number)).open("a") as file:
        file.write("x")
    time.sleep(seconds)  # the call's work
    return number


class Ends:
    """When, and how often, futures were resolved."""

    def __init__(self) -> None:
        self.at: list[float] = []
        self.ids: list[str] = []

    def watch(self, future: flame.ObjectFuture[int]) -> flame.ObjectFuture[int]:
        future.add_done_callback(self._note)
        return future

    def _note(self, future: flame.ObjectFuture[int]) -> None:
        self.at.append(time.monotonic())
        self.ids.append(future.id)

    def longest_silence_s(self, since: float) -> float:
        """The longest pause between two results from then on."""
        after = [since, *(at for at in self.at if at > since)]
        return max(later - earlier for earlier, later in pairwise(after))


@pytest.fixture
def cluster(rabbit_cluster: RabbitCluster, tmp_path: Path) -> Iterator[LabCluster]:
    rabbit_cluster.start()
    made = LabCluster(rabbit_cluster.url, tmp_path)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize(
    "calls", [1000, pytest.param(5000, marks=pytest.mark.soak)], ids=lambda n: f"{n}_calls"
)
def test_calls_go_on_when_the_broker_that_leads_their_queue_is_killed(
    rabbit_cluster: RabbitCluster, cluster: LabCluster, tmp_path: Path, calls: int
) -> None:
    cluster.orchestrator()
    cluster.worker("--slots", "2")
    cluster.worker("--slots", "2")
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        service, ends = runner.service(note), Ends()
        queue = calls_queue(cluster.key_id, "default", DEFAULT_CLASS).name
        assert service(str(tmp_path), calls, 0.0).get(timeout=30) == calls
        leader = rabbit_cluster.leader_of(queue)
        assert len(rabbit_cluster.members_of(queue)) == 3
        futures = [ends.watch(service(str(tmp_path), n, 0.01)) for n in range(calls)]
        wait_until(lambda: len(ends.at) > calls // 10, 60)
        leader.kill()
        killed_at = time.monotonic()
        assert runner.get(futures, timeout=120) == list(range(calls))
        silence_s = ends.longest_silence_s(killed_at)
        sys.stdout.write(f"no result for {silence_s:.2f} s after the kill\n")
        assert silence_s < SILENCE_S
        assert sorted(ends.ids) == sorted(future.id for future in futures)
        known = lambda: Counter(call["state"] for call in client.calls(limit=9999))  # noqa: E731
        wait_until(lambda: known() == {"succeeded": calls + 1}, 60, lambda: f"{known()}")


def test_results_find_a_client_whose_reply_queue_is_lost_with_a_broker_it_has_left(
    rabbit_cluster: RabbitCluster, cluster: LabCluster, tmp_path: Path
) -> None:
    first, second, third = rabbit_cluster.nodes
    cluster.broker_url = rabbit_cluster.url_of(second.port, third.port)
    cluster.orchestrator()
    cluster.worker("--slots", "2")
    with (
        TcpProxy(first.port) as proxy,
        cluster.client(rabbit_cluster.url_of(proxy.port, second.port)) as client,
        flame.Runner("t", client=client) as runner,
    ):
        service, ends = runner.service(note), Ends()
        assert service(str(tmp_path), 600, 0.0).get(timeout=30) == 600
        reply = reply_queue(cluster.key_id, client.id, 0).name
        assert rabbit_cluster.leader_of(reply) is first
        proxy.refuse()
        proxy.cut()
        assert service(str(tmp_path), 601, 0.0).get(timeout=60) == 601
        futures = [ends.watch(service(str(tmp_path), n, 0.01)) for n in range(600)]
        wait_until(lambda: len(ends.at) > 60, 60)
        first.kill()
        killed_at = time.monotonic()
        assert runner.get(futures, timeout=60) == list(range(600))
        assert ends.longest_silence_s(killed_at) < SILENCE_S
        assert sorted(ends.ids) == sorted(future.id for future in futures)
