"""Settings: where the broker, the store and the key are.

Each setting is looked up by itself, in this order: argument, environment, file, embedded default.

==================== =========================================================================
``FLAME_BROKER_URL`` ``amqp://``, ``amqps://`` (several hosts with ``;``), ``memory://``,
                     ``redis://``, ``rediss://``, ``sqs://``
``FLAME_STORE_URL``  ``s3://bucket/prefix?endpoint=…``, ``file:///…``, ``http(s)://…``
``FLAME_KEY``        the key, or several with ``,``: the first signs, all verify
``FLAME_KEY_FILE``   a file of mode 600 that holds it
``FLAME_DATABASE_URL`` the orchestrator's database
``FLAME_CONFIG``     the settings file, instead of ``FLAME_HOME/flame.yaml``
``FLAME_HOME``       where Flame keeps its files, ``~/.flame`` if not set
==================== =========================================================================

With nothing configured this module imports neither pydantic nor a YAML parser: ``config_file``,
which does, is imported when there is a file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final

from flame_broker.errors import ConfigError
from flame_broker.keys import Keyring, ensure_key_file, load_key_file
from flame_broker.urls import (
    check_broker_url,
    check_database_url,
    check_store_url,
    is_local_broker,
    mask_url,
)

__all__ = [
    "CONFIG_FILE_NAME",
    "FileContext",
    "PackageSettings",
    "Settings",
    "config_path",
    "home_path",
    "load",
]

CONFIG_FILE_NAME: Final = "flame.yaml"
"""The settings file's name inside ``FLAME_HOME``."""

_ARGUMENT: Final = "argument"
_DEFAULT: Final = "default"


@dataclass(frozen=True, slots=True)
class PackageSettings:
    """How project packages are made and where they go.

    Args:
        storage: A store URL of their own; None means the object store.
        excludes: Patterns of files to leave out, besides the built-in ones.
    """

    storage: str | None = None
    excludes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FileContext:
    """What one context of a settings file says; None where it says nothing or there is no file.

    Args:
        name: The context.
        file: The settings file.
        broker_url: ``cluster.endpoint``.
        store_url: ``cache.endpoint``.
        key_file: ``cluster.key-file``, absolute.
        package: ``package``.
        template: ``runner.template``.
    """

    name: str | None = None
    file: Path | None = None
    broker_url: str | None = None
    store_url: str | None = None
    key_file: Path | None = None
    package: PackageSettings = field(default_factory=PackageSettings)
    template: str | None = None


@dataclass(frozen=True)
class Settings:
    """What this process is configured to use. Printing it shows no password and no key.

    Args:
        home: Folder for the key, the embedded store and caches.
        broker_url: The broker, or None for the embedded cluster.
        store_url: The object store, or None if a remote broker has none configured; then values
            over 64 KiB and functions by value cannot be sent.
        database_url: The orchestrator's database, or None for its default.
        context: Name of the context that was taken from the file.
        file: The settings file, if there is one.
        package: How project packages are made.
        template: The template application of ``Runner``.
        sources: Where ``broker``, ``store``, ``database`` and ``key`` were found: ``argument``, a
            variable, a file, ``default``.
        key_text: The key itself; use ``keyring``.
        key_file: The file that holds it; use ``keyring``.
    """

    home: Path
    broker_url: str | None = None
    store_url: str | None = None
    database_url: str | None = None
    context: str | None = None
    file: Path | None = None
    package: PackageSettings = field(default_factory=PackageSettings)
    template: str | None = None
    sources: Mapping[str, str] = field(default_factory=dict)
    key_text: str | None = field(default=None, repr=False)
    key_file: Path | None = None

    @property
    def local(self) -> bool:
        """Whether the broker is in this process or on this machine."""
        return self.broker_url is None or is_local_broker(self.broker_url)

    @cached_property
    def keyring(self) -> Keyring:
        """The keys. For a broker on this machine a key file is made when none is configured.

        Raises:
            ConfigError: The key is too short, its file is not private, or there is none.
        """
        if self.key_text is not None:
            try:
                return Keyring.parse(self.key_text)
            except ConfigError as error:
                raise ConfigError(f"{self.sources.get('key', 'key')}: {error}") from error
        if self.key_file is not None:
            return load_key_file(self.key_file)
        if self.local:
            return load_key_file(ensure_key_file(self.home))
        raise ConfigError(
            f"no key for the broker {mask_url(self.broker_url or '')}, which is not on this "
            "machine: set FLAME_KEY or FLAME_KEY_FILE to the key that its workers have "
            "(`flame config key` makes a new one)"
        )

    def require_store(self) -> str:
        """The store URL, for values over 64 KiB and the code of functions by value.

        Raises:
            ConfigError: None is configured, and the broker is not on this machine.
        """
        if self.store_url is not None:
            return self.store_url
        raise ConfigError(
            f"no object store for the broker {mask_url(self.broker_url or '')}: set "
            "FLAME_STORE_URL, for example to s3://bucket/prefix; values over 64 KiB and functions "
            "by value (of programs and notebooks) need it"
        )

    def __repr__(self) -> str:
        shown = {name: value for name, value in vars(self).items() if name in _SHOWN}
        shown.update(
            (name, mask_url(value)) for name, value in shown.items() if isinstance(value, str)
        )
        return f"Settings({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


_SHOWN: Final = ("home", "broker_url", "store_url", "database_url", "context", "file", "key_file")


def home_path(environ: Mapping[str, str] | None = None) -> Path:
    """``FLAME_HOME``, or ``~/.flame``; absolute."""
    environ = os.environ if environ is None else environ
    return Path(environ.get("FLAME_HOME") or "~/.flame").expanduser().absolute()


def config_path(environ: Mapping[str, str] | None = None) -> Path:
    """The settings file that would be read: ``FLAME_CONFIG``, or the one in ``FLAME_HOME``."""
    environ = os.environ if environ is None else environ
    named = environ.get("FLAME_CONFIG")
    if named:
        return Path(named).expanduser().absolute()
    return home_path(environ) / CONFIG_FILE_NAME


def load(
    *,
    broker: str | None = None,
    store: str | None = None,
    key: str | None = None,
    context: str | None = None,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Find every setting.

    Args:
        broker: Broker URL.
        store: Object store URL.
        key: One key or several with ``,``.
        context: A context of the settings file, instead of its ``current-context``.
        environ: Variables to look in, ``os.environ`` if not given. An empty one counts as unset.

    Raises:
        ConfigError: A setting is wrong; the message says where it stands and what was expected.
    """
    environ = os.environ if environ is None else environ
    home = home_path(environ)
    chosen = _read_context(context, environ)
    find = _Finder(environ, chosen)
    broker_url = find.url("broker", broker, "FLAME_BROKER_URL", chosen.broker_url, check_broker_url)
    store_url = find.url("store", store, "FLAME_STORE_URL", chosen.store_url, check_store_url)
    local = broker_url is None or is_local_broker(broker_url)
    if store_url is None and local:
        store_url = (home / "store").as_uri()
        find.sources["store"] = _DEFAULT
    key_text, key_file = find.key(key)
    if key_text is None and key_file is None and local:
        find.sources["key"] = _DEFAULT
    return Settings(
        home=home,
        broker_url=broker_url,
        store_url=store_url,
        database_url=find.url("database", None, "FLAME_DATABASE_URL", None, check_database_url),
        context=chosen.name,
        file=chosen.file,
        package=chosen.package,
        template=chosen.template,
        sources=find.sources,
        key_text=key_text,
        key_file=key_file,
    )


class _Finder:
    """Looks one setting up after another and notes where each was found."""

    def __init__(self, environ: Mapping[str, str], context: FileContext) -> None:
        self.sources: dict[str, str] = {}
        self._environ = environ
        self._context = context

    def url(
        self,
        name: str,
        argument: str | None,
        variable: str,
        in_file: str | None,
        check: Callable[[str], str],
    ) -> str | None:
        """A URL, checked, or None."""
        candidates = (
            (f"{name} ({_ARGUMENT})", argument),
            (variable, self._environ.get(variable) or None),
            (self._file_source, in_file),
        )
        for source, value in candidates:
            if value is not None:
                self.sources[name] = _ARGUMENT if value is argument else source
                return _checked(value, source, check)
        return None

    def key(self, argument: str | None) -> tuple[str | None, Path | None]:
        """The key's text, or its file, or neither."""
        text = self._environ.get("FLAME_KEY") or None
        named = self._environ.get("FLAME_KEY_FILE") or None
        for source, key_text, key_file in (
            (_ARGUMENT, argument, None),
            ("FLAME_KEY", text, None),
            ("FLAME_KEY_FILE", None, Path(named).expanduser().absolute() if named else None),
            (self._file_source, None, self._context.key_file),
        ):
            if key_text is not None or key_file is not None:
                self.sources["key"] = source
                return key_text, key_file
        return None, None

    @property
    def _file_source(self) -> str:
        return f"{self._context.file}, context {self._context.name!r}"


def _checked(value: str, source: str, check: Callable[[str], str]) -> str:
    try:
        return check(value)
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from error


def _read_context(name: str | None, environ: Mapping[str, str]) -> FileContext:
    path = config_path(environ)
    if not path.exists():
        if environ.get("FLAME_CONFIG"):
            raise ConfigError(f"FLAME_CONFIG: there is no file {path}")
        if name is not None:
            raise ConfigError(f"context {name!r}: there is no settings file {path}")
        return FileContext()
    from flame_broker.config_file import read_context

    return read_context(path, name)
