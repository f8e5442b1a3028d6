"""What every store promises, as tests: subclass, supply the fixture ``store``, run."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flame_broker.errors import ObjectNotFound, PreconditionFailed, StoreError
from flame_broker.store import ObjectStat, Store
from flame_broker.store.base import Buffer

HELLO_SHA256 = hashlib.sha256(b"hello").hexdigest()
LARGE_BYTES = 70 * 1024 * 1024 + 7


def large_content() -> bytes:
    """More than two ranges and four parts, every part another; made in a blink."""
    block = b"".join(n.to_bytes(4) for n in range(16 * 1024))
    return b"".join(n.to_bytes(4) + block for n in range(LARGE_BYTES // (len(block) + 4) + 1))[
        :LARGE_BYTES
    ]


def in_forked_child(check: Callable[[], bool]) -> bool:
    """Whether the check holds in a child forked from here; one that hangs is killed."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        outcome = 1
        try:
            outcome = 0 if check() else 2
        finally:
            os._exit(outcome)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


class StoreContract:
    """Subclass it in a test module, with a fixture that gives an empty store."""

    can_list = True
    compares_atomically = True

    def test_what_was_put_is_got(self, store: Store) -> None:
        stat = store.put("greetings/hello.txt", b"hello")
        assert (stat.key, stat.size_bytes, stat.sha256) == ("greetings/hello.txt", 5, HELLO_SHA256)
        assert store.get("greetings/hello.txt", sha256=HELLO_SHA256) == b"hello"

    def test_an_object_is_replaced_as_a_whole(self, store: Store) -> None:
        first = store.put("k", b"a long first content")
        second = store.put("k", b"short")
        assert store.get("k") == b"short"
        assert first.etag != second.etag

    def test_segments_are_one_object(self, store: Store) -> None:
        segments: list[Buffer] = [b"he", bytearray(b"l"), b"", memoryview(b"xlox")[1:3]]
        assert store.put("k", segments).sha256 == HELLO_SHA256
        assert store.get("k") == b"hello"

    def test_typed_buffers_count_in_bytes(self, store: Store) -> None:
        numbers = memoryview(b"abcdefgh").cast("I")
        assert store.put("k", [numbers, b"i"]).size_bytes == 9
        assert store.get("k") == b"abcdefghi"

    @pytest.mark.parametrize("segments", [b"", []])
    def test_an_object_may_be_empty(
        self, store: Store, segments: bytes | list[bytes], tmp_path: Path
    ) -> None:
        assert store.put("k", segments).size_bytes == 0
        assert store.get("k") == b""
        assert store.get_file("k", tmp_path / "out", size=0).size_bytes == 0
        assert (tmp_path / "out").read_bytes() == b""

    def test_a_file_is_put_and_got(self, store: Store, tmp_path: Path) -> None:
        source, out = tmp_path / "source", tmp_path / "out"
        source.write_bytes(b"hello")
        assert store.put_file("k", source).sha256 == HELLO_SHA256
        store.get_file("k", out, sha256=HELLO_SHA256, size=5)
        assert out.read_bytes() == b"hello"
        assert sorted(tmp_path.iterdir()) == [out, source]

    def test_a_file_may_be_changed_after_it_was_put(self, store: Store, tmp_path: Path) -> None:
        source = tmp_path / "source"
        source.write_bytes(b"hello")
        store.put_file("k", source)
        with source.open("r+b") as file:
            file.write(b"j")
        assert store.get("k") == b"hello"

    def test_a_file_that_was_got_is_the_callers(self, store: Store, tmp_path: Path) -> None:
        store.put("k", b"hello")
        store.get_file("k", tmp_path / "out")
        with (tmp_path / "out").open("r+b") as file:
            file.write(b"j")
        assert store.get("k") == b"hello"

    def test_a_file_that_was_got_replaces_an_older_one(self, store: Store, tmp_path: Path) -> None:
        (tmp_path / "out").write_bytes(b"something older and longer")
        store.put("k", b"hello")
        store.get_file("k", tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == b"hello"

    def test_a_source_that_is_absent_is_a_store_error(self, store: Store, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match="absent"):
            store.put_file("k", tmp_path / "absent")
        assert store.stat("k") is None

    def test_a_large_object_goes_up_and_down_in_pieces(self, store: Store, tmp_path: Path) -> None:
        content = large_content()
        cut = 20 * 1024 * 1024 + 3
        sha256 = hashlib.sha256(content).hexdigest()
        stat = store.put("large", [content[:cut], memoryview(content)[cut:]])
        assert stat.sha256 == sha256
        store.get_file("large", tmp_path / "out", sha256=sha256, size=LARGE_BYTES)
        assert (tmp_path / "out").read_bytes() == content
        assert store.get("large", sha256=sha256) == content

    def test_stat_tells_size_etag_and_time(self, store: Store) -> None:
        put = store.put("k", b"hello")
        stat = store.stat("k")
        assert stat is not None
        assert (stat.key, stat.size_bytes, stat.etag) == ("k", 5, put.etag)
        assert stat.modified_s

    def test_an_absent_object_is_not_found(self, store: Store, tmp_path: Path) -> None:
        with pytest.raises(ObjectNotFound, match="absent/one"):
            store.get("absent/one")
        with pytest.raises(ObjectNotFound, match="absent/one"):
            store.get_file("absent/one", tmp_path / "out")
        assert store.stat("absent/one") is None
        assert list(tmp_path.iterdir()) == []

    def test_a_deleted_object_is_gone_and_deleting_again_is_fine(self, store: Store) -> None:
        store.put("a/b", b"hello")
        store.delete("a/b")
        store.delete("a/b")
        assert store.stat("a/b") is None

    def test_list_gives_the_keys_of_a_prefix_in_order(self, store: Store) -> None:
        if not self.can_list:
            with pytest.raises(StoreError, match="list"):
                store.list("a")
            return
        for key in ("b", "a/z", "a-b", "a/b/c", "ab", "a/b.d"):
            store.put(key, b"hello")
        everything = [stat.key for stat in store.list()]
        assert everything == sorted(everything)
        assert [stat.key for stat in store.list("a/")] == [k for k in everything if k[:2] == "a/"]
        assert [stat.key for stat in store.list("a")] == [k for k in everything if k != "b"]
        assert [stat.key for stat in store.list("a/b")] == [k for k in everything if k[:3] == "a/b"]
        assert list(store.list("zz/top")) == []
        assert next(iter(store.list("b"))).size_bytes == 5

    @pytest.mark.parametrize("key", ["", "/etc/passwd", "../up", "a/../../up", "a//b", "a\x00b"])
    def test_a_key_that_could_leave_the_store_is_refused(self, store: Store, key: str) -> None:
        for use in (store.get, store.stat, store.delete, lambda k: store.put(k, b"")):
            with pytest.raises(StoreError, match="not an object key"):
                use(key)

    def test_keys_may_hold_any_letters(self, store: Store) -> None:
        key = "ä b/100%?#&=+~;:@/名.txt"
        store.put(key, b"hello")
        assert store.get(key) == b"hello"
        if self.can_list:
            assert [stat.key for stat in store.list()] == [key]

    def test_if_absent_writes_once(self, store: Store) -> None:
        store.put("k", b"first", if_absent=True)
        with pytest.raises(PreconditionFailed, match="exists"):
            store.put("k", b"second", if_absent=True)
        assert store.get("k") == b"first"

    def test_if_match_writes_only_over_what_it_names(self, store: Store) -> None:
        first = store.put("k", b"first")
        second = store.put("k", b"second", if_match=first.etag)
        with pytest.raises(PreconditionFailed, match="changed"):
            store.put("k", b"third", if_match=first.etag)
        assert store.get("k") == b"second"
        store.put("k", b"third", if_match=second.etag)
        assert store.get("k") == b"third"

    def test_if_match_of_an_absent_object_fails(self, store: Store) -> None:
        first = store.put("k", b"first")
        store.delete("k")
        with pytest.raises(PreconditionFailed):
            store.put("k", b"second", if_match=first.etag)
        assert store.stat("k") is None

    def test_conditions_hold_for_large_objects_and_files(
        self, store: Store, tmp_path: Path
    ) -> None:
        source = tmp_path / "source"
        source.write_bytes(large_content())
        first = store.put_file("k", source, if_absent=True)
        with pytest.raises(PreconditionFailed):
            store.put_file("k", source, if_absent=True)
        with pytest.raises(PreconditionFailed):
            store.put_file("k", source, if_match='"another"')
        assert store.put_file("k", source, if_match=first.etag).size_bytes == LARGE_BYTES

    def test_of_many_first_writers_one_wins(self, store: Store) -> None:
        self._require_atomic_server()

        def write(number: int) -> ObjectStat | None:
            try:
                return store.put("k", f"writer {number}".encode(), if_absent=True)
            except PreconditionFailed:
                return None

        with ThreadPoolExecutor(8) as pool:
            winners = [number for number, stat in enumerate(pool.map(write, range(24))) if stat]
        assert len(winners) == 1
        assert store.get("k") == f"writer {winners[0]}".encode()

    def test_of_many_updates_none_is_lost(self, store: Store) -> None:
        self._require_atomic_server()
        store.put("k", b"0")

        def add_one(_: int) -> None:
            while True:
                stat = store.stat("k")
                assert stat is not None
                value = int(store.get("k"))
                try:
                    store.put("k", b"%d" % (value + 1), if_match=stat.etag)
                except PreconditionFailed:
                    continue
                return

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(add_one, range(20)))
        assert store.get("k") == b"20"

    def test_another_content_than_the_reference_names_is_refused(
        self, store: Store, tmp_path: Path
    ) -> None:
        store.put("k", b"hello")
        with pytest.raises(StoreError, match="sha256"):
            store.get("k", sha256="0" * 64)
        with pytest.raises(StoreError, match="sha256"):
            store.get_file("k", tmp_path / "out", sha256="0" * 64)
        with pytest.raises(StoreError, match="5 bytes where 6 were put"):
            store.get_file("k", tmp_path / "out", size=6, sha256=HELLO_SHA256)
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_is_absent_is_a_store_error(self, store: Store, tmp_path: Path) -> None:
        store.put("k", b"hello")
        with pytest.raises(StoreError):
            store.get_file("k", tmp_path / "absent" / "out")

    def test_many_threads_may_use_one_store(self, store: Store) -> None:
        def round_trip(number: int) -> bool:
            content = b"%d" % number * 1000
            store.put(f"k{number}", content)
            return store.get(f"k{number}") == content

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(round_trip, range(64)))

    def test_a_forked_child_may_use_the_store(self, store: Store) -> None:
        store.put("k", b"hello")
        assert in_forked_child(lambda: store.get("k") == b"hello")
        assert store.get("k") == b"hello"

    def test_close_may_be_called_twice(self, store: Store) -> None:
        store.put("k", b"hello")
        store.close()
        store.close()

    def _require_atomic_server(self) -> None:
        if not self.compares_atomically:
            pytest.skip("this test server compares and writes in two steps")
