"""Broker, store and database URLs: what they may look like, and how to print them.

Every check raises ``ValueError`` that says what was expected; who knows where the URL came from
(an argument, a variable, a line of a file) makes it a ``ConfigError``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final
from urllib.parse import urlsplit

__all__ = [
    "BROKER_SCHEMES",
    "DATABASE_SCHEMES",
    "STORE_SCHEMES",
    "broker_hosts",
    "check_broker_url",
    "check_database_url",
    "check_store_url",
    "is_local_broker",
    "mask_url",
]

BROKER_SCHEMES: Final = ("amqp", "amqps", "memory", "redis", "rediss", "sqs", "worker")
STORE_SCHEMES: Final = ("s3", "file", "http", "https")
DATABASE_SCHEMES: Final = ("sqlite", "postgresql", "postgresql+psycopg", "postgres")

_NAMED: Final = ("amqp", "amqps")  # their hosts must be named
_HERE: Final = ("memory", "worker")  # in this process, or the worker that runs it
_MAX_PORT: Final = 65535
_LOOPBACK = re.compile(r"(?:.*\.)?localhost|127(?:\.[0-9]{1,3}){3}|::1", re.ASCII)
_HOST = re.compile(r"(?:\[(?P<v6>[0-9a-fA-F:.]+)\]|(?P<name>[^\[\]:]*))(?::(?P<port>[0-9]+))?")
# Greedy up to the last @ of a host, so that a password with an unescaped / or @ is hidden too.
_PASSWORD = re.compile(r"(?<=[/;])([^/;:@\s]*):[^;\s]*@")
_SECRET_PARAMETER = re.compile(
    r"([?&][^=&\s]*(?:pass|secret|token|key|signature|credential)[^=&\s]*=)[^&\s]+", re.IGNORECASE
)


def mask_url(url: str) -> str:
    """The URL with ``***`` for passwords and for query parameters that look like secrets."""
    return _SECRET_PARAMETER.sub(r"\1***", _PASSWORD.sub(r"\1:***@", url))


def check_broker_url(url: str) -> str:
    """The URL itself, if it can name a broker.

    Raises:
        ValueError: The scheme is none of ours, or a host or port makes no sense.
    """
    if _scheme(url, BROKER_SCHEMES, "amqp://user:password@host:5672/") not in _HERE:
        broker_hosts(url)
    return url


def check_store_url(url: str) -> str:
    """The URL itself, if it can name an object store.

    Raises:
        ValueError: The scheme is none of ours, or the bucket, host or path is missing.
    """
    scheme = _scheme(url, STORE_SCHEMES, "s3://bucket/prefix or file:///path")
    parts = urlsplit(url)
    if scheme == "file":
        if parts.netloc or not parts.path.startswith("/"):
            raise ValueError(f"expected file:///absolute/path, found {mask_url(url)!r}")
    elif not parts.netloc:
        wanted = "s3://bucket/prefix" if scheme == "s3" else f"{scheme}://host/path"
        raise ValueError(f"expected {wanted}, found {mask_url(url)!r}")
    return url


def check_database_url(url: str) -> str:
    """The URL itself, if it can name the orchestrator's database.

    Raises:
        ValueError: The scheme is none of ours.
    """
    _scheme(url, DATABASE_SCHEMES, "sqlite:////path/file.db or postgresql://user@host/name")
    return url


def broker_hosts(url: str) -> list[tuple[str, int | None]]:
    """The hosts of a URL, several of them separated by ``;``, with their ports if given.

    An empty host is ``localhost`` for Redis, and ``""`` for SQS: the cloud's own endpoint.

    Raises:
        ValueError: A host or port makes no sense.
    """
    scheme, _, rest = url.partition("://")
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    hosts = []
    for place in authority.split(";"):
        match = _HOST.fullmatch(place.rpartition("@")[2])
        if match is None or int(match["port"] or 0) > _MAX_PORT:
            raise ValueError(
                f"expected {scheme}://host:port, several hosts with ';' between them and special "
                f"characters in a password percent-encoded; found {mask_url(url)!r}"
            )
        if scheme in _NAMED and not (match["v6"] or match["name"]):
            raise ValueError(f"expected {scheme}://host/, found no host in {mask_url(url)!r}")
        host = match["v6"] or match["name"] or ("" if scheme == "sqs" else "localhost")
        hosts.append((host, int(match["port"]) if match["port"] else None))
    return hosts


def is_local_broker(url: str) -> bool:
    """Whether the broker is reached on this machine: in this process, or all hosts are loopback."""
    if url.partition("://")[0] in _HERE:
        return True
    return all(_LOOPBACK.fullmatch(host.lower()) for host, _ in broker_hosts(url))


def _scheme(url: str, allowed: Sequence[str], example: str) -> str:
    scheme, separator, _ = url.partition("://")
    if not separator or scheme not in allowed:
        raise ValueError(
            f"expected a URL such as {example} (schemes: {', '.join(allowed)}), "
            f"found {mask_url(url)!r}"
        )
    return scheme
