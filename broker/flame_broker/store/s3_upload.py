"""Writing one object to S3: at once, or as parallel parts."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

from flame_broker.errors import ObjectNotFound, PreconditionFailed, StoreError
from flame_broker.store.base import SegmentReader
from flame_broker.store.parallel import Parallel
from flame_broker.store.s3_connection import S3Connection, UploadGone

__all__ = ["PART_BYTES", "SHA256_FIELD", "S3Upload"]

PART_BYTES = 16 * 1024 * 1024
"""Objects over this size go up in parts of it (a sixth of a second each at S3's usual rate)."""

SHA256_FIELD = "flame-sha256"
_WRITE_FIELD = "flame-write"

_MAX_PARTS = 10_000
"""The limit of S3 (its user guide, "Amazon S3 multipart upload limits")."""


class S3Upload:
    """One object on its way up.

    Args:
        connection: The bucket.
        key: Where to.
        segments: The content.
        sha256: Of the content.
        if_absent: Only if there is no such object.
        if_match: Only if the object there has this etag.
    """

    def __init__(
        self,
        connection: S3Connection,
        key: str,
        segments: Sequence[memoryview],
        sha256: str,
        *,
        if_absent: bool,
        if_match: str | None,
    ) -> None:
        self._connection = connection
        self._key = key
        self._segments = segments
        self._size = sum(len(segment) for segment in segments)
        self._write_id = uuid.uuid4().hex
        self._metadata = {SHA256_FIELD: sha256, _WRITE_FIELD: self._write_id}
        self._conditions = {"IfNoneMatch": "*"} if if_absent else {}
        if if_match is not None:
            self._conditions["IfMatch"] = if_match

    def run(self) -> str:
        """Send everything.

        Returns:
            The etag.

        Raises:
            PreconditionFailed: A condition does not hold.
        """
        try:
            return self._at_once() if self._size <= PART_BYTES else self._in_parts()
        except (PreconditionFailed, UploadGone):
            etag = self._etag_if_ours()
            if etag is None:
                raise
            return etag
        except ObjectNotFound as exc:
            # S3 answers so to an If-Match without an object.
            raise PreconditionFailed(f"{self._connection.describe(self._key)} is gone") from exc

    def _at_once(self) -> str:
        def attempt() -> str:
            reply = self._connection.once(
                "put_object",
                self._key,
                Body=SegmentReader(self._segments, 0, self._size),
                Metadata=self._metadata,
                **self._conditions,
            )
            return str(reply["ETag"])

        return self._connection.retries.run(attempt)

    def _in_parts(self) -> str:
        self._check_conditions_early()
        with self._multipart() as upload_id:
            step = max(PART_BYTES, -(-self._size // _MAX_PARTS))
            with Parallel[str]() as sending:
                for number, start in enumerate(range(0, self._size, step), 1):
                    sending.start(partial(self._part, upload_id, number, start, step, sending))
                etags = list(sending.results())
            parts = [{"PartNumber": n, "ETag": etag} for n, etag in enumerate(etags, 1)]
            reply = self._connection.call(
                "complete_multipart_upload",
                self._key,
                UploadId=upload_id,
                MultipartUpload={"Parts": parts},
                **self._conditions,
            )
        return str(reply["ETag"])

    def _part(
        self, upload_id: str, number: int, start: int, step: int, sending: Parallel[str]
    ) -> str:
        def attempt() -> str:
            sending.check()
            reply = self._connection.once(
                "upload_part",
                self._key,
                UploadId=upload_id,
                PartNumber=number,
                Body=SegmentReader(self._segments, start, min(start + step, self._size)),
            )
            return str(reply["ETag"])

        return self._connection.retries.run(attempt)

    @contextmanager
    def _multipart(self) -> Iterator[str]:
        """A multipart upload, aborted if it is not completed: its parts would cost money."""
        reply = self._connection.call("create_multipart_upload", self._key, Metadata=self._metadata)
        upload_id, completed = str(reply["UploadId"]), False
        try:
            yield upload_id
            completed = True
        finally:
            if not completed:
                with suppress(StoreError):
                    self._connection.once("abort_multipart_upload", self._key, UploadId=upload_id)

    def _check_conditions_early(self) -> None:
        """Fail before the content is sent; S3 itself compares when the upload completes."""
        if not self._conditions:
            return
        etag = self._head()[0]
        wanted = self._conditions.get("IfMatch")
        if etag != wanted:
            found = "is gone" if etag is None else "exists already, or was changed"
            raise PreconditionFailed(f"{self._connection.describe(self._key)} {found}")

    def _etag_if_ours(self) -> str | None:
        """Whether an earlier try of this very write went through and only its answer was lost."""
        etag, write_id = self._head()
        return etag if write_id == self._write_id else None

    def _head(self) -> tuple[str | None, str | None]:
        """The etag of the object that is there, and the id of the write that made it."""
        try:
            reply = self._connection.call("head_object", self._key)
        except ObjectNotFound:
            return None, None
        return str(reply["ETag"]), reply.get("Metadata", {}).get(_WRITE_FIELD)
