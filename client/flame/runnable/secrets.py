"""Secrets: an INI file that the user gives, and that nobody prints."""

from __future__ import annotations

import configparser
from pathlib import Path
from typing import Final

from flame_broker.config import home_path
from flame_broker.errors import ConfigError

__all__ = ["DEFAULT_NAME", "find_secrets", "new_config", "read_secrets"]

DEFAULT_NAME: Final = "secrets.ini"
"""The file in ``FLAME_HOME`` that is used when none is named."""


def new_config() -> configparser.ConfigParser:
    """An empty parser, for which a ``%`` in a secret means nothing."""
    return configparser.ConfigParser(interpolation=None)


def find_secrets(named: str | None) -> str:
    """The text of the secrets file that applies; empty if there is none.

    Args:
        named: The file that the user named; None looks for ``secrets.ini`` in ``FLAME_HOME``.

    Raises:
        ConfigError: The named file is not there, or a file is no INI file.
    """
    if named is not None:
        return read_secrets(Path(named).expanduser())
    default = home_path() / DEFAULT_NAME
    return read_secrets(default) if default.exists() else ""


def read_secrets(path: Path) -> str:
    """Read and check a secrets file.

    Raises:
        ConfigError: It cannot be read, or is no INI file. Nothing of what it holds is shown.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        raise ConfigError(f"secrets file {path}: cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError:
        raise ConfigError(f"secrets file {path}: is not text") from None
    try:
        new_config().read_string(text)
    # The parser's own messages quote the line, which may hold the secret: only its number shows.
    except configparser.MissingSectionHeaderError as exc:
        raise _no_ini(path, exc.lineno) from None
    except configparser.ParsingError as exc:
        raise _no_ini(path, exc.errors[0][0]) from None
    except (configparser.DuplicateSectionError, configparser.DuplicateOptionError) as exc:
        problem = f"the section or key stands twice (section {exc.section!r})"
        raise ConfigError(f"secrets file {path}, line {exc.lineno}: {problem}") from None
    return text


def _no_ini(path: Path, line: object) -> ConfigError:
    return ConfigError(
        f"secrets file {path}, line {line}: expected [SECTION] and then lines of NAME = value"
    )
