"""The object store on S3, or on anything that speaks its protocol (MinIO, Ceph…).

Large objects go up as parallel parts and come down as parallel ranges. Every object carries its
sha256 as metadata, so that readers can check it without a reference; botocore's own checksums
(and, over plain HTTP, its signature of the body) are off, as they would hash everything again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from flame_broker.errors import ObjectNotFound
from flame_broker.store.base import Data, ObjectStat, check_key, mapped, segments_of
from flame_broker.store.hashing import sha256_of
from flame_broker.store.ranges import RangeReply, Reading
from flame_broker.store.s3_connection import InvalidRange, S3Connection
from flame_broker.store.s3_upload import SHA256_FIELD, S3Upload
from flame_broker.store.urls import StoreUrl

__all__ = ["S3Store"]

_CHUNK_BYTES = 1024 * 1024
_PAGE_OBJECTS = 1000


class S3Store:
    """Objects in a bucket, below a prefix. Credentials come from the URL or as boto3 finds them.

    Args:
        url: ``s3://[access key:secret@]bucket/prefix``, with the options ``endpoint``, ``region``,
            ``profile``, ``addressing`` (``path`` or ``virtual``), ``connect_timeout_s``,
            ``read_timeout_s`` and ``retry_s``.

    Raises:
        ConfigError: There is no bucket, or an option is unknown or makes no sense.
    """

    def __init__(self, url: StoreUrl) -> None:
        self._connection = S3Connection(url)

    @classmethod
    def from_url(cls, url: StoreUrl) -> S3Store:
        """The store of ``s3://bucket/prefix?…``."""
        return cls(url)

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
        segments = segments_of(data)
        # S3 takes metadata before the content, so the hash cannot be made on the way.
        sha256 = sha256 or sha256_of(segments)
        upload = S3Upload(
            self._connection,
            check_key(key),
            segments,
            sha256,
            if_absent=if_absent,
            if_match=if_match,
        )
        etag = upload.run()
        return ObjectStat(key, sum(len(segment) for segment in segments), etag, sha256)

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
        """Write a file's content; see ``Store.put_file``."""
        with mapped(path) as content:
            return self.put(key, content, sha256=sha256, if_absent=if_absent, if_match=if_match)

    def get(self, key: str, *, sha256: str | None = None) -> bytes:
        """Read an object into memory; see ``Store.get``."""
        return self._reading(key, sha256, None).into_memory()

    def get_file(
        self,
        key: str,
        path: Path,
        *,
        sha256: str | None = None,
        size: int | None = None,
        frozen: bool = False,
    ) -> ObjectStat:
        """Read an object into a file, in parallel ranges; see ``Store.get_file``."""
        return self._reading(key, sha256, size).into_file(path)

    def stat(self, key: str) -> ObjectStat | None:
        """What is known of an object; see ``Store.stat``."""
        try:
            reply = self._connection.call("head_object", check_key(key))
        except ObjectNotFound:
            return None
        return _stat(key, reply, int(reply["ContentLength"]))

    def delete(self, key: str) -> None:
        """Remove an object; see ``Store.delete``."""
        self._connection.call("delete_object", check_key(key))

    def list(self, prefix: str = "") -> Iterator[ObjectStat]:
        """The objects whose keys start so; see ``Store.list``."""
        token: dict[str, str] = {}
        while True:
            page = self._connection.page(prefix, MaxKeys=_PAGE_OBJECTS, **token)
            for entry in page.get("Contents", ()):
                key = str(entry["Key"]).removeprefix(self._connection.prefix)
                modified_s = entry["LastModified"].timestamp()
                yield ObjectStat(key, entry["Size"], entry["ETag"], None, modified_s)
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def describe(self) -> str:
        """The URL with its secret masked."""
        return self._connection.url.masked

    def close(self) -> None:
        """Close the pooled connections; what is being retried fails."""
        self._connection.close()

    def _reading(self, key: str, sha256: str | None, size: int | None) -> Reading:
        open_range = partial(self._range, check_key(key))
        what = self._connection.describe(key)
        return Reading(open_range, self._connection.retries, what, sha256=sha256, size=size)

    @contextmanager
    def _range(
        self, key: str, start: int, end: int | None, etag: str | None
    ) -> Iterator[RangeReply]:
        parameters: dict[str, object] = {"IfMatch": etag} if etag else {}
        if start or end is not None:
            parameters["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        try:
            reply = self._connection.once("get_object", key, **parameters)
        except InvalidRange:
            # The first range of an empty object; any other was made from a known length.
            yield RangeReply(ObjectStat(key, 0, ""), 0, True, iter(()))
            return
        body = reply["Body"]
        try:
            yield self._reply(key, reply, start)
        finally:
            body.close()

    def _reply(self, key: str, reply: Mapping[str, Any], start: int) -> RangeReply:
        content_range = reply.get("ContentRange")
        total = int(content_range.rpartition("/")[2] if content_range else reply["ContentLength"])
        chunks = self._chunks(key, reply["Body"])
        begin = start if content_range else 0
        return RangeReply(_stat(key, reply, total), begin, bool(content_range), chunks)

    def _chunks(self, key: str, body: Any) -> Iterator[bytes]:
        with self._connection.translating(key):
            yield from body.iter_chunks(_CHUNK_BYTES)


def _stat(key: str, reply: Mapping[str, Any], size_bytes: int) -> ObjectStat:
    sha256 = reply.get("Metadata", {}).get(SHA256_FIELD)
    return ObjectStat(key, size_bytes, reply["ETag"], sha256, reply["LastModified"].timestamp())
