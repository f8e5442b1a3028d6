"""Services for all tests: started when first asked for, one of each per test run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from lab import MissingService, RabbitNode, RedisServer, S3Server
from lab.cluster import LabCluster
from lab.postgres import PostgresServer
from lab.rabbit_cluster import RabbitCluster
from lab.s3 import CREDENTIALS

pytest.register_assert_rewrite("contract")

Service = TypeVar("Service")


def started(start: Callable[[], Service]) -> Service:
    """Start a service; without its program skip here, and fail under continuous integration."""
    try:
        return start()
    except MissingService as exc:
        if os.environ.get("CI"):
            pytest.fail(f"continuous integration needs every service: {exc}")
        pytest.skip(str(exc))


@pytest.fixture(scope="session", autouse=True)
def _isolated_settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the user's own configuration out of the tests, and the tests out of their home."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("FLAME_")]:
            patch.delenv(name)
        patch.setenv("FLAME_HOME", str(tmp_path_factory.mktemp("flame-home")))
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def rabbit() -> Iterator[RabbitNode]:
    """The run's RabbitMQ node, shared by all tests: one that stops a node starts its own."""
    node = started(RabbitNode)
    try:
        yield node.start()
    finally:
        node.close()


@pytest.fixture
def rabbit_vhost(rabbit: RabbitNode) -> Iterator[str]:
    """URL of a virtual host that only this test uses; deleted afterwards."""
    url = rabbit.vhost()
    yield url
    if rabbit.running:
        rabbit.delete_vhost(url)


@pytest.fixture
def own_rabbit() -> Iterator[RabbitNode]:
    """A RabbitMQ node of this test's own, to stop, kill and alarm."""
    node = started(RabbitNode)
    try:
        yield node.start()
    finally:
        node.close()


@pytest.fixture(scope="module")
def rabbit_cluster() -> Iterator[RabbitCluster]:
    """Three RabbitMQ nodes that are one cluster: who kills one of them starts it again."""
    cluster = started(RabbitCluster)
    try:
        yield cluster.start()
    finally:
        cluster.close()


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """The run's S3 (and SQS) server, shared by all tests."""
    server = S3Server()
    try:
        yield started(server.start)
    finally:
        server.stop()


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server, which only ``make test-all`` insists on."""
    try:
        server = PostgresServer()
    except MissingService as exc:
        if os.environ.get("LAB_ALL"):
            pytest.fail(str(exc))
        pytest.skip(str(exc))
    try:
        yield server.start()
    finally:
        server.close()


@pytest.fixture(scope="session")
def redis() -> Iterator[RedisServer]:
    """The run's Redis server, shared by all tests."""
    server = started(RedisServer)
    try:
        yield server.start()
    finally:
        server.close()


@pytest.fixture
def redis_url(redis: RedisServer) -> str:
    """URL of the run's Redis server."""
    return redis.url


@pytest.fixture
def sqs_url(s3: S3Server) -> str:
    """URL of the run's SQS server."""
    return s3.sqs_url()


@pytest.fixture
def cluster(rabbit_vhost: str, tmp_path: Path) -> Iterator[LabCluster]:
    """A cluster on a virtual host of its own, without workers yet."""
    made = LabCluster(rabbit_vhost, tmp_path)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def own_cluster(own_rabbit: RabbitNode, tmp_path: Path) -> Iterator[LabCluster]:
    """A cluster on a RabbitMQ node of its own, to stop and kill."""
    made = LabCluster(own_rabbit.url, tmp_path)
    try:
        yield made
    finally:
        made.close()
