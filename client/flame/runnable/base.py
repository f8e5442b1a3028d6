"""``Runnable``: what a YAML file for ``flame run`` names."""

from __future__ import annotations

import getpass
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from configparser import ConfigParser
from pathlib import Path
from typing import Any

from flame.runnable.secrets import new_config, read_secrets

__all__ = ["Runnable"]


class Runnable(ABC):
    """Something that ``flame run FILE.yaml`` runs: subclass it and write ``run``.

    Keywords in the YAML file go to ``__init__``; one that nobody takes is an error.

    Args:
        user_provider: Says who runs this; by default the user of the operating system.

    Attributes:
        config: The secrets that the user gave, as ``config["AWS"]["TOKEN"]``.
        extensions: The extensions of the YAML file, name to location.
        content: The YAML of this Runnable, if it was made from YAML.
        user_provider: Says who runs this.

    >>> class Hello(Runnable):
    ...     def __init__(self, name: str) -> None:
    ...         super().__init__()
    ...         self.name = name
    ...
    ...     def run(self, **kwargs) -> None:
    ...         print(f"Hello, {self.name}")
    """

    def __init__(self, user_provider: Callable[[], str] | None = None, **kwargs: Any) -> None:
        if kwargs:
            raise TypeError(f"unexpected keyword argument {next(iter(kwargs))!r}")
        self.config: ConfigParser = new_config()
        self.extensions: dict[str, str] = {}
        self.content: str | None = None
        self.user_provider = user_provider or getpass.getuser

    @abstractmethod
    def run(self, **kwargs: Any) -> object:
        """Do the work. What it raises is the failure of ``flame run``.

        Args:
            kwargs: ``force``, ``verbose`` and ``debug``, as the command line gave them; a
                ``run`` that names none of them gets none.
        """

    def parse(self) -> None:  # noqa: B027  # most have nothing to check
        """Check whether this can run, after the secrets are there and before ``run``.

        Raises:
            ConfigError: It cannot; the message says why.
        """

    def inject_content(self, content: str) -> None:
        """Set the YAML that this was made from."""
        self.content = content

    def inject_secrets(self, secrets: str) -> None:
        """Read secrets into ``config``.

        Args:
            secrets: Path of an INI file.

        Raises:
            ConfigError: The file is not there, or no INI file.
        """
        self.config.read_string(read_secrets(Path(secrets)))

    def inject_extensions(self, extensions: Mapping[str, str]) -> None:
        """Set the extensions that the YAML file named."""
        self.extensions = dict(extensions)
