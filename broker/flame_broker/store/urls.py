"""Store URLs taken apart, their options checked, their secrets kept out of sight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from flame_broker.errors import ConfigError

__all__ = ["StoreUrl"]

_OPEN_SCHEMES = {"s3", "file"}
"""Here the query holds our own options. Elsewhere it belongs to the server and may be a token."""


@dataclass(frozen=True, slots=True)
class StoreUrl:
    """A store URL in parts.

    Attributes:
        scheme: ``s3``, ``file``, ``http``…, lower case.
        host: The bucket, or the host with its port.
        path: Percent-decoded, with its leading slash.
        username: Before the host, percent-decoded.
        password: Before the host, percent-decoded; never shown.
        query: As written.
        masked: The URL as messages may show it.
    """

    scheme: str
    host: str
    path: str
    username: str | None
    password: str | None = field(repr=False)
    query: str = field(repr=False)
    masked: str

    @classmethod
    def parse(cls, url: str) -> StoreUrl:
        """Take a URL apart.

        Raises:
            ConfigError: It is not a URL.
        """
        try:
            parts = urlsplit(url)
            # Reading the port is what makes urllib check it.
            _ = parts.port
        except ValueError as exc:
            raise ConfigError(f"the store URL cannot be read: {exc}") from None
        return cls(
            scheme=parts.scheme,
            host=parts.netloc.rpartition("@")[2],
            path=unquote(parts.path),
            username=unquote(parts.username) if parts.username else None,
            password=unquote(parts.password) if parts.password else None,
            query=parts.query,
            masked=_masked(parts),
        )

    def options(self, defaults: Mapping[str, str | float | bool]) -> dict[str, str | float | bool]:
        """The query as options, each of the type of its default.

        Raises:
            ConfigError: An option is unknown, or its value is not of that type.
        """
        values = dict(defaults)
        for name, text in parse_qsl(self.query, keep_blank_values=True):
            if name not in defaults:
                known = ", ".join(sorted(defaults))
                raise ConfigError(
                    f"the store URL {self.masked} has an option {name!r}; known are: {known}"
                )
            values[name] = self._converted(name, text, defaults[name])
        return values

    def _converted(self, name: str, text: str, default: str | float | bool) -> str | float | bool:
        if isinstance(default, str):
            return text
        if isinstance(default, bool):
            if text in ("true", "false"):
                return text == "true"
            raise ConfigError(f"{name}={text!r} in {self.masked}: expected true or false")
        try:
            number = float(text)
        except ValueError:
            number = 0.0
        # `not >` rather than `<=`: it refuses NaN as well.
        if not 0 < number < float("inf"):
            raise ConfigError(f"{name}={text!r} in {self.masked}: expected seconds above 0")
        return number


def _masked(parts: SplitResult) -> str:
    host = parts.netloc.rpartition("@")[2]
    # A name that stands alone may be a token.
    name = f"{parts.username}:" if parts.username and parts.password else ""
    userinfo = f"{name}***@" if "@" in parts.netloc else ""
    query = f"?{parts.query if parts.scheme in _OPEN_SCHEMES else '***'}" if parts.query else ""
    return f"{parts.scheme}://{userinfo}{host}{parts.path}{query}"
