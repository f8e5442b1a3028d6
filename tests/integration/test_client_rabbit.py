"""The client against a real broker: reconnects, lost queues, a broker that is gone."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import flame
from flame import sending
from flame_broker.errors import BrokerUnavailable
from flame_broker.keys import generate_key
from flame_broker.store import open_store
from lab import RabbitNode, TcpProxy, wait_until
from lab.fake_worker import FakeWorker


def double(value: int) -> int:
    return value * 2


@pytest.fixture
def worker(rabbit_vhost: str, tmp_path: Path) -> Iterator[FakeWorker]:
    store = open_store((tmp_path / "store").as_uri())
    fake = FakeWorker(rabbit_vhost, generate_key(), store)
    yield fake.start()
    fake.close()


@pytest.fixture
def proxy(rabbit: RabbitNode) -> Iterator[TcpProxy]:
    with TcpProxy(rabbit.port) as made:
        yield made


@pytest.fixture
def client(
    rabbit: RabbitNode, proxy: TcpProxy, worker: FakeWorker, tmp_path: Path
) -> Iterator[flame.Client]:
    """A client whose connections go through the proxy; the worker's do not."""
    url = worker.url.replace(f":{rabbit.port}/", f":{proxy.port}/")
    store = (tmp_path / "store").as_uri()
    with flame.connect(url, store=store, key=worker.key_text) as made:
        yield made


def test_thousands_of_futures_and_a_map(client: flame.Client, worker: FakeWorker) -> None:
    service = flame.Runner(client=client).service(double)
    futures = [service(n) for n in range(5000)]
    assert [f.result(30) for f in futures] == [2 * n for n in range(5000)]
    assert list(service.map(range(20_000))) == [2 * n for n in range(20_000)]
    assert client.session.courier.pending.window.inside == 0


def test_every_future_resolves_once_when_connections_are_cut_under_load(
    client: flame.Client, worker: FakeWorker, proxy: TcpProxy
) -> None:
    service = flame.Runner(client=client).service(double)
    assert service(1).get(10) == 2
    futures = []
    for batch in range(5):
        futures += [service(n) for n in range(batch * 1000, batch * 1000 + 1000)]
        proxy.cut()
    assert [f.result(60) for f in futures] == [2 * n for n in range(5000)]
    assert service(7).get(30) == 14


def test_results_that_came_while_the_client_was_away_are_delivered(
    client: flame.Client, worker: FakeWorker, proxy: TcpProxy
) -> None:
    worker.hold()
    service = flame.Runner(client=client).service(double)
    futures = [service(n) for n in range(200)]
    wait_until(lambda: sum(len(frame.calls) for frame in worker.frames) >= 200)
    proxy.refuse()
    proxy.cut()
    worker.release()
    assert not futures[0].wait(0.3)
    proxy.accept()
    assert [f.result(60) for f in futures] == [2 * n for n in range(200)]


def test_a_deleted_reply_queue_is_made_again(client: flame.Client, worker: FakeWorker) -> None:
    service = flame.Runner(client=client).service(double)
    assert service(1).get(10) == 2
    reply = worker.frames[-1].reply
    worker.run(worker.transport.delete(reply))
    wait_until(lambda: worker.run(worker.transport.depth(reply)) is not None, 30)
    assert service(2).get(30) == 4


def test_a_deleted_calls_queue_is_declared_again(
    client: flame.Client, worker: FakeWorker, rabbit: RabbitNode, rabbit_vhost: str
) -> None:
    service = flame.Runner(client=client).service(double)
    assert service(1).get(10) == 2
    queue = worker.frames[-1].queue
    worker.run(worker.transport.delete(queue))
    future = service(2)
    # Ready or not: RabbitMQ 3.10 may hand it to the consumer of the deleted queue, and lose sight.
    wait_until(lambda: sum(rabbit.queues(rabbit_vhost).get(queue, ())) == 1 or future.done(), 30)


def test_publishing_to_a_broker_that_is_gone_fails_within_the_deadline(
    client: flame.Client, worker: FakeWorker, proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "DEFAULT_DEADLINE_S", 0.5)
    service = flame.Runner(client=client).service(double)
    assert service(1).get(10) == 2
    proxy.refuse()
    proxy.cut()
    futures = [service(n) for n in range(100)]
    for future in futures:
        with pytest.raises(BrokerUnavailable):
            future.result(10)
    proxy.accept()
    wait_until(lambda: _answers(service), 30)


def _answers(service: flame.RunnerService[int]) -> bool:
    try:
        return service(3).get(5) == 6
    except BrokerUnavailable:
        return False


PROGRAM = """
    import os, sys, flame

    def double(value):
        return value * 2

    client = flame.connect(sys.argv[1], store=sys.argv[2], key=sys.argv[3])
    service = flame.Runner(client=client).service(double)
    print(service(1).get(20))
    child = os.fork()
    if child == 0:
        print(service(2).get(20), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
    print(service(3).get(20))
"""


def test_a_plain_script_and_its_forked_child_both_call(worker: FakeWorker, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    arguments = [worker.url, (tmp_path / "store").as_uri(), worker.key_text]
    done = subprocess.run(
        # Python 3.12 warns of any fork with threads.
        [sys.executable, "-u", "-W", "ignore::DeprecationWarning", str(program), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == ["2", "4", "6"], done.stderr
    assert done.stderr == ""
