"""Large values on the node: objects read from the shared cache, results written to the spool."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any, Final

from flame_broker.codec import Encoded, decode_value
from flame_broker.errors import ObjectNotFound
from flame_broker.objects import ObjectRef

__all__ = ["Spool", "StoredValues", "cache_path"]

_KEEP_BYTES: Final = 64 * 1024 * 1024
_UNCHANGEABLE: Final = (bytes, str)


def cache_path(cache_dir: Path, sha256: str) -> Path:
    """Where the node's cache keeps an object: see ``flame_broker.store.cache``.

    Not asked from there, because a child that imports the store pays for it in memory.
    """
    return cache_dir / "objects" / sha256


class StoredValues:
    """Objects of the node's cache, mapped into memory: all children share one copy.

    A decoded value is kept for the next calls only if it cannot be changed, because a call must
    not see what another one did to its argument; arrays are cheap to decode again, being views.
    """

    def __init__(self, cache_dir: Path) -> None:
        self._cache_dir = cache_dir
        self._kept: OrderedDict[str, bytes | str] = OrderedDict()
        self._kept_bytes = 0

    def load(self, ref: ObjectRef) -> Any:
        """The value of a reference. Arrays in it are read-only views of the shared file.

        Raises:
            ObjectNotFound: The worker did not fetch it to this node.
        """
        if ref.sha256 in self._kept:
            self._kept.move_to_end(ref.sha256)
            return self._kept[ref.sha256]
        value = decode_value(self.map(ref), load_ref=self.load)
        if type(value) in _UNCHANGEABLE:
            self._keep(ref.sha256, value)
        return value

    def map(self, ref: ObjectRef) -> memoryview:
        """The bytes of a reference, read-only; they stay valid when the file is evicted.

        Raises:
            ObjectNotFound: The worker did not fetch it to this node.
        """
        path = cache_path(self._cache_dir, ref.sha256)
        try:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size == 0:
                    return memoryview(b"")
                return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except FileNotFoundError as exc:
            raise ObjectNotFound(f"the object {ref.key} is not in the cache of this node") from exc

    def _keep(self, sha256: str, value: bytes | str) -> None:
        self._kept[sha256] = value
        self._kept_bytes += len(value)
        while self._kept_bytes > _KEEP_BYTES:
            self._kept_bytes -= len(self._kept.popitem(last=False)[1])


class Spool:
    """Where a child writes results too large for a frame; the daemon uploads them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._count = 0

    def write(self, encoded: Encoded) -> tuple[str, int, str]:
        """Write a payload to a file of its own; returns path, size in bytes and sha256."""
        self._count += 1
        path = self._directory / f"{os.getpid()}-{self._count}"
        digest = hashlib.sha256()
        with path.open("wb", buffering=0) as file:
            for segment in encoded.segments:
                digest.update(segment)
                _write_all(file.fileno(), segment)
        return str(path), encoded.nbytes, digest.hexdigest()


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    view = memoryview(data).cast("B") if isinstance(data, memoryview) else memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
