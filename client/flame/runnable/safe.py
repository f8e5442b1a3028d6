"""``SafeExecutionContext``: from a YAML file to a Runnable that is ready to run."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from flame.runnable.base import Runnable
from flame.runnable.extensions import Extension, imported, locate_extensions
from flame.runnable.installer import install
from flame.runnable.registry import Registry
from flame.runnable.secrets import find_secrets
from flame.runnable.yaml import Document, check_tags, construct, parse, read_document
from flame_broker.errors import ConfigError, FlameError

__all__ = ["SafeExecutionContext", "compile_document", "prepare"]


class SafeExecutionContext:
    """Prepares the Runnable of a YAML file; as a context manager it explains what goes wrong.

    Any exception inside the ``with`` ends there: it is printed as one message on standard error,
    and ``error`` keeps it. Ctrl-C and ``sys.exit`` go through.

    Args:
        yaml_file: Path of the file.

    Attributes:
        error: The exception that ended the ``with``, if one did.

    >>> with SafeExecutionContext("runnable.yaml") as context:
    ...     runnable, extensions = context.preprocess(secrets="secrets.ini")
    ...     runnable.run()
    """

    def __init__(self, yaml_file: str) -> None:
        self.error: Exception | None = None
        self._path = Path(yaml_file)
        self._registry = Registry({})
        self._imports = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        tb: TracebackType | None,
    ) -> bool:
        self.close()
        if not isinstance(exc_value, Exception):
            return False
        self.error = exc_value
        kind = "" if isinstance(exc_value, FlameError) else f"{type(exc_value).__name__}: "
        print(f"{self._path.name}: {kind}{exc_value}", file=sys.stderr)  # noqa: T201  # its purpose
        return True

    def close(self) -> None:
        """Forget the extensions that were imported. Safe to call twice."""
        self._imports.close()

    def preprocess(
        self,
        secrets: str | None = None,
        download_ext: bool = True,
        install_ext: bool = False,
        import_ext: bool = True,
        check_tags: bool = True,
        **kwargs: Any,
    ) -> tuple[Runnable, dict[str, str]]:
        """Do everything that comes before ``run``.

        Args:
            secrets: Path of the secrets file; None takes ``secrets.ini`` in ``FLAME_HOME``, if
                it is there.
            download_ext: For remote extensions, which this version does not have.
            install_ext: Install the extensions with pip first.
            import_ext: Import the extensions.
            check_tags: Look all tags up before anything is made.
            kwargs: Not used; takes what other versions know.

        Returns:
            The Runnable, and the extensions that it uses, name to location.

        Raises:
            ConfigError: The first thing that is wrong.
        """
        content, named = self.first_parse()
        extensions = locate_extensions(named, self._path.parent)
        if install_ext:
            install(extensions, print)
        if import_ext:
            self.import_extensions(extensions)
        if check_tags:
            self.check_tags(content)
        runnable = self.compile_runnable(content)
        prepare(runnable, content, named, find_secrets(secrets))
        return runnable, named

    def first_parse(self) -> tuple[str, dict[str, str]]:
        """Check that the file is YAML of the right shape.

        Returns:
            The file's text, and its extensions.

        Raises:
            ConfigError: It is not.
        """
        document = read_document(self._path)
        return document.text, document.extensions

    def import_extensions(self, extensions: list[Extension]) -> None:
        """Import extensions; they are forgotten at the end of the ``with``.

        Raises:
            ConfigError: One cannot be imported.
        """
        self._registry = Registry(self._imports.enter_context(imported(extensions)))

    def check_tags(self, content: str) -> None:
        """Look all tags up.

        Raises:
            TagError: One means no class.
        """
        check_tags(self._parsed(content), self._registry)

    def compile_runnable(self, content: str) -> Runnable:
        """Make the Runnable, once the extensions are imported.

        Raises:
            ConfigError: A class refuses its keywords, or what the file describes is no Runnable.
        """
        return compile_document(self._parsed(content), self._registry)

    def _parsed(self, content: str) -> Document:
        return parse(content, str(self._path))


def compile_document(document: Document, registry: Registry) -> Runnable:
    """Make the Runnable that a document describes.

    Raises:
        ConfigError: A class refuses its keywords, or what the file describes is no Runnable.
    """
    made = construct(document, registry)
    if not isinstance(made, Runnable):
        mark = document.node.start_mark
        raise ConfigError(
            f"{document.file}:{mark.line + 1}:{mark.column + 1}: {document.node.tag} is a "
            f"{type(made).__name__}, which is no Runnable: subclass flame.Runnable"
        )
    return made


def prepare(runnable: Runnable, content: str, extensions: dict[str, str], secrets: str) -> None:
    """Give a Runnable what it is entitled to, and let it check itself.

    Raises:
        ConfigError: Its ``parse`` says that it cannot run.
    """
    if not hasattr(runnable, "config"):
        raise ConfigError(f"{type(runnable).__name__}.__init__ must call super().__init__()")
    runnable.inject_content(content)
    runnable.config.read_string(secrets)
    runnable.inject_extensions(extensions)
    runnable.parse()
