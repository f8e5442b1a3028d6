"""The node's cache: one download, shared files, a bounded size, nothing pinned is evicted."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flame_broker.errors import ObjectNotFound, StoreError
from flame_broker.objects import ObjectRef
from flame_broker.store import Store, open_store
from flame_broker.store.cache import NodeCache
from lab.http_store import HttpStoreServer
from lab.wait import wait_until

MIB = 1024 * 1024
Put = Callable[[bytes], ObjectRef]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(f"file://{tmp_path}/store")


@pytest.fixture
def put(store: Store) -> Put:
    """Puts a content and returns its reference."""

    def put(content: bytes) -> ObjectRef:
        sha256 = hashlib.sha256(content).hexdigest()
        store.put(f"objects/{sha256}", content, sha256=sha256)
        return ObjectRef(f"objects/{sha256}", len(content), sha256)

    return put


def make_cache(tmp_path: Path, limit_bytes: int = 100 * MIB) -> NodeCache:
    return NodeCache(tmp_path / "cache", limit_bytes)


def cached(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "cache" / "objects").iterdir()}


def names(*refs: ObjectRef) -> set[str]:
    return {ref.sha256 for ref in refs}


def test_a_fetched_object_lies_under_its_sha256(tmp_path: Path, store: Store, put: Put) -> None:
    cache, ref = make_cache(tmp_path), put(b"hello")
    path = cache.fetch(ref, store)
    assert path == cache.path_for(ref.sha256)
    assert path.read_bytes() == b"hello"
    assert bytes(cache.open(ref.sha256)) == b"hello"


def test_a_cached_object_needs_no_store(tmp_path: Path, store: Store, put: Put) -> None:
    cache, ref = make_cache(tmp_path), put(b"hello")
    cache.fetch(ref, store)
    store.delete(ref.key)
    assert make_cache(tmp_path).fetch(ref, store).read_bytes() == b"hello"


def test_an_absent_object_leaves_nothing_behind(tmp_path: Path, store: Store) -> None:
    cache = make_cache(tmp_path)
    sha256 = "0" * 64
    with pytest.raises(ObjectNotFound):
        cache.fetch(ObjectRef("objects/absent", 1, sha256), store)
    with pytest.raises(ObjectNotFound):
        cache.open(sha256)
    with pytest.raises(ObjectNotFound):
        cache.pin(sha256)
    assert cached(tmp_path) == set()
    assert list((tmp_path / "cache" / "incoming").iterdir()) == []


@pytest.mark.parametrize("sha256", ["", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 64 + "/.."])
def test_only_a_sha256_names_a_file(tmp_path: Path, store: Store, sha256: str) -> None:
    cache = make_cache(tmp_path)
    for use in (cache.path_for, cache.open, cache.pin):
        with pytest.raises(StoreError, match="not a sha256"):
            use(sha256)
    with pytest.raises(StoreError, match="not a sha256"):
        cache.fetch(ObjectRef("k", 0, sha256), store)


def test_an_empty_object_can_be_opened(tmp_path: Path, store: Store, put: Put) -> None:
    cache, ref = make_cache(tmp_path), put(b"")
    cache.fetch(ref, store)
    assert bytes(cache.open(ref.sha256)) == b""


def test_an_opened_object_is_read_only(tmp_path: Path, store: Store, put: Put) -> None:
    cache, ref = make_cache(tmp_path), put(b"hello")
    cache.fetch(ref, store)
    assert cache.open(ref.sha256).readonly


def test_damaged_content_never_gets_into_the_cache(tmp_path: Path, store: Store, put: Put) -> None:
    cache, ref = make_cache(tmp_path), put(b"hello")
    store.put(ref.key, b"hellO")
    with pytest.raises(StoreError, match=f"sha256.*{ref.sha256}"):
        cache.fetch(ref, store)
    assert cached(tmp_path) == set()


def test_a_cached_file_of_the_wrong_length_is_fetched_again(
    tmp_path: Path, store: Store, put: Put
) -> None:
    cache, ref = make_cache(tmp_path), put(b"hello")
    path = cache.path_for(ref.sha256)
    path.write_bytes(b"hel")
    assert cache.fetch(ref, store).read_bytes() == b"hello"


def test_many_threads_cause_one_download(tmp_path: Path) -> None:
    content = b"0123456789" * 100_000
    sha256 = hashlib.sha256(content).hexdigest()
    with HttpStoreServer() as server, ThreadPoolExecutor(16) as pool:
        store = open_store(server.url)
        store.put("k", content)
        cache, ref = make_cache(tmp_path), ObjectRef("k", len(content), sha256)
        paths = set(pool.map(lambda _: cache.fetch(ref, store), range(64)))
        assert [seen.method for seen in server.seen] == ["PUT", "GET"]
    assert paths == {cache.path_for(sha256)}


FETCHER = """
import sys
from pathlib import Path
from flame_broker.objects import ObjectRef
from flame_broker.store import open_store
from flame_broker.store.cache import NodeCache
url, folder, size, sha256 = sys.argv[1:]
cache = NodeCache(Path(folder), 100_000_000)
cache.fetch(ObjectRef("k", int(size), sha256), open_store(url))
print(len(cache.open(sha256)))
"""


def test_many_processes_cause_one_download(tmp_path: Path) -> None:
    content = b"0123456789" * 300_000
    sha256 = hashlib.sha256(content).hexdigest()
    with HttpStoreServer() as server:
        open_store(server.url).put("k", content)
        arguments = [server.url, str(tmp_path / "cache"), str(len(content)), sha256]
        children = [
            subprocess.Popen([sys.executable, "-c", FETCHER, *arguments], stdout=subprocess.PIPE)
            for _ in range(4)
        ]
        outputs = [child.communicate(timeout=60)[0].strip() for child in children]
        assert [seen.method for seen in server.seen] == ["PUT", "GET"]
    assert outputs == [b"%d" % len(content)] * 4


def test_a_download_that_was_killed_is_done_again(tmp_path: Path) -> None:
    content = b"0123456789" * 300_000
    sha256 = hashlib.sha256(content).hexdigest()
    ref = ObjectRef("k", len(content), sha256)
    incoming = tmp_path / "cache" / "incoming"
    with HttpStoreServer() as server:
        store = open_store(server.url)
        store.put("k", content)
        server.hold_after = MIB
        arguments = [server.url, str(tmp_path / "cache"), str(len(content)), sha256]
        with subprocess.Popen([sys.executable, "-c", FETCHER, *arguments]) as child:
            wait_until(lambda: incoming.is_dir() and list(incoming.iterdir()), 30)
            child.send_signal(signal.SIGKILL)
        server.hold_after = None
        assert list(incoming.iterdir()) != []
        assert make_cache(tmp_path).fetch(ref, store).read_bytes() == content
    assert list(incoming.iterdir()) == []


def test_old_unfinished_files_are_removed_at_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cache(tmp_path)
    left = tmp_path / "cache" / "incoming" / ".something.part"
    left.write_bytes(b"half")
    make_cache(tmp_path)
    assert left.exists(), "it may be another process's"
    now_s = time.time()
    monkeypatch.setattr(time, "time", lambda: now_s + 2 * 24 * 3600)
    make_cache(tmp_path)
    assert not left.exists()


def test_the_least_recently_used_objects_go_first(tmp_path: Path, store: Store, put: Put) -> None:
    cache = make_cache(tmp_path, limit_bytes=1000)
    a, b, c, d = (put(letter * 300) for letter in (b"a", b"b", b"c", b"d"))
    for ref in (a, b, c):
        cache.fetch(ref, store)
    cache.fetch(a, store)
    cache.fetch(d, store)
    assert cached(tmp_path) == names(a, c, d)
    assert cache.used_bytes() == 900


def test_insertions_of_other_processes_count_too(tmp_path: Path, store: Store, put: Put) -> None:
    ours, theirs = (make_cache(tmp_path, limit_bytes=1000) for _ in range(2))
    a, b, c, d = (put(letter * 300) for letter in (b"a", b"b", b"c", b"d"))
    ours.fetch(a, store)
    theirs.fetch(b, store)
    theirs.fetch(c, store)
    ours.fetch(d, store)
    assert cached(tmp_path) == names(b, c, d)


def test_a_pinned_object_is_not_evicted(tmp_path: Path, store: Store, put: Put) -> None:
    cache = make_cache(tmp_path, limit_bytes=1000)
    other = make_cache(tmp_path, limit_bytes=1000)
    a, b = put(b"a" * 600), put(b"b" * 600)
    with cache.hold(a, store) as pin:
        other.fetch(b, store)
        other.evict()
        assert pin.path.read_bytes() == b"a" * 600
        assert a.sha256 in cached(tmp_path)
    other.fetch(b, store)
    other.evict()
    assert cached(tmp_path) == names(b)


def test_two_pins_need_two_releases(tmp_path: Path, store: Store, put: Put) -> None:
    cache = make_cache(tmp_path, limit_bytes=10)
    ref = put(b"a" * 100)
    first, second = cache.hold(ref, store), cache.pin(ref.sha256)
    first.release()
    first.release()
    cache.evict()
    assert cached(tmp_path) == names(ref)
    second.release()
    cache.evict()
    assert cached(tmp_path) == set()


def test_the_pin_of_a_killed_process_holds_nothing(tmp_path: Path, store: Store, put: Put) -> None:
    cache = make_cache(tmp_path, limit_bytes=10)
    ref = put(b"a" * 100)
    cache.fetch(ref, store)
    program = (
        "import signal, sys\nfrom pathlib import Path\n"
        "from flame_broker.store.cache import NodeCache\n"
        "pin = NodeCache(Path(sys.argv[1]), 10).pin(sys.argv[2])\n"
        "print('pinned', flush=True)\nsignal.pause()"
    )
    arguments = [sys.executable, "-c", program, str(tmp_path / "cache"), ref.sha256]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"pinned\n"
        cache.evict()
        assert cached(tmp_path) == names(ref)
        child.kill()
    cache.evict()
    assert cached(tmp_path) == set()


def test_a_mapped_object_outlives_its_eviction(tmp_path: Path, store: Store, put: Put) -> None:
    cache, ref = make_cache(tmp_path, limit_bytes=10), put(b"a" * 100_000)
    cache.fetch(ref, store)
    view = cache.open(ref.sha256)
    cache.evict()
    assert cached(tmp_path) == set()
    assert bytes(view) == b"a" * 100_000


def test_an_object_over_the_limit_is_served_and_then_goes(
    tmp_path: Path, store: Store, put: Put
) -> None:
    cache = make_cache(tmp_path, limit_bytes=1000)
    large, small = put(b"a" * 5000), put(b"b")
    assert len(cache.fetch(large, store).read_bytes()) == 5000
    cache.fetch(small, store)
    cache.evict()
    assert cached(tmp_path) == names(small)


def test_an_adopted_file_is_moved_in(tmp_path: Path, store: Store, put: Put) -> None:
    cache, ref = make_cache(tmp_path), put(b"hello")
    for _ in range(2):
        spooled = tmp_path / "spooled"
        spooled.write_bytes(b"hello")
        assert cache.adopt(spooled, ref.sha256).read_bytes() == b"hello"
        assert not spooled.exists()
    store.delete(ref.key)
    assert cache.fetch(ref, store).read_bytes() == b"hello"


def test_a_file_of_another_file_system_is_adopted_too(
    tmp_path: Path, store: Store, put: Put
) -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system here")
    cache, ref = make_cache(tmp_path), put(b"hello")
    spooled = shm / f"flame-test-{os.getpid()}"
    spooled.write_bytes(b"hello")
    assert cache.adopt(spooled, ref.sha256).read_bytes() == b"hello"
    assert not spooled.exists()


def test_an_adopted_file_that_is_absent_is_a_store_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="absent"):
        make_cache(tmp_path).adopt(tmp_path / "absent", "0" * 64)


def test_use_does_not_disturb_the_etag_of_a_linked_store(
    tmp_path: Path, store: Store, put: Put
) -> None:
    cache, ref = make_cache(tmp_path), put(b"hello")
    before = store.stat(ref.key)
    for _ in range(3):
        cache.fetch(ref, store)
    assert store.stat(ref.key) == before


def test_fetching_and_evicting_at_once_never_fails(tmp_path: Path, store: Store, put: Put) -> None:
    caches = [make_cache(tmp_path, limit_bytes=2000) for _ in range(4)]
    refs = [put(b"%d" % number * 500) for number in range(10)]
    stop = threading.Event()

    def use(cache: NodeCache) -> int:
        for turn in range(100):
            ref = refs[turn * 7 % len(refs)]
            with cache.hold(ref, store) as pin:
                assert pin.path.stat().st_size == ref.size
                assert len(cache.open(ref.sha256)) == ref.size
        return 100

    def evict() -> None:
        while not stop.is_set():
            caches[0].evict()

    with ThreadPoolExecutor(5) as pool:
        evictor = pool.submit(evict)
        try:
            assert sum(pool.map(use, caches)) == 400
        finally:
            stop.set()
        evictor.result()


def test_a_cache_that_somebody_cleared_is_filled_again(
    tmp_path: Path, store: Store, put: Put
) -> None:
    cache, ref, result = make_cache(tmp_path), put(b"hello"), tmp_path / "result"
    cache.fetch(ref, store)
    shutil.rmtree(tmp_path / "cache")
    assert cache.fetch(ref, store).read_bytes() == b"hello"
    shutil.rmtree(tmp_path / "cache")
    result.write_bytes(b"world")
    assert cache.adopt(result, hashlib.sha256(b"world").hexdigest()).read_bytes() == b"world"


def test_a_cache_that_cannot_be_made_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"")
    with pytest.raises(StoreError, match="cannot use"):
        make_cache(tmp_path)
