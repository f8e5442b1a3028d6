"""The object store: bytes by key, behind one interface, on S3, a folder or an HTTP server.

Example:
    >>> store = open_store("file:///srv/flame")
    >>> store.put("greetings/one", b"hello").size_bytes
    5
"""

from __future__ import annotations

from flame_broker.errors import ConfigError
from flame_broker.store.base import Data, ObjectStat, Store
from flame_broker.store.urls import StoreUrl

__all__ = ["Data", "ObjectStat", "Store", "open_store"]


def open_store(url: str) -> Store:
    """Open the store that a URL names; nothing is connected before the first use.

    Args:
        url: ``s3://bucket/prefix?endpoint=…&region=…``, ``file:///folder`` or
            ``http(s)://host/prefix``. Secrets in it never show up in messages.

    Raises:
        ConfigError: The URL names no store, or has an option that this kind of store does not.
    """
    parsed = StoreUrl.parse(url)
    # Each backend is imported where it is chosen: botocore alone takes 110 ms.
    match parsed.scheme:
        case "s3":
            from flame_broker.store.s3 import S3Store

            return S3Store.from_url(parsed)
        case "file":
            from flame_broker.store.file import FileStore

            return FileStore.from_url(parsed)
        case "http" | "https":
            from flame_broker.store.http import HttpStore

            return HttpStore.from_url(parsed)
    raise ConfigError(
        f"the store URL {parsed.masked} starts with none of s3://, file://, http://, https://"
    )
