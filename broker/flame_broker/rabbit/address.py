"""Where the brokers are: ``amqp://user:password@host1:5672;host2/vhost?heartbeat=10``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qsl, unquote

from flame_broker.errors import ConfigError

__all__ = ["RabbitAddress"]

_PORTS: Final = {"amqp": 5672, "amqps": 5671}
_OPTIONS: Final = ("ca", "cert", "heartbeat", "key", "server_name")
_HOST: Final = re.compile(r"^(?:\[(?P<v6>[^\]]+)\]|(?P<name>[^:\[\]]+))(?::(?P<port>\d{1,5}))?$")
_HEARTBEAT_S: Final = 5


@dataclass(frozen=True, slots=True)
class RabbitAddress:
    """One or more hosts of one RabbitMQ cluster, with what is needed to log in.

    Args:
        hosts: ``(host, port)`` pairs, tried in this order.
        user: Login name.
        password: Its password; never shown.
        vhost: Virtual host.
        tls: Whether to speak TLS.
        heartbeat_s: A peer that is silent for this long, plus 5 s, is taken for dead.
        ca: File of the certificate authority; without one, the system's.
        cert: File of a client certificate, with ``key`` the file of its private key.
        server_name: The name expected in the server's certificate, if it is not the host.
    """

    hosts: tuple[tuple[str, int], ...]
    user: str = "guest"
    password: str = field(default="guest", repr=False)
    vhost: str = "/"
    tls: bool = False
    heartbeat_s: int = _HEARTBEAT_S
    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    server_name: str | None = None

    @classmethod
    def parse(cls, url: str) -> RabbitAddress:
        """Read a broker URL.

        Query options: ``heartbeat`` (seconds), ``ca``, ``cert``, ``key`` (files), ``server_name``.

        Raises:
            ConfigError: A part is missing or unknown; the password is not repeated.
        """
        # Not urlsplit, which refuses an IPv6 address beside other hosts in newer Pythons.
        scheme, divider, rest = url.partition("://")
        if scheme not in _PORTS or not divider:
            found = repr(scheme) if divider else "no '://'"
            raise ConfigError(f"broker URL: expected amqp:// or amqps://, found {found}")
        rest, _, query = rest.partition("?")
        netloc, _, vhost = rest.partition("/")
        login, _, hosts = netloc.rpartition("@")
        user, _, password = login.partition(":")
        options = _options(query)
        return cls(
            hosts=tuple(_host(text, _PORTS[scheme]) for text in hosts.split(";")),
            user=unquote(user) if login else "guest",
            password=unquote(password) if login else "guest",
            vhost=unquote(vhost) or "/",
            tls=scheme == "amqps",
            heartbeat_s=_heartbeat_s(options.get("heartbeat")),
            ca=options.get("ca"),
            cert=options.get("cert"),
            key=options.get("key"),
            server_name=options.get("server_name"),
        )

    @property
    def places(self) -> str:
        """Hosts with ports."""
        return ", ".join(f"{host}:{port}" for host, port in self.hosts)

    @property
    def login(self) -> str:
        """Where in the broker, and as whom."""
        return f"vhost {self.vhost!r}, user {self.user!r}"

    def __str__(self) -> str:
        return f"RabbitMQ at {self.places} ({self.login})"


def _host(text: str, default_port: int) -> tuple[str, int]:
    match = _HOST.match(text.strip())
    if match is None:
        raise ConfigError(f"broker URL: expected host or host:port, found {text!r}")
    return match["v6"] or match["name"], int(match["port"] or default_port)


def _options(query: str) -> Mapping[str, str]:
    options = dict(parse_qsl(query, keep_blank_values=True))
    for name in options:
        if name not in _OPTIONS:
            known = ", ".join(_OPTIONS)
            raise ConfigError(f"broker URL: unknown option {name!r}; known are {known}")
    return options


def _heartbeat_s(text: str | None) -> int:
    if text is None:
        return _HEARTBEAT_S
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"broker URL: heartbeat is whole seconds from 1, found {text!r}")
    return int(text)
