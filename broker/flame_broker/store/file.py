"""The object store in a folder: what the embedded cluster and a shared file system use.

An object is one file under the folder, named by its key and never changed in place: it is built
under ``.flame/`` and then linked or renamed to its name. Whatever replaces or removes a name that
is there holds a lock, so that ``if_match`` compares and writes in one step.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flame_broker.errors import ConfigError, ObjectNotFound, PreconditionFailed, StoreError
from flame_broker.store.base import Data, ObjectStat, check_key, segments_of
from flame_broker.store.hashing import check_content, sha256_of_file
from flame_broker.store.partial import PartialFile, copy_content, write_all
from flame_broker.store.urls import StoreUrl

__all__ = ["FileStore"]

_OWN_FOLDER = ".flame"
"""Below the store's folder: unfinished files and the lock. No key may start with it."""

_PRIVATE = 0o700


class FileStore:
    """Objects as files below one folder.

    Args:
        folder: Made, with mode 700, when the first object is put.
        fsync: Wait for the disk at each put; otherwise a power cut may lose the latest objects.
    """

    def __init__(self, folder: Path, *, fsync: bool = False) -> None:
        self._folder = folder
        self._own = folder / _OWN_FOLDER
        self._fsync = fsync

    @classmethod
    def from_url(cls, url: StoreUrl) -> FileStore:
        """The store of ``file:///folder?fsync=true``.

        Raises:
            ConfigError: The URL names another host, no folder, or an unknown option.
        """
        if url.host not in ("", "localhost") or url.path in ("", "/"):
            raise ConfigError(f"the store URL {url.masked}: expected file:///absolute/folder")
        return cls(Path(url.path), fsync=bool(url.options({"fsync": False})["fsync"]))

    def put(
        self,
        key: str,
        data: Data,
        *,
        sha256: str | None = None,
        if_absent: bool = False,
        if_match: str | None = None,
    ) -> ObjectStat:
        """Write an object; see ``Store.put``."""
        target = self._path(key)
        digest = None if sha256 else hashlib.sha256()
        with self._writing(key), PartialFile(self._own, "put") as part:
            position = 0
            for segment in segments_of(data):
                position = write_all(part.fd, segment, position)
                if digest:
                    digest.update(segment)
            self._place(part, key, target, if_absent=if_absent, if_match=if_match)
        return self._stat(key, target, sha256 or (digest.hexdigest() if digest else None))

    def put_file(
        self,
        key: str,
        path: Path,
        *,
        sha256: str | None = None,
        if_absent: bool = False,
        if_match: str | None = None,
        frozen: bool = False,
    ) -> ObjectStat:
        """Write a file's content, as a hard link if it is frozen; see ``Store.put_file``."""
        target = self._path(key)
        if not path.is_file():
            raise StoreError(f"cannot read {path}: it is not a file")
        with self._writing(key), PartialFile(self._own, "put") as part:
            if not (frozen and part.become_link_to(path)):
                copy_content(path, part.fd)
            sha256 = sha256 or sha256_of_file(part.path)
            self._place(part, key, target, if_absent=if_absent, if_match=if_match)
        return self._stat(key, target, sha256)

    def get(self, key: str, *, sha256: str | None = None) -> bytes:
        """Read an object into memory; see ``Store.get``."""
        with self._reading(key):
            content = self._path(key).read_bytes()
        if sha256 is not None:
            found = hashlib.sha256(content).hexdigest()
            check_content(self._name(key), (found, len(content)), sha256=sha256, size=None)
        return content

    def get_file(
        self,
        key: str,
        path: Path,
        *,
        sha256: str | None = None,
        size: int | None = None,
        frozen: bool = False,
    ) -> ObjectStat:
        """Read an object into a file, as a hard link if it is frozen; see ``Store.get_file``."""
        source = self._path(key)
        with self._reading(key), PartialFile(path.parent, path.name) as part:
            if not (frozen and part.become_link_to(source)):
                copy_content(source, part.fd)
            found = sha256_of_file(part.path)
            stat = self._stat(key, part.path, found)
            check_content(self._name(key), (found, stat.size_bytes), sha256=sha256, size=size)
            part.path.replace(path)
        return stat

    def stat(self, key: str) -> ObjectStat | None:
        """What is known of an object: its size, etag and time; see ``Store.stat``."""
        path = self._path(key)
        try:
            with self._reading(key):
                return self._stat(key, path, None) if path.is_file() else None
        except ObjectNotFound:
            return None

    def delete(self, key: str) -> None:
        """Remove an object; see ``Store.delete``."""
        path = self._path(key)
        if not path.is_file():
            return
        with self._writing(key), self._locked(), suppress(FileNotFoundError):
            path.unlink()

    def list(self, prefix: str = "") -> Iterator[ObjectStat]:
        """The objects whose keys start so, in the order of their keys; see ``Store.list``."""
        folder = prefix.rpartition("/")[0]
        start = self._path(folder) if folder else self._folder
        for key, entry in _files_below(start, f"{folder}/" if folder else ""):
            if key.startswith(prefix):
                # It may be deleted while we walk.
                with suppress(FileNotFoundError):
                    yield self._stat(key, Path(entry.path), None)

    def describe(self) -> str:
        """The folder as a URL."""
        return f"file://{self._folder}"

    def close(self) -> None:
        """Nothing is held open between calls."""

    def _path(self, key: str) -> Path:
        if check_key(key).split("/", 1)[0] == _OWN_FOLDER:
            raise StoreError(f"{key!r} is not an object key: {_OWN_FOLDER}/ belongs to the store")
        return self._folder / key

    def _name(self, key: str) -> str:
        return f"object {key} in {self.describe()}"

    def _stat(self, key: str, path: Path, sha256: str | None) -> ObjectStat:
        found = path.stat()
        # A new inode for each put. Not the ctime: a hard link made by a reader changes that.
        etag = f"{found.st_ino:x}-{found.st_mtime_ns:x}-{found.st_size:x}"
        return ObjectStat(key, found.st_size, etag, sha256, found.st_mtime)

    def _place(
        self,
        part: PartialFile,
        key: str,
        target: Path,
        *,
        if_absent: bool,
        if_match: str | None,
    ) -> None:
        """Give the finished file its name, if the conditions hold."""
        if self._fsync:
            os.fsync(part.fd)
        target.parent.mkdir(parents=True, exist_ok=True)
        if if_absent:
            self._link(part, key, target)
        else:
            with self._locked():
                if if_match is not None:
                    self._check_match(key, target, if_match)
                part.path.replace(target)
        if self._fsync:
            _sync_folder(target.parent)

    def _link(self, part: PartialFile, key: str, target: Path) -> None:
        try:
            os.link(part.path, target)
        except FileExistsError:
            raise PreconditionFailed(f"{self._name(key)} exists already") from None

    def _check_match(self, key: str, target: Path, etag: str) -> None:
        if not target.is_file():
            raise PreconditionFailed(f"{self._name(key)} is gone")
        if self._stat(key, target, None).etag != etag:
            raise PreconditionFailed(f"{self._name(key)} was changed by someone else")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock on changes to names that are there; the kernel frees a dead holder's."""
        with (self._own / "lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _writing(self, key: str) -> Iterator[None]:
        try:
            self._folder.mkdir(_PRIVATE, parents=True, exist_ok=True)
            self._own.mkdir(_PRIVATE, exist_ok=True)
            yield
        except OSError as exc:
            raise StoreError(f"cannot write {self._name(key)}: {exc.strerror}") from exc

    @contextmanager
    def _reading(self, key: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as exc:
            raise ObjectNotFound(f"there is no {self._name(key)}") from exc
        except OSError as exc:
            raise StoreError(f"cannot read {self._name(key)}: {exc.strerror}") from exc


def _files_below(folder: Path, prefix: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Keys and files, in the order of the keys: a folder sorts as its name and a slash."""
    try:
        with os.scandir(folder) as entries:
            found = {e.name + "/" * e.is_dir(follow_symlinks=False): e for e in entries}
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in sorted(found):
        if not name.endswith("/"):
            yield prefix + name, found[name]
        elif prefix + name != f"{_OWN_FOLDER}/":
            yield from _files_below(Path(found[name].path), prefix + name)


def _sync_folder(folder: Path) -> None:
    """Make a new name in a folder outlive a power cut (the directory entry is data, too)."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
