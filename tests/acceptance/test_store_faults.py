"""The store is down or has lost an object: a typed error in time, then the work goes on."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import flame
from flame.errors import ObjectNotFound, StoreError
from lab import S3Server
from lab.cluster import LabCluster

LARGE = 200 * 1024
PATIENCE_S = 40.0


@pytest.fixture
def own_s3() -> Iterator[S3Server]:
    """A store of this test's own, to stop and start; it forgets everything when stopped."""
    server = S3Server()
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture
def stored(rabbit_vhost: str, own_s3: S3Server, tmp_path: Path) -> Iterator[LabCluster]:
    """A cluster whose store is an S3 server, with one worker."""
    own_s3.make_bucket("flame")
    cluster = LabCluster(rabbit_vhost, tmp_path, store_url=own_s3.store_url("flame"))
    try:
        cluster.worker("--slots", "1")
        yield cluster
    finally:
        cluster.close()


def measure(data: bytes) -> int:
    return len(data)


def test_with_the_store_down_what_needs_it_fails_in_time_and_the_rest_works(
    stored: LabCluster, own_s3: S3Server
) -> None:
    with stored.client() as client, flame.Runner("t", client=client) as runner:
        by_value, by_name, maker = (runner.service(t) for t in (measure, len, os.urandom))
        assert maker(8).wait(30)
        own_s3.stop()
        began = time.monotonic()
        code = by_value(b"x")
        large_result = maker(LARGE)
        large_argument = by_name(b"x" * LARGE)
        for future in (code, large_argument, large_result):
            with pytest.raises(StoreError) as caught:
                future.get(timeout=60)
            assert not isinstance(caught.value, ObjectNotFound)
        assert time.monotonic() - began < PATIENCE_S
        assert by_name(b"small").get(timeout=30) == 5
        own_s3.start()
        own_s3.make_bucket("flame")
        assert by_value(b"xy").get(timeout=30) == 2
        assert by_name(b"x" * LARGE).get(timeout=30) == LARGE
        assert len(maker(LARGE).get(timeout=30)) == LARGE


def test_an_object_deleted_before_its_call_runs_is_not_found(
    stored: LabCluster, own_s3: S3Server
) -> None:
    with stored.client() as client, flame.Runner("t", client=client) as runner:
        service = runner.service(len)
        ref = client.put_object(b"y" * LARGE)
        own_s3.client().delete_object(Bucket="flame", Key=ref.key)
        with pytest.raises(ObjectNotFound):
            service(ref).get(timeout=30)
        assert service(b"small").get(timeout=30) == 5


def test_an_object_that_was_changed_is_refused(stored: LabCluster, own_s3: S3Server) -> None:
    with stored.client() as client, flame.Runner("t", client=client) as runner:
        service = runner.service(len)
        ref = client.put_object(b"z" * LARGE)
        own_s3.client().put_object(Bucket="flame", Key=ref.key, Body=b"!" * ref.size)
        with pytest.raises(StoreError):
            service(ref).get(timeout=30)
        assert service(b"small").get(timeout=30) == 5
