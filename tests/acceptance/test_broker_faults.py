"""The broker stops, is absent, raises its alarm: every future resolves, once, or says why not."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

import pytest

import flame
from flame.errors import BrokerUnavailable
from lab import RabbitNode, TcpProxy
from lab.cluster import LabCluster
from lab.ports import free_port
from lab.rabbit_client import drop_connection
from lab.wait import wait_until


def note(folder: str, number: int, seconds: float = 0.0) -> int:
    with Path(folder, str(number)).open("a") as file:
        file.write("x")
    time.sleep(seconds)  # the call's work
    return number


def note_in_time(folder: str, number: int, seconds: float) -> int:
    """Leave a mark; after 400 calls the others wait until the test is done with its cuts."""
    if len(os.listdir(folder)) >= 400:  # noqa: PTH208
        wait_until(Path(folder, "cut").exists, 90)
    return note(folder, number, seconds)


def resolutions(futures: list[flame.ObjectFuture]) -> Counter[str]:
    """Count how often each future is resolved."""
    counted: Counter[str] = Counter()
    for future in futures:
        future.add_done_callback(lambda f: counted.update([f.id]))
    return counted


@pytest.mark.timeout(180)
def test_a_broker_away_for_twenty_seconds_loses_and_doubles_nothing(
    own_rabbit: RabbitNode, own_cluster: LabCluster, tmp_path: Path
) -> None:
    own_cluster.worker("--slots", "2")
    with own_cluster.client() as client, flame.Runner("t", client=client) as runner:
        service = runner.service(note)
        futures = [service(str(tmp_path), i, 0.005) for i in range(1000)]
        counted = resolutions(futures)
        wait_until(lambda: sum(f.done() for f in futures) > 20, 30)
        own_rabbit.stop()
        time.sleep(20)  # the absence itself is the fault
        own_rabbit.start()
        assert runner.get(futures, timeout=90) == list(range(1000))
        assert set(counted.values()) == {1}
        assert runner.get([service(str(tmp_path), i) for i in range(10)], timeout=30)


@pytest.mark.timeout(180)
def test_a_killed_broker_loses_nothing_that_was_accepted(
    own_rabbit: RabbitNode, own_cluster: LabCluster, tmp_path: Path
) -> None:
    own_cluster.worker("--slots", "2")
    with own_cluster.client() as client, flame.Runner("t", client=client) as runner:
        service = runner.service(note)
        futures = [service(str(tmp_path), i, 0.002) for i in range(1000)]
        wait_until(lambda: sum(f.done() for f in futures) > 20, 30)
        own_rabbit.settle()
        own_rabbit.kill()
        own_rabbit.start()
        assert runner.get(futures, timeout=90) == list(range(1000))


def test_connecting_to_no_broker_fails_in_time_and_says_where(tmp_path: Path) -> None:
    url = f"amqp://guest:secret@127.0.0.1:{free_port()}/"
    began = time.monotonic()
    with pytest.raises(BrokerUnavailable, match=r"127\.0\.0\.1") as caught:
        LabCluster(url, tmp_path).client()
    assert time.monotonic() - began < 20
    assert "secret" not in str(caught.value)


@pytest.mark.timeout(120)
def test_publishing_to_a_broker_that_went_away_fails_within_the_deadline(
    own_rabbit: RabbitNode, own_cluster: LabCluster
) -> None:
    own_cluster.worker("--slots", "1")
    with own_cluster.client() as client, flame.Runner("t", client=client) as runner:
        service = runner.service(abs)
        assert service(-1).get(timeout=30) == 1
        own_rabbit.stop()
        future = service(-2)
        with pytest.raises(BrokerUnavailable):
            future.get(timeout=60)


@pytest.mark.timeout(120)
def test_under_a_memory_alarm_publishers_wait_and_consumers_go_on(
    own_rabbit: RabbitNode, own_cluster: LabCluster, tmp_path: Path
) -> None:
    own_cluster.worker("--slots", "2")
    with own_cluster.client() as client, flame.Runner("t", client=client) as runner:
        service = runner.service(note)
        before = [service(str(tmp_path), i, 0.01) for i in range(500)]
        wait_until(lambda: any(f.done() for f in before), 30)
        own_rabbit.set_alarm()
        during = [service(str(tmp_path), i) for i in range(500, 700)]
        started = lambda: len(list(tmp_path.glob("[0-9]*")))  # noqa: E731
        wait_until(lambda: started() >= 450, 60, lambda: f"{started()} started")  # they go on
        assert not any(f.done() for f in during)
        own_rabbit.clear_alarm()
        assert runner.get(before + during, timeout=60) == list(range(700))


@pytest.mark.parametrize("victim", ["client", "worker", "both"])
@pytest.mark.timeout(120)
def test_cut_connections_lose_nothing(
    cluster: LabCluster, rabbit: RabbitNode, tmp_path: Path, victim: str
) -> None:
    with TcpProxy(rabbit.port) as proxy:
        through = cluster.broker_url.replace(f":{rabbit.port}", f":{proxy.port}")
        worker_url = cluster.broker_url if victim == "client" else through
        client_url = cluster.broker_url if victim == "worker" else through
        cluster.worker("--slots", "2", FLAME_BROKER_URL=worker_url)
        with cluster.client(client_url) as client, flame.Runner("t", client=client) as runner:
            service = runner.service(note)
            futures = [service(str(tmp_path), i, 0.005) for i in range(600)]
            counted = resolutions(futures)
            for share in (50, 200, 400):
                wait_until(lambda: sum(f.done() for f in futures) >= share, 60)  # noqa: B023
                proxy.cut()
            assert runner.get(futures, timeout=60) == list(range(600))
            assert set(counted.values()) == {1}


@pytest.mark.parametrize("role", ["publisher", "consumer"])
@pytest.mark.parametrize("victim", ["flame-worker", "flame client"])
@pytest.mark.timeout(180)
def test_one_cut_connection_of_the_two_loses_nothing(
    cluster: LabCluster, rabbit: RabbitNode, tmp_path: Path, victim: str, role: str
) -> None:
    cluster.worker("--slots", "2")
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        service = runner.service(note_in_time)
        futures = [service(str(tmp_path), i, 0.03) for i in range(600)]
        counted = resolutions(futures)
        for share in (20, 200):
            wait_until(lambda: sum(f.done() for f in futures) >= share, 60)  # noqa: B023
            cut = drop_connection(rabbit, role, of=f'{victim} [^"]+', url=cluster.broker_url)
            assert cut == 1
        (tmp_path / "cut").touch()
        assert runner.get(futures, timeout=90) == list(range(600))
        assert set(counted.values()) == {1}
        assert service(str(tmp_path), 600, 0.0).get(timeout=30) == 600
    runs = [len((tmp_path / str(number)).read_text()) for number in range(600)]
    assert set(runs) == {1}  # a worker knows what it has in hand when that is delivered again


def test_a_reply_queue_that_expired_is_replaced_and_later_calls_resolve(
    own_rabbit: RabbitNode, own_cluster: LabCluster
) -> None:
    own_cluster.worker("--slots", "1")
    with own_cluster.client() as client, flame.Runner("t", client=client) as runner:
        service = runner.service(os.getpid)
        assert service().get(timeout=30)
        for name in own_rabbit.ctl("-q", "list_queues", "name").split():
            if ".reply." in name:
                own_rabbit.ctl("-q", "delete_queue", name)
        assert service().get(timeout=30)
