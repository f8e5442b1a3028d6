"""The node's cache of objects: one file per content, shared by all processes of the node.

A file is named by the sha256 of its content and never changed, so that children map it into
memory and share its pages. The processes agree through the file system alone; whatever a killed
one held, the kernel lets go of:

- *fetching* holds an exclusive ``flock`` on one of 256 lock files, chosen by the sha256;
- *pinning* holds a shared ``flock`` on the object's own file;
- *evicting* takes a file's ``flock`` exclusively, without waiting: who gets it may delete.

Use is recorded in the access time alone: with a ``file://`` store the file may be a hard link, and
that store's etags depend on the modification time.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from flame_broker.errors import ObjectNotFound, StoreError
from flame_broker.logs import get_logger
from flame_broker.objects import ObjectRef, is_sha256
from flame_broker.store.base import Store
from flame_broker.store.partial import PartialFile, copy_content

__all__ = ["NodeCache", "Pin"]

_log = get_logger("flame.broker")

_ABANDONED_S = 24 * 3600.0  # more than a clock is set by
"""An unfinished file that nobody has written to for so long belongs to a process that is gone."""

_KEEP_SHARE = 0.9
"""Eviction goes down to this share of the limit, so that it does not run at every insertion."""

_RECOUNT_SHARE = 1 / 16
"""After insertions of this share of the limit, what other processes inserted is counted again."""


class Pin:
    """Keeps a cached file from being evicted until released; also a context manager.

    Args:
        path: The file.
        fd: The file, open; closed at the release.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd
        # Waits only while an eviction looks at this very file.
        fcntl.flock(fd, fcntl.LOCK_SH)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()

    def twin(self) -> Pin:
        """One more pin on the same file, released on its own."""
        return Pin(self.path, os.dup(self._fd))

    def release(self) -> None:
        """Let the file be evicted. Safe to call twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class _Entry(NamedTuple):
    used_ns: int
    size: int
    sha256: str


class NodeCache:
    """Content-addressed files below a folder of its own, bounded in size.

    Any number of processes and threads may use the same folder at once.

    Args:
        directory: Made, with mode 700, if it is not there.
        limit_bytes: What the files may take together. An object that is larger is served all the
            same, and is the first to go when it is not used any more.

    Raises:
        StoreError: The folder cannot be made.
    """

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        self._objects = directory / "objects"
        self._incoming = directory / "incoming"
        self._locks = directory / "locks"
        self._limit_bytes = limit_bytes
        self._uncounted_bytes = limit_bytes
        with _local_errors(directory):
            self._make_folders()
            self._remove_abandoned()

    def path_for(self, sha256: str) -> Path:
        """Where the content of this sha256 lies if it is cached.

        Raises:
            StoreError: This is no sha256.
        """
        if not is_sha256(sha256):
            raise StoreError(f"{sha256!r} is not a sha256: 64 lower-case hex digits")
        return self._objects / sha256

    def fetch(self, ref: ObjectRef, store: Store) -> Path:
        """The object as a file, downloaded if it is not there yet.

        Nothing holds the file afterwards: take ``hold`` where an eviction might come between.

        Raises:
            ObjectNotFound: The store does not have it.
            StoreError: The store failed, or has another content under this key.
        """
        with self.hold(ref, store) as pin:
            return pin.path

    def hold(self, ref: ObjectRef, store: Store) -> Pin:
        """The object as a pinned file. One download, however many processes ask at once.

        Raises:
            ObjectNotFound: The store does not have it.
            StoreError: The store failed, or has another content under this key.
        """
        path = self.path_for(ref.sha256)
        with _local_errors(path):
            pin = self._pin(path, ref.size)
            if pin is not None:
                return pin
            with self._fetching(ref.sha256):
                # Whoever had the lock before may have fetched just this.
                pin = self._pin(path, ref.size) or self._download(ref, store, path)
            self._inserted(ref.size, keep=ref.sha256)
        return pin

    def pin(self, sha256: str) -> Pin:
        """Keep a cached file from being evicted.

        Raises:
            ObjectNotFound: It is not cached.
        """
        path = self.path_for(sha256)
        with _local_errors(path):
            pin = self._pin(path, None)
        if pin is None:
            raise ObjectNotFound(f"object {sha256} is not in the cache {self._objects.parent}")
        return pin

    def open(self, sha256: str) -> memoryview:
        """A cached content, mapped read-only; it stays valid after an eviction.

        Raises:
            ObjectNotFound: It is not cached.
        """
        with self.pin(sha256) as pin, _local_errors(pin.path), pin.path.open("rb") as file:
            # An empty file cannot be mapped.
            if not file.seek(0, os.SEEK_END):
                return memoryview(b"")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def adopt(self, path: Path, sha256: str) -> Path:
        """Take over a finished file; it is moved, and must not be changed any more.

        Args:
            path: The file; afterwards gone from there.
            sha256: Of its content; not checked again.
        """
        target = self.path_for(sha256)
        with _local_errors(path), self._fetching(sha256):
            size = path.stat().st_size
            cached = self._pin(target, size)
            if cached is None:
                self._move_in(path, target)
            else:
                # A pin is on the file that is there, so that one stays.
                cached.release()
                path.unlink()
        self._inserted(size, keep=sha256)
        return target

    def used_bytes(self) -> int:
        """What all cached files take together."""
        return sum(entry.size for entry in self._entries())

    def evict(self, *, keep: str = "") -> None:
        """Delete the files that were not used for longest until the limit is kept.

        Pinned files stay. While another process evicts, nothing happens.

        Args:
            keep: The sha256 of a content that stays, too.
        """
        with _try_lock(self._locks / "evict") as locked:
            if not locked:
                return
            self._uncounted_bytes = 0
            entries = sorted(self._entries())
            used = before = sum(entry.size for entry in entries)
            if used <= self._limit_bytes:
                return
            for entry in entries:
                if used <= self._limit_bytes * _KEEP_SHARE:
                    break
                if entry.sha256 != keep and self._remove(entry.sha256):
                    used -= entry.size
            _log.info("cache.evicted", freed_bytes=before - used, used_bytes=used)

    def _pin(self, path: Path, size: int | None) -> Pin | None:
        """A pin on a cached file; None if it is absent, or not as long as it should be."""
        try:
            fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        pin = Pin(path, fd)
        found = os.fstat(fd)
        damaged = size is not None and found.st_size != size
        if damaged:
            _log.warning("cache.damaged", path=str(path), size=found.st_size, expected=size)
        if damaged or not _is_at(path, found):
            pin.release()
            return None
        # Another user's file can be read but not touched; its owner's use counts then.
        with suppress(PermissionError):
            os.utime(fd, ns=(time.time_ns(), found.st_mtime_ns))
        return pin

    def _download(self, ref: ObjectRef, store: Store, path: Path) -> Pin:
        """Fetch, check and pin; the file gets its place last, so nobody sees it unpinned."""
        incoming = self._incoming / ref.sha256
        # We hold the lock: what lies there was left by a killed process.
        for left in self._incoming.glob(f"*{ref.sha256}*"):
            left.unlink(missing_ok=True)
        store.get_file(ref.key, incoming, sha256=ref.sha256, size=ref.size, frozen=True)
        incoming.chmod(0o444)
        pin = Pin(path, os.open(incoming, os.O_RDONLY))
        _place(incoming, path)
        return pin

    def _move_in(self, path: Path, target: Path) -> None:
        try:
            path.chmod(0o444)
            _place(path, target)
        except OSError:
            # Another file system.
            with PartialFile(self._incoming, target.name) as part:
                copy_content(path, part.fd)
                os.fchmod(part.fd, 0o444)
                part.path.replace(target)
            path.unlink()

    def _inserted(self, size: int, *, keep: str) -> None:
        """Count an insertion, and evict when it is time to look at the whole."""
        self._uncounted_bytes += size
        if self._uncounted_bytes > self._limit_bytes * _RECOUNT_SHARE:
            self.evict(keep=keep)

    def _remove(self, sha256: str) -> bool:
        """Delete a file unless it is pinned; whether it is gone."""
        path = self._objects / sha256
        try:
            fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, os.fstat(fd)):
                path.unlink()
        except BlockingIOError:
            return False
        finally:
            os.close(fd)
        return True

    def _entries(self) -> Iterator[_Entry]:
        with os.scandir(self._objects) as files:
            for file in files:
                # It may be evicted while we walk.
                with suppress(FileNotFoundError):
                    found = file.stat(follow_symlinks=False)
                    yield _Entry(found.st_atime_ns, found.st_size, file.name)

    def _make_folders(self) -> None:
        for folder in (self._objects.parent, self._objects, self._incoming, self._locks):
            folder.mkdir(0o700, parents=True, exist_ok=True)

    def _remove_abandoned(self) -> None:
        # The time of change of the inode: a hard link keeps the old modification time.
        oldest_s = time.time() - _ABANDONED_S
        for path in self._incoming.iterdir():
            with suppress(FileNotFoundError):
                if path.stat().st_ctime < oldest_s:
                    path.unlink()

    @contextmanager
    def _fetching(self, sha256: str) -> Iterator[None]:
        """Hold the lock on bringing in this content (and those with the same first byte)."""
        self._make_folders()  # somebody may have cleared the cache
        with (self._locks / sha256[:2]).open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _is_at(path: Path, found: os.stat_result) -> bool:
    """Whether the open file is still the one that has this name."""
    try:
        return os.path.samestat(path.stat(), found)
    except FileNotFoundError:
        return False


def _place(source: Path, target: Path) -> None:
    source.replace(target)
    # Renaming one hard link over another of the same file leaves both.
    source.unlink(missing_ok=True)


@contextmanager
def _try_lock(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock, or yield False at once if someone else does."""
    with path.open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@contextmanager
def _local_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise StoreError(f"the cache cannot use {path}: {exc.strerror}") from exc
