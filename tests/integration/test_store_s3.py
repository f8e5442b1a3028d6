"""The object store on a real S3 server (moto, in its own process)."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from uuid import uuid4

import pytest

from contract.store import StoreContract, large_content
from flame_broker.errors import PreconditionFailed, StoreError
from flame_broker.objects import ObjectRef
from flame_broker.store import Store, open_store
from flame_broker.store.cache import NodeCache
from flame_broker.store.retries import Transient
from flame_broker.store.s3_connection import S3Connection
from lab.ports import free_port
from lab.proxy import TcpProxy
from lab.s3 import S3Server
from lab.wait import wait_until

MIB = 1024 * 1024


@pytest.fixture
def bucket(s3: S3Server) -> str:
    return s3.make_bucket(f"flame-{uuid4().hex}")


@pytest.fixture
def url(s3: S3Server, bucket: str) -> str:
    return s3.store_url(bucket, "some/prefix")


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    store = open_store(url)
    yield store
    store.close()


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[TcpProxy]:
    with TcpProxy(s3.port) as proxy:
        yield proxy


def through(proxy: TcpProxy, bucket: str, options: str = "retry_s=1") -> Store:
    return open_store(f"s3://{bucket}?endpoint=http://127.0.0.1:{proxy.port}&{options}")


class TestS3Contract(StoreContract):
    # moto looks at the condition and writes in two steps, without a lock.
    compares_atomically = False


def test_objects_lie_below_the_prefix(s3: S3Server, bucket: str, store: Store) -> None:
    store.put("a/b", b"hello")
    found = s3.client().get_object(Bucket=bucket, Key="some/prefix/a/b")
    assert found["Body"].read() == b"hello"


def test_objects_elsewhere_in_the_bucket_are_not_listed(
    s3: S3Server, bucket: str, store: Store
) -> None:
    s3.client().put_object(Bucket=bucket, Key="some/prefixed", Body=b"")
    store.put("a", b"hello")
    assert [stat.key for stat in store.list()] == ["a"]


def test_a_listing_goes_on_over_pages(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flame_broker.store.s3._PAGE_OBJECTS", 3)
    keys = [f"{number:04}" for number in range(10)]
    for key in keys:
        store.put(key, b"")
    assert [stat.key for stat in store.list()] == keys


def test_the_sha256_stays_with_the_object(store: Store) -> None:
    put = store.put("k", b"hello")
    stat = store.stat("k")
    assert stat is not None
    assert stat.sha256 == put.sha256 == hashlib.sha256(b"hello").hexdigest()


@pytest.mark.parametrize("content", [b"hellO", b"hell"], ids=["damaged", "truncated"])
def test_damage_at_rest_is_found_without_a_reference(
    s3: S3Server, bucket: str, store: Store, tmp_path: Path, content: bytes
) -> None:
    put = store.put("k", b"hello")
    metadata = s3.client().head_object(Bucket=bucket, Key="some/prefix/k")["Metadata"]
    s3.client().put_object(Bucket=bucket, Key="some/prefix/k", Body=content, Metadata=metadata)
    with pytest.raises(StoreError, match=f"sha256.*{put.sha256}"):
        store.get("k")
    with pytest.raises(StoreError, match=f"sha256.*{put.sha256}"):
        store.get_file("k", tmp_path / "out")


def test_an_object_of_others_without_a_sha256_is_read(
    s3: S3Server, bucket: str, store: Store, tmp_path: Path
) -> None:
    s3.client().put_object(Bucket=bucket, Key="some/prefix/k", Body=b"hello")
    assert store.get("k") == b"hello"
    assert store.get_file("k", tmp_path / "out").sha256 is None


def test_a_failed_upload_leaves_no_parts(
    s3: S3Server, bucket: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = S3Connection.once

    def refuse_a_part(self: S3Connection, operation: str, key: str, **parameters: object) -> object:
        if parameters.get("PartNumber") == 3:
            raise StoreError("refused")
        return original(self, operation, key, **parameters)

    monkeypatch.setattr(S3Connection, "once", refuse_a_part)
    with pytest.raises(StoreError, match="refused"):
        store.put("k", large_content())
    assert "Uploads" not in s3.client().list_multipart_uploads(Bucket=bucket)
    assert store.stat("k") is None


def test_a_bucket_that_is_absent_is_named(s3: S3Server) -> None:
    store = open_store(s3.store_url("flame-absent"))
    with pytest.raises(StoreError, match="no bucket flame-absent: create it"):
        store.put("k", b"hello")
    with pytest.raises(StoreError, match="no bucket flame-absent"):
        store.get("k")
    with pytest.raises(StoreError, match="no bucket flame-absent"):
        next(iter(store.list()))


def test_a_server_that_is_down_is_a_store_error_after_retries() -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    store = open_store(f"s3://bucket/prefix?endpoint={endpoint}&retry_s=1")
    started = time.monotonic()
    with pytest.raises(StoreError, match=f"{endpoint}.*is it up.*gave up after") as caught:
        store.get("k")
    assert type(caught.value) is StoreError
    assert time.monotonic() - started < 10


def test_without_credentials_the_error_says_what_to_set(
    s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    with pytest.raises(StoreError, match="AWS_ACCESS_KEY_ID"):
        open_store(s3.store_url(bucket)).get("k")
    named = s3.store_url(bucket).replace("s3://", "s3://key:secret@")
    assert open_store(named).stat("k") is None


def test_a_profile_that_is_absent_is_a_store_error(s3: S3Server, bucket: str) -> None:
    store = open_store(s3.store_url(bucket) + "&profile=nobody")
    with pytest.raises(StoreError, match="nobody"):
        store.get("k")


def test_a_large_transfer_survives_broken_connections(
    bucket: str, proxy: TcpProxy, tmp_path: Path
) -> None:
    content = large_content()
    with _Cutter(proxy), closing(through(proxy, bucket, "retry_s=20")) as store:
        stat = store.put("large", content)
    with _Cutter(proxy), closing(through(proxy, bucket, "retry_s=20")) as store:
        store.get_file("large", tmp_path / "out", sha256=stat.sha256, size=stat.size_bytes)
    assert zlib.crc32((tmp_path / "out").read_bytes()) == zlib.crc32(content)


def test_a_server_that_dies_in_the_middle_of_a_download_is_a_store_error(
    s3: S3Server, bucket: str, proxy: TcpProxy, tmp_path: Path
) -> None:
    s3.client().put_object(Bucket=bucket, Key="large", Body=large_content())
    store = through(proxy, bucket)
    with _Cutter(proxy, for_good=True), pytest.raises(StoreError, match="gave up"):
        store.get_file("large", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_dies_in_the_middle_of_an_upload_is_a_store_error(
    bucket: str, proxy: TcpProxy
) -> None:
    store = through(proxy, bucket)
    with _Cutter(proxy, for_good=True), pytest.raises(StoreError, match="gave up"):
        store.put("large", large_content())


def test_a_server_that_is_killed_ends_in_a_store_error(tmp_path: Path) -> None:
    with S3Server() as server:
        store = open_store(server.store_url(server.make_bucket("flame")) + "&retry_s=1")
        store.put("k", b"hello")
        server.kill()
        started = time.monotonic()
        with pytest.raises(StoreError, match="is it up"):
            store.get_file("k", tmp_path / "out")
        assert time.monotonic() - started < 10


def test_a_server_that_does_not_answer_is_a_store_error_in_bounded_time(
    bucket: str, proxy: TcpProxy
) -> None:
    store = through(proxy, bucket, "retry_s=1&read_timeout_s=0.5&connect_timeout_s=0.5")
    store.put("k", b"hello")
    proxy.stall()
    started = time.monotonic()
    with pytest.raises(StoreError, match="gave up"):
        store.get("k")
    assert time.monotonic() - started < 10
    proxy.resume()
    assert store.get("k") == b"hello"


def test_a_write_whose_answer_was_lost_is_known_to_be_ours(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = S3Connection.once
    lost: list[str] = []

    def lose_first_answer(
        self: S3Connection, operation: str, key: str, **parameters: object
    ) -> object:
        reply = original(self, operation, key, **parameters)
        if operation in ("put_object", "complete_multipart_upload") and operation not in lost:
            lost.append(operation)
            raise Transient("the answer was lost")
        return reply

    monkeypatch.setattr(S3Connection, "once", lose_first_answer)
    first = store.put("small", b"hello", if_absent=True)
    assert store.put("small", b"world", if_match=first.etag).size_bytes == 5
    store.put("large", large_content(), if_absent=True)
    assert lost == ["put_object", "complete_multipart_upload"]
    with pytest.raises(PreconditionFailed):
        store.put("small", b"again", if_absent=True)


READER = """
import sys
import threading
from pathlib import Path
from flame_broker.objects import ObjectRef
from flame_broker.store import open_store
from flame_broker.store.cache import NodeCache

def anonymous_bytes():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

url, folder, size, sha256 = sys.argv[1:]
cache = NodeCache(Path(folder), 2**40)
store = open_store(url)
store.stat("warm-up")
before = anonymous_bytes()
cache.fetch(ObjectRef("large", int(size), sha256), store)
view = cache.open(sha256)
checksum = sum(view[::4096])
print(anonymous_bytes() - before)
"""


def test_a_256_mib_object_takes_little_memory_of_its_readers(
    url: str, store: Store, tmp_path: Path
) -> None:
    content = bytes(256 * MIB - 1) + b"!"
    stat = store.put("large", content)
    assert stat.sha256 is not None
    arguments = [url, str(tmp_path / "cache"), str(stat.size_bytes), stat.sha256]
    done = [
        subprocess.run(
            [sys.executable, "-c", READER, *arguments], capture_output=True, text=True, check=True
        )
        for _ in range(2)
    ]
    downloading, mapping = (int(run.stdout) for run in done)
    assert downloading < 100 * MIB
    assert mapping < 20 * MIB


def test_the_cache_fetches_from_s3(url: str, store: Store, tmp_path: Path) -> None:
    stat = store.put("k", b"hello")
    assert stat.sha256 is not None
    cache = NodeCache(tmp_path / "cache", MIB)
    path = cache.fetch(ObjectRef("k", 5, stat.sha256), store)
    assert path.read_bytes() == b"hello"


class _Cutter:
    """Cuts a proxy's connections once several are open at a time; on demand for good."""

    def __init__(self, proxy: TcpProxy, *, for_good: bool = False) -> None:
        self._proxy = proxy
        self._for_good = for_good
        self._thread = threading.Thread(target=self._cut)

    def _cut(self) -> None:
        wait_until(lambda: self._proxy.connections > 1, 30, poll_s=0.002)
        if self._for_good:
            self._proxy.refuse()
        self._proxy.cut()

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc_info: object) -> None:
        self._thread.join()
