"""The object store in a folder."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from contract.store import StoreContract
from flame_broker.errors import ObjectNotFound, StoreError
from flame_broker.store import Store, open_store


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store") / "objects and more"


@pytest.fixture
def store(folder: Path) -> Store:
    return open_store(f"file://{folder}")


class TestFileContract(StoreContract):
    pass


class TestDurableFileContract(StoreContract):
    @pytest.fixture
    def store(self, folder: Path) -> Store:
        return open_store(f"file://{folder}?fsync=true")


def test_the_folder_is_private_and_holds_plain_files(store: Store, folder: Path) -> None:
    store.put("a/b", b"hello")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert (folder / "a" / "b").read_bytes() == b"hello"


def test_nothing_is_made_before_the_first_put(store: Store, folder: Path) -> None:
    assert store.stat("k") is None
    assert list(store.list()) == []
    store.delete("k")
    assert not folder.exists()


def test_a_percent_sign_in_the_url_is_decoded(tmp_path: Path) -> None:
    open_store(f"file://{tmp_path}/a%20b").put("k", b"")
    assert (tmp_path / "a b" / "k").exists()


def test_a_frozen_file_is_linked_and_not_copied(store: Store, folder: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.write_bytes(b"hello")
    store.put_file("k", source, frozen=True)
    store.get_file("k", out, frozen=True)
    assert (folder / "k").stat().st_ino == source.stat().st_ino == out.stat().st_ino


def test_a_frozen_file_is_copied_where_links_do_not_work(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    source = tmp_path / "source"
    source.write_bytes(b"hello")
    monkeypatch.setattr(os, "link", refuse)
    store.put_file("k", source, frozen=True)
    store.get_file("k", tmp_path / "out", frozen=True)
    assert (tmp_path / "out").read_bytes() == b"hello"


def test_getting_a_linked_file_again_leaves_nothing_behind(store: Store, tmp_path: Path) -> None:
    store.put("k", b"hello")
    for _ in range(2):
        store.get_file("k", tmp_path / "out", frozen=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_reader_that_links_does_not_change_the_etag(store: Store, tmp_path: Path) -> None:
    etag = store.put("k", b"hello").etag
    store.get_file("k", tmp_path / "out", frozen=True)
    assert store.put("k", b"world", if_match=etag).etag != etag


def test_no_unfinished_file_stays_or_is_listed(store: Store, folder: Path, tmp_path: Path) -> None:
    store.put("k", b"hello")
    with pytest.raises(StoreError):
        store.put_file("j", tmp_path)
    assert [stat.key for stat in store.list()] == ["k"]
    assert [path.name for path in (folder / ".flame").iterdir()] == ["lock"]


def test_the_folder_of_the_store_itself_is_no_key(store: Store) -> None:
    with pytest.raises(StoreError, match="belongs to the store"):
        store.put(".flame/lock", b"")


def test_an_object_and_a_folder_cannot_share_a_name(store: Store) -> None:
    store.put("a", b"hello")
    with pytest.raises(StoreError, match="a/b"):
        store.put("a/b", b"hello")
    with pytest.raises(ObjectNotFound):
        store.get("a/b")
    store.put("c/d", b"hello")
    with pytest.raises(StoreError, match="object c"):
        store.put("c", b"hello")
    with pytest.raises(ObjectNotFound):
        store.get("c")
    assert store.stat("c") is None
    store.delete("c")
    assert store.get("c/d") == b"hello"


def test_a_folder_that_cannot_be_written_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="cannot write"):
        open_store(f"file://{tmp_path}/file").put("k", b"hello")


def test_damage_on_disk_is_found(store: Store, folder: Path, tmp_path: Path) -> None:
    put = store.put("k", b"hello")
    (folder / "k").write_bytes(b"hellO")
    with pytest.raises(StoreError, match=f"sha256.*{put.sha256}"):
        store.get("k", sha256=put.sha256)
    with pytest.raises(StoreError, match=f"sha256.*{put.sha256}"):
        store.get_file("k", tmp_path / "out", sha256=put.sha256)


def test_describe_is_the_url(store: Store, folder: Path) -> None:
    assert store.describe() == f"file://{folder}"
