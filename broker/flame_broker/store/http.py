"""The object store on any HTTP server that takes PUT, GET, HEAD and DELETE.

Conditional writes are sent as ``If-None-Match`` and ``If-Match``; a server that ignores these
headers ignores the condition, too. Such a server cannot list.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import IO, cast
from urllib.parse import quote

import urllib3
from urllib3.exceptions import HTTPError

from flame_broker.errors import ConfigError, ObjectNotFound, PreconditionFailed, StoreError
from flame_broker.store.base import (
    Data,
    ObjectStat,
    SegmentReader,
    check_key,
    mapped,
    segments_of,
)
from flame_broker.store.hashing import sha256_of
from flame_broker.store.per_process import PerProcess
from flame_broker.store.ranges import RangeReply, Reading
from flame_broker.store.retries import DEFAULT_RETRY_S, Retries, Transient
from flame_broker.store.urls import StoreUrl

__all__ = ["HttpStore"]

_CONNECT_TIMEOUT_S = 5.0
_READ_TIMEOUT_S = 30.0
_CHUNK_BYTES = 1024 * 1024
_POOL_CONNECTIONS = 32
_DRAIN_BYTES = 64 * 1024
_CERTIFICATE = "CERTIFICATE_VERIFY_FAILED"
"""OpenSSL's word for what no retry changes; other TLS failures are broken connections."""

_SUCCESS = range(200, 300)

_TRANSIENT = {
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.TOO_EARLY,
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.INTERNAL_SERVER_ERROR,
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
}
_REMEDIES: Mapping[int, str] = {
    HTTPStatus.UNAUTHORIZED: ": put user:password@ into the store URL",
    HTTPStatus.FORBIDDEN: ": check the user's permissions, or the token in the store URL",
    HTTPStatus.METHOD_NOT_ALLOWED: ": a store must take GET, HEAD, PUT and DELETE",
    HTTPStatus.NOT_IMPLEMENTED: ": a store must take GET, HEAD, PUT and DELETE",
    HTTPStatus.INSUFFICIENT_STORAGE: ": the server is full",
}
"""What to do about an answer that no retry changes."""


class _EmptyRange(StoreError):
    """The range starts behind the end of the object."""


class HttpStore:
    """Objects below a URL.

    Args:
        url: ``http(s)://[user:password@]host/prefix[?query]``; the query (often a token) goes
            along with every request.
        retry_s: How long a failing request is tried again, in seconds.
    """

    def __init__(self, url: StoreUrl, *, retry_s: float = DEFAULT_RETRY_S) -> None:
        self._url = url
        self._base = f"{url.scheme}://{url.host}{quote(url.path.rstrip('/'))}/"
        self._query = f"?{url.query}" if url.query else ""
        self._retries = Retries(retry_s)
        self._headers = {"Accept-Encoding": "identity"}
        if url.username is not None:
            userinfo = f"{url.username}:{url.password or ''}"
            self._headers |= urllib3.make_headers(basic_auth=userinfo)
        self._pool = PerProcess(_make_pool)

    @classmethod
    def from_url(cls, url: StoreUrl) -> HttpStore:
        """The store of ``http(s)://host/prefix``.

        Raises:
            ConfigError: The URL has no host.
        """
        if not url.host:
            raise ConfigError(f"the store URL {url.masked}: expected {url.scheme}://host/prefix")
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
        size = sum(len(segment) for segment in segments)
        headers = {"Content-Length": str(size), "Content-Type": "application/octet-stream"}
        if if_absent:
            headers["If-None-Match"] = "*"
        if if_match is not None:
            headers["If-Match"] = if_match

        def attempt() -> str:
            body = SegmentReader(segments, 0, size)
            with self._request("PUT", key, headers, body) as reply:
                return str(reply.headers.get("ETag", ""))

        etag = self._retries.run(attempt)
        return ObjectStat(key, size, etag, sha256 or sha256_of(segments))

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
        """Read an object into a file; see ``Store.get_file``."""
        return self._reading(key, sha256, size).into_file(path)

    def stat(self, key: str) -> ObjectStat | None:
        """What is known of an object; see ``Store.stat``."""

        def attempt() -> ObjectStat:
            with self._request("HEAD", key) as reply:
                return _stat(key, reply)

        try:
            return self._retries.run(attempt)
        except ObjectNotFound:
            return None

    def delete(self, key: str) -> None:
        """Remove an object; see ``Store.delete``."""

        def attempt() -> None:
            with self._request("DELETE", key):
                pass

        with suppress(ObjectNotFound):
            self._retries.run(attempt)

    def list(self, prefix: str = "") -> Iterator[ObjectStat]:
        """Not something that HTTP can do.

        Raises:
            StoreError: Always.
        """
        raise StoreError(
            f"{self.describe()} cannot list {prefix!r}: HTTP has no listing;"
            " use an s3:// or file:// store where objects are listed or swept"
        )

    def describe(self) -> str:
        """The URL without password and query."""
        return self._url.masked

    def close(self) -> None:
        """Close the pooled connections; what is being retried fails."""
        self._retries.stop()
        pool = self._pool.take()
        if pool is not None:
            pool.clear()

    def _reading(self, key: str, sha256: str | None, size: int | None) -> Reading:
        return Reading(
            partial(self._range, check_key(key)),
            self._retries,
            self._name(key),
            sha256=sha256,
            size=size,
        )

    @contextmanager
    def _range(
        self, key: str, start: int, end: int | None, etag: str | None
    ) -> Iterator[RangeReply]:
        headers = {"If-Match": etag} if etag else {}
        if start or end is not None:
            headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        try:
            with self._request("GET", key, headers) as reply:
                ranged = reply.status == HTTPStatus.PARTIAL_CONTENT
                chunks = self._chunks(key, reply)
                yield RangeReply(_stat(key, reply), start if ranged else 0, ranged, chunks)
        except _EmptyRange:
            # The first range of an empty object; any other was made from a known length.
            yield RangeReply(ObjectStat(key, 0, ""), 0, True, iter(()))

    def _chunks(self, key: str, reply: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
        with self._translating(key):
            yield from reply.stream(_CHUNK_BYTES)

    @contextmanager
    def _request(
        self,
        method: str,
        key: str,
        headers: Mapping[str, str] | None = None,
        body: SegmentReader | None = None,
    ) -> Iterator[urllib3.BaseHTTPResponse]:
        """Send one request, without retries; the reply's body is read by the caller, or dropped."""
        with self._translating(key):
            reply = self._pool.get().request(
                method,
                self._base + quote(check_key(key)) + self._query,
                headers={**self._headers, **(headers or {})},
                body=cast("IO[bytes] | None", body),
                redirect=method in ("GET", "HEAD"),
                preload_content=False,
            )
        try:
            self._check_status(method, key, reply.status)
            yield reply
        finally:
            _give_back(reply)

    def _check_status(self, method: str, key: str, status: int) -> None:
        """Raise what an answer means, unless it means success."""
        name = self._name(key)
        if status in _SUCCESS:
            return
        if status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
            raise ObjectNotFound(f"there is no {name}")
        if status == HTTPStatus.PRECONDITION_FAILED:
            raise PreconditionFailed(f"{name} exists already, or was changed by someone else")
        if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise _EmptyRange(f"{name}: the server has no such range")
        detail = f"{name}: the server answered {status} to {method}"
        if status in _TRANSIENT:
            raise Transient(detail)
        raise StoreError(detail + _REMEDIES.get(status, ""))

    @contextmanager
    def _translating(self, key: str) -> Iterator[None]:
        try:
            yield
        except HTTPError as exc:
            name = self._name(key)
            reason = getattr(exc, "reason", None) or exc
            if _CERTIFICATE in str(reason):
                raise StoreError(f"{name}: the certificate was refused: {reason}") from exc
            raise Transient(
                f"{name}: no answer ({reason}); is the server up, and the store URL right?"
            ) from exc

    def _name(self, key: str) -> str:
        return f"object {key} in {self.describe()}"


def _make_pool() -> urllib3.PoolManager:
    return urllib3.PoolManager(
        maxsize=_POOL_CONNECTIONS,
        timeout=urllib3.Timeout(connect=_CONNECT_TIMEOUT_S, read=_READ_TIMEOUT_S),
        # `Retries` does it, with a bound in time rather than in number.
        retries=urllib3.Retry(
            None, connect=0, read=0, status=0, other=0, redirect=3, respect_retry_after_header=False
        ),
    )


def _stat(key: str, reply: urllib3.BaseHTTPResponse) -> ObjectStat:
    headers = reply.headers
    length = headers.get("Content-Range", "").rpartition("/")[2] or headers.get("Content-Length")
    if length is None or not length.isdecimal():
        raise StoreError(f"the server tells no length of {key}: it cannot be checked")
    # Only a strong etag names the bytes (RFC 9110, 8.8.3).
    etag = headers.get("ETag", "")
    modified_s = None
    with suppress(KeyError, ValueError):
        modified_s = parsedate_to_datetime(headers["Last-Modified"]).timestamp()
    return ObjectStat(key, int(length), "" if etag[:2] == "W/" else etag, None, modified_s)


def _give_back(reply: urllib3.BaseHTTPResponse) -> None:
    """Return the connection to the pool; with much left unread it is cheaper to close it."""
    if (reply.length_remaining or 0) > _DRAIN_BYTES:
        reply.close()
    else:
        reply.drain_conn()
    reply.release_conn()
