"""The system of ``docker-compose.yml``, started as a whole and used from outside."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import flame
from flame.errors import BrokerUnavailable
from lab import MissingService, wait_until
from lab.composed import ComposedSystem, composed_system

pytestmark = [
    pytest.mark.timeout(1800),  # it builds images
    pytest.mark.skipif(
        not os.environ.get("LAB_COMPOSE"),
        reason="it builds images and starts the whole system: `make compose-proof` does",
    ),
]


@pytest.fixture(scope="module")
def system() -> Iterator[ComposedSystem]:
    try:
        made = composed_system()
    except MissingService as exc:
        pytest.skip(str(exc))
    try:
        made.start()
        yield made
    finally:
        made.close()


@pytest.fixture
def runner(system: ComposedSystem) -> Iterator[flame.Runner]:
    key = system.variables["FLAME_KEY"]
    with (
        flame.connect(system.broker_url, store=system.store_url, key=key) as client,
        flame.Runner("proof", client=client) as runner,
    ):
        yield runner


def where(number: int) -> tuple[int, str]:
    """It is of this module, so it travels by value, and takes long enough to be killed."""
    time.sleep(0.2)
    return number, socket.gethostname()


def kept(number: int) -> int:
    return number


def test_calls_from_outside_run_on_both_workers(runner: flame.Runner) -> None:
    service, hosts = runner.service(where), set()

    def two_answered() -> bool:
        hosts.update(host for _, host in runner.get([service(number) for number in range(20)]))
        return len(hosts) == 2

    wait_until(two_answered, 120, lambda: f"two workers take calls; these do: {hosts}")


def test_large_values_go_through_the_object_store_both_ways(runner: flame.Runner) -> None:
    large = os.urandom(300_000)
    assert runner.service(bytes.hex)(large).get(timeout=60) == large.hex()


def test_the_history_is_kept_in_postgresql(system: ComposedSystem, runner: flame.Runner) -> None:
    assert runner.service(kept)(7).get(timeout=60) == 7
    (container,) = system.containers("postgres")
    query = "SELECT count(*) FROM batches WHERE label = 'kept' AND unended = 0"

    def rows() -> str:
        shell = "PGPASSWORD=$POSTGRES_PASSWORD psql -h 127.0.0.1 -U flame -At -c"
        return system.engine.run("exec", container, "sh", "-c", f'{shell} "{query}"').strip()

    wait_until(lambda: rows() == "1", 60, "the call and its end are written down")
    listed = command(system, "ps", "--label", "kept", "--json")
    assert [call["state"] for call in json.loads(listed)] == ["succeeded"]


def test_the_work_of_a_killed_worker_is_done_by_the_other(
    system: ComposedSystem, runner: flame.Runner
) -> None:
    victim, *_ = system.containers("worker")
    futures = [runner.service(where)(number) for number in range(100)]
    futures[0].get(timeout=60)
    system.kill(victim)
    answers = runner.get(futures)
    assert [number for number, _ in answers] == list(range(100))
    _, last = runner.service(where)(0).get(timeout=60)
    assert not victim.startswith(last)


def test_calls_outlive_a_killed_broker(system: ComposedSystem, runner: flame.Runner) -> None:
    (broker,) = system.containers("rabbitmq")
    service = runner.service(where)
    service(0).get(timeout=60)
    futures = [service(number) for number in range(50)]
    futures[0].get(timeout=60)
    system.kill(broker)
    system.engine.run("start", broker)
    assert [number for number, _ in runner.get(futures)] == list(range(50))


def test_nobody_else_may_log_in(system: ComposedSystem) -> None:
    host, port = system.address("rabbitmq", 5672)
    for login in ("guest:guest", "flame:flame", "flame:@password@"):
        url = f"amqp://{login.replace('@', '%40')}@{host}:{port}/flame"
        with pytest.raises(BrokerUnavailable, match="user or password refused"):
            flame.connect(url, key=system.variables["FLAME_KEY"])


def command(system: ComposedSystem, *words: str) -> str:
    """What the ``flame`` command prints to a user of the system."""
    environ = {
        **os.environ,
        "FLAME_BROKER_URL": system.broker_url,
        "FLAME_STORE_URL": system.store_url,
        "FLAME_KEY": system.variables["FLAME_KEY"],
    }
    program = Path(sys.executable).with_name("flame")
    done = subprocess.run(
        [program, *words], env=environ, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
