"""Where a Redis or SQS broker is: ``redis://user:password@host1;host2:6380/0?visibility_s=60``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, urlsplit

from flame_broker.errors import ConfigError
from flame_broker.urls import mask_url

__all__ = ["PortableAddress"]


@dataclass(frozen=True, slots=True)
class PortableAddress:
    """A broker URL taken apart.

    Args:
        scheme: ``redis``, ``rediss`` or ``sqs``.
        urls: One URL for each host, login and path included, without the options.
        options: The query.
        masked: The URL as it may be shown.
    """

    scheme: str
    urls: tuple[str, ...] = field(repr=False)
    options: Mapping[str, str] = field(repr=False)
    masked: str

    @classmethod
    def parse(cls, url: str, known_options: Sequence[str]) -> PortableAddress:
        """Take a URL apart.

        Raises:
            ConfigError: It has an option that is not known.
        """
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
        for name in options:
            if name not in known_options:
                known = ", ".join(known_options)
                raise ConfigError(f"broker URL: unknown option {name!r}; known are {known}")
        login, at, hosts = parts.netloc.rpartition("@")
        urls = [f"{parts.scheme}://{login}{at}{host}{parts.path}" for host in hosts.split(";")]
        return cls(parts.scheme, tuple(urls), options, mask_url(url))

    def seconds(self, name: str, default: float, *, minimum: float) -> float:
        """Read an option that is a number of seconds.

        Raises:
            ConfigError: It is no number, or below the minimum.
        """
        text = self.options.get(name)
        try:
            value = default if text is None else float(text)
        except ValueError:
            value = -1.0
        if not value >= minimum:
            raise ConfigError(f"broker URL: {name} is seconds from {minimum:g}, found {text!r}")
        return value
