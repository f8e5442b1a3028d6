"""Reading objects over HTTP: in parallel ranges, resumed where a connection broke, checked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

from flame_broker.errors import StoreError
from flame_broker.store.base import ObjectStat
from flame_broker.store.hashing import check_content, check_size, update_from_file
from flame_broker.store.parallel import Parallel
from flame_broker.store.partial import PartialFile, write_all
from flame_broker.store.retries import Retries, Transient

__all__ = ["RANGE_BYTES", "OpenRange", "RangeReply", "Reading"]

RANGE_BYTES = 32 * 1024 * 1024
"""How much one request asks for. One connection to S3 gives some 90 MB/s, so a range takes a third
of a second; smaller ones cost more requests, larger ones leave nothing to do in parallel."""


@dataclass(frozen=True, slots=True)
class RangeReply:
    """The answer to a request for a range.

    Attributes:
        stat: The whole object.
        start: Where ``chunks`` begin: at the range asked for, or at 0 if the server knows none.
        partial: Whether the server answers with ranges.
        chunks: The bytes. Iterating raises ``Transient`` when the connection breaks.
    """

    stat: ObjectStat
    start: int
    partial: bool
    chunks: Iterator[bytes]


@dataclass(slots=True)
class _Span:
    """A range, and how far it has been written."""

    start: int
    end: int
    position: int = field(init=False)

    def __post_init__(self) -> None:
        self.position = self.start


OpenRange = Callable[[int, int | None, str | None], AbstractContextManager[RangeReply]]
"""Ask for the bytes from a start to an end (None: to the last) of the object with this etag."""


class Reading:
    """One object being read.

    Args:
        open_range: Sends one request.
        retries: How long a failing one is tried again.
        what: The object, for messages.
        sha256: What it must have; else what the store recorded when it was put.
        size: How long it must be, in bytes.
    """

    def __init__(
        self,
        open_range: OpenRange,
        retries: Retries,
        what: str,
        *,
        sha256: str | None,
        size: int | None,
    ) -> None:
        self._open_range = open_range
        self._retries = retries
        self._what = what
        self._sha256 = sha256
        self._size = size

    def into_memory(self) -> bytes:
        """The object as one value, over one connection."""
        content, stat = self._retries.run(self._read_all)
        self._check(hashlib.sha256(content).hexdigest(), len(content), stat)
        return content

    def into_file(self, path: Path) -> ObjectStat:
        """The object as a file; it gets its name when it is complete and checked."""
        try:
            with PartialFile(path.parent, path.name) as part:
                stat, sha256 = self._download(part.fd)
                self._check(sha256, stat.size_bytes, stat)
                part.path.replace(path)
        except OSError as exc:
            raise StoreError(f"cannot write {path}: {exc.strerror}") from exc
        return stat

    def _read_all(self) -> tuple[bytes, ObjectStat]:
        with self._open_range(0, None, None) as reply:
            content = b"".join(reply.chunks)
        if len(content) < reply.stat.size_bytes:
            raise Transient(f"{self._what}: the connection ended after {len(content)} bytes")
        return content, reply.stat

    def _download(self, fd: int) -> tuple[ObjectStat, str]:
        """Fetch all ranges, and hash each while later ones are still under way."""
        with Parallel[_Span]() as rest:
            first = _Span(0, RANGE_BYTES)
            stat = self._retries.run(lambda: self._begin(first, fd, rest))
            self._fetch(first, fd, stat.etag, rest)
            digest = hashlib.sha256()
            for span in chain([first], rest.results()):
                update_from_file(digest, fd, span.start, span.end)
        return stat, digest.hexdigest()

    def _begin(self, first: _Span, fd: int, rest: Parallel[_Span]) -> ObjectStat:
        """Ask for the first range; its reply tells of the others, so these start beside it."""
        with self._open_range(0, RANGE_BYTES, None) as reply:
            stat = reply.stat
            # Before anything is downloaded.
            check_size(self._what, stat.size_bytes, sha256=self._sha256, size=self._size)
            first.end = min(RANGE_BYTES, stat.size_bytes) if reply.partial else stat.size_bytes
            for start in range(first.end, stat.size_bytes, RANGE_BYTES):
                span = _Span(start, min(start + RANGE_BYTES, stat.size_bytes))
                rest.start(partial(self._fetch, span, fd, stat.etag, rest))
            # If it breaks off, the caller goes on from where it broke.
            with suppress(Transient):
                self._write(first, fd, reply, rest)
        return stat

    def _fetch(self, span: _Span, fd: int, etag: str, rest: Parallel[_Span]) -> _Span:
        """What is missing of a range."""

        def attempt() -> None:
            rest.check()
            with self._open_range(span.position, span.end, etag or None) as reply:
                self._write(span, fd, reply, rest)

        if span.position < span.end:
            self._retries.run(attempt)
        return span

    def _write(self, span: _Span, fd: int, reply: RangeReply, rest: Parallel[_Span]) -> None:
        span.position = reply.start
        for chunk in reply.chunks:
            rest.check()
            span.position = write_all(fd, chunk, span.position)
        if span.position < span.end:
            raise Transient(f"{self._what}: the connection ended at byte {span.position}")

    def _check(self, sha256: str, size: int, stat: ObjectStat) -> None:
        expected = self._sha256 or stat.sha256
        check_content(self._what, (sha256, size), sha256=expected, size=self._size)
