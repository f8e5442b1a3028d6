"""Values and code in the object store, as the client puts and gets them."""

from __future__ import annotations

import hashlib
import mmap
import os
import tempfile
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final

from flame.bell import take
from flame.packaging import PackedTarget, local_code
from flame_broker.codec import Encoded, decode_value, encode_value
from flame_broker.messages import INLINE_BYTES
from flame_broker.objects import ObjectRef

if TYPE_CHECKING:
    from flame_broker.store import Store

__all__ = ["Values"]

_THREADS: Final = 8
_WAITING: Final = 64
_MAPPED_BYTES: Final = 1024 * 1024


class Values:
    """The client's side of the store: opened at the first need, used from any thread.

    Args:
        url: Gives the store's URL, or raises ``ConfigError`` if none is configured.
        folder: For downloads in progress.
    """

    def __init__(self, url: Callable[[], str], folder: Path) -> None:
        self._url = url
        self._folder = folder
        self._lock = threading.Lock()
        self._store: Store | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._places: SimpleQueue[None] = SimpleQueue()
        for _ in range(_WAITING):
            self._places.put(None)

    @property
    def store(self) -> Store:
        """The object store.

        Raises:
            ConfigError: None is configured; the message names ``FLAME_STORE_URL``.
        """
        if self._store is None:
            from flame_broker.store import open_store

            with self._lock:
                if self._store is None:
                    self._store = open_store(self._url())
        return self._store

    def put_object(self, value: object) -> ObjectRef:
        """Store a value under the sha256 of its encoding; one that is there is not sent again."""
        with local_code:
            encoded = encode_value(value)
        return self.put(encoded)

    def put(self, encoded: Encoded) -> ObjectRef:
        """Store an encoded value."""
        digest = _sha256(encoded.segments)
        ref = ObjectRef(f"objects/{digest}", encoded.nbytes, digest)
        if self.store.stat(ref.key) is None:
            self.store.put(ref.key, encoded.segments, sha256=digest)
        return ref

    def put_target(self, packed: PackedTarget) -> None:
        """Store the pickle of a target, if the store does not have it."""
        if packed.blob is not None and self.store.stat(packed.key) is None:
            self.store.put(packed.key, packed.blob, sha256=packed.target.sha256)

    def get_object(self, ref: ObjectRef) -> Any:
        """Fetch a value. Large arrays in it are mapped from a file, and may be written to."""
        if ref.size <= max(_MAPPED_BYTES, INLINE_BYTES):
            return decode_value(self.store.get(ref.key, sha256=ref.sha256))
        return decode_value(memoryview(self._fetch(ref)))

    def _fetch(self, ref: ObjectRef) -> mmap.mmap:
        self._folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix="fetch-", dir=self._folder)
        os.close(handle)
        path = Path(name)
        try:
            self.store.get_file(ref.key, path, sha256=ref.sha256, size=ref.size, frozen=True)
            with path.open("rb") as file:
                # Private pages: writing to an array changes neither the file nor the store.
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        finally:
            path.unlink(missing_ok=True)

    def in_background(self, work: Callable[[], object], *, bounded: bool = False) -> None:
        """Run in a thread of a small pool.

        Args:
            work: What to do; it must see to its own errors.
            bounded: Wait here while many such jobs are waiting; never from a job itself.
        """
        if self._pool is None:
            with self._lock:
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="flame-values")
        if not bounded:
            self._pool.submit(work)
            return
        take(self._places)
        self._pool.submit(work).add_done_callback(lambda _: self._places.put(None))

    def close(self) -> None:
        """Finish what runs in the background and let go of connections."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
        if self._store is not None:
            self._store.close()


def _sha256(segments: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for segment in segments:
        digest.update(segment)
    return digest.hexdigest()
