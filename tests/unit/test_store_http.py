"""The object store on an HTTP server."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from contract.store import StoreContract, large_content
from flame_broker.errors import ObjectNotFound, StoreError
from flame_broker.store import Store, open_store
from flame_broker.store.http import HttpStore
from flame_broker.store.urls import StoreUrl
from lab.http_store import HttpStoreServer
from lab.ports import free_port

MIB = 1024 * 1024


@pytest.fixture
def server() -> Iterator[HttpStoreServer]:
    with HttpStoreServer() as server:
        yield server


@pytest.fixture
def store(server: HttpStoreServer) -> Iterator[Store]:
    store = open_store(server.url)
    yield store
    store.close()


class TestHttpContract(StoreContract):
    can_list = False


class TestHttpWithoutRangesContract(StoreContract):
    can_list = False

    @pytest.fixture
    def store(self, server: HttpStoreServer) -> Store:
        server.ranges = False
        return open_store(server.url)


def ranges_seen(server: HttpStoreServer) -> list[str]:
    return [seen.headers.get("Range", "") for seen in server.seen if seen.method == "GET"]


def test_a_large_object_is_read_in_ranges_of_the_same_content(
    server: HttpStoreServer, store: Store, tmp_path: Path
) -> None:
    stat = store.put("large", large_content())
    store.get_file("large", tmp_path / "out")
    assert len(ranges_seen(server)) == 3
    matches = [seen.headers.get("If-Match") for seen in server.seen if seen.method == "GET"]
    assert matches.count(stat.etag) == 2


def test_a_broken_connection_is_resumed_where_it_broke(
    server: HttpStoreServer, store: Store, tmp_path: Path
) -> None:
    content = large_content()[: 4 * MIB]
    store.put("k", content)
    server.cut_after = [MIB + 1000, MIB + 1000]
    store.get_file("k", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == content
    last = 4 * MIB - 1
    assert ranges_seen(server)[1:] == [f"bytes={MIB}-{last}", f"bytes={2 * MIB}-{last}"]


def test_a_broken_connection_is_read_again_into_memory(
    server: HttpStoreServer, store: Store
) -> None:
    store.put("k", b"0123456789" * 1000)
    server.cut_after = [5000]
    assert store.get("k") == b"0123456789" * 1000


def test_an_object_that_changes_while_it_is_read_is_an_error(
    server: HttpStoreServer, store: Store, tmp_path: Path
) -> None:
    store.put("k", b"0123456789" * 100_000)
    server.cut_after = [300_000]
    original = server.objects["/objects/k"]
    # Another content of the same length takes its place after the first reply.
    server.objects = _ReplacedAfterFirstRead("/objects/k", original, original[::-1])
    with pytest.raises(StoreError, match="changed"):
        store.get_file("k", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


class _ReplacedAfterFirstRead(dict[str, bytes]):
    """The server's objects, of which one is replaced once a reply has been made of it."""

    def __init__(self, path: str, first: bytes, then: bytes) -> None:
        super().__init__({path: first})
        self._path, self._then, self._reads = path, then, 0

    def get(self, path: str, default: bytes | None = None) -> bytes | None:  # type: ignore[override]
        self._reads += 1
        if self._reads > 2:
            self[self._path] = self._then
        return super().get(path, default)


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_passing_failure_is_tried_again(
    server: HttpStoreServer, store: Store, status: int
) -> None:
    server.answers = [status]
    store.put("k", b"hello")
    server.answers = [status, status]
    assert store.get("k") == b"hello"


@pytest.mark.parametrize(
    ("status", "reason"),
    [(400, "400"), (401, "user:password@"), (403, "permissions"), (405, "PUT"), (507, "full")],
)
def test_a_refusal_is_not_tried_again(
    server: HttpStoreServer, store: Store, status: int, reason: str
) -> None:
    server.answers = [status]
    with pytest.raises(StoreError, match=reason):
        store.put("k", b"hello")
    assert len(server.seen) == 1


def test_retries_end_after_their_time(server: HttpStoreServer) -> None:
    store = HttpStore(StoreUrl.parse(server.url), retry_s=0.5)
    server.answers = [503] * 1000
    started = time.monotonic()
    with pytest.raises(StoreError, match=r"503 to PUT \(gave up after \d+ tries"):
        store.put("k", b"hello")
    assert time.monotonic() - started < 5
    assert len(server.seen) >= 2


def test_a_server_that_is_down_is_a_store_error_that_names_it() -> None:
    url = f"http://127.0.0.1:{free_port()}/objects"
    store = HttpStore(StoreUrl.parse(url), retry_s=0.3)
    with pytest.raises(StoreError, match=f"{url}.*is the server up"):
        store.get("k")


def test_close_ends_the_waits_between_retries(server: HttpStoreServer, store: Store) -> None:
    server.answers = [503] * 1000
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.get("k")


def test_password_and_query_go_along(server: HttpStoreServer) -> None:
    url = server.url.replace("//", "//user:p%40ss@") + "?token=abc"
    open_store(url).put("k", b"hello")
    assert server.seen[0].path == "/objects/k?token=abc"
    expected = base64.b64encode(b"user:p@ss").decode()
    assert server.seen[0].headers["Authorization"] == f"Basic {expected}"


def test_damage_at_rest_is_found(server: HttpStoreServer, store: Store, tmp_path: Path) -> None:
    stat = store.put("k", b"hello")
    server.objects["/objects/k"] = b"hellO"
    with pytest.raises(StoreError, match=f"sha256.*{stat.sha256}"):
        store.get("k", sha256=stat.sha256)
    with pytest.raises(StoreError, match=f"sha256.*{stat.sha256}"):
        store.get_file("k", tmp_path / "out", sha256=stat.sha256)


def test_a_put_whose_answer_was_an_error_is_sent_again(
    server: HttpStoreServer, store: Store
) -> None:
    server.answers = [500]
    store.put("k", [b"he", b"llo"])
    assert server.objects["/objects/k"] == b"hello"


def test_a_gone_object_is_not_found(server: HttpStoreServer, store: Store) -> None:
    server.answers = [410]
    with pytest.raises(ObjectNotFound):
        store.get("k")
