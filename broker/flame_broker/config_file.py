"""The settings file, ``~/.flame/flame.yaml``, and exact words about what is wrong in it.

::

    current-context: factory
    contexts:
      - name: factory
        cluster:
          endpoint: amqps://user:password@broker-1;broker-2/flame     # the broker
          key-file: factory.key                  # beside this file, or an absolute path
        cache:
          endpoint: s3://bucket/prefix           # the object store
        package:
          storage: https://files.example/packages
          excludes: ["*.log", "data/"]
        runner:
          template: flmrun

Only ``contexts`` and each ``name`` are needed. Unknown keys are refused: a misspelt one would
silently mean the default.
"""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from flame_broker.config import FileContext, PackageSettings
from flame_broker.errors import ConfigError
from flame_broker.urls import check_broker_url, check_store_url, mask_url

__all__ = ["ConfigFile", "ContextSection", "read_config_file", "read_context"]

_SHOWN_CHARACTERS = 80

BrokerUrl = Annotated[str, AfterValidator(check_broker_url)]
StoreUrl = Annotated[str, AfterValidator(check_store_url)]


def _with_dashes(name: str) -> str:
    return name.replace("_", "-")


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, alias_generator=_with_dashes
    )


class ClusterSection(_Section):
    """The broker of a context, and its key."""

    endpoint: BrokerUrl | None = None
    key_file: str | None = None


class CacheSection(_Section):
    """The object store of a context."""

    endpoint: StoreUrl | None = None


class PackageSection(_Section):
    """How project packages are made."""

    storage: StoreUrl | None = None
    excludes: list[str] = []


class RunnerSection(_Section):
    """What ``Runner`` starts from."""

    template: str | None = None


class ContextSection(_Section):
    """One named cluster."""

    name: str = Field(min_length=1)
    cluster: ClusterSection = ClusterSection()
    cache: CacheSection = CacheSection()
    package: PackageSection = PackageSection()
    runner: RunnerSection = RunnerSection()


class ConfigFile(_Section):
    """The whole file."""

    current_context: str | None = None
    contexts: list[ContextSection] = Field(min_length=1)


def read_context(path: Path, name: str | None = None) -> FileContext:
    """One context of a file: the named one, else its ``current-context``, else its only one.

    Raises:
        ConfigError: The file can't be read or is wrong, or it has no such context.
    """
    document = _Document(path)
    config = document.validated()
    names = [context.name for context in config.contexts]
    wanted = name or config.current_context or (names[0] if len(names) == 1 else None)
    if wanted is None:
        raise document.error(("contexts",), f"current-context is needed to choose of {names}")
    if wanted not in names:
        loc = () if name else ("current-context",)
        raise document.error(loc, f"there is no context {wanted!r}{_suggestion(wanted, names)}")
    chosen = config.contexts[names.index(wanted)]
    key_file = chosen.cluster.key_file
    return FileContext(
        name=wanted,
        file=path,
        broker_url=chosen.cluster.endpoint,
        store_url=chosen.cache.endpoint,
        key_file=path.parent / Path(key_file).expanduser() if key_file else None,
        package=PackageSettings(chosen.package.storage, tuple(chosen.package.excludes)),
        template=chosen.runner.template,
    )


def read_config_file(path: Path) -> ConfigFile:
    """The whole file, checked.

    Raises:
        ConfigError: It can't be read, is not YAML, or a key or value is not as expected.
    """
    return _Document(path).validated()


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, where YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                problem = f"the key {key.value!r} stands twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Document:
    """A parsed file that still knows on which line each key stands."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            loader = _Loader(path.read_text(encoding="utf-8"))
            self._root = loader.get_single_node()
            self._data = loader.construct_document(self._root) if self._root else None
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: is not UTF-8 text") from error
        except yaml.MarkedYAMLError as error:
            raise ConfigError(f"{path}{_place(error.problem_mark)}: {error.problem}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: is not YAML: {error}") from error

    def validated(self) -> ConfigFile:
        try:
            config = ConfigFile.model_validate(self._data)
        except ValidationError as error:
            lines = [self._explain(detail) for detail in error.errors(include_url=False)]
            raise ConfigError("\n".join(lines)) from None
        names = [context.name for context in config.contexts]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise self.error(("contexts", number, "name"), f"{name!r} is taken already")
        return config

    def error(self, loc: Sequence[int | str], problem: str) -> ConfigError:
        return ConfigError(self._message(loc, problem))

    def _message(self, loc: Sequence[int | str], problem: str) -> str:
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
        where = f"{self._path}{_place(self._mark(loc))}"
        return f"{where}: {path.lstrip('.')}: {problem}" if path else f"{where}: {problem}"

    def _explain(self, detail: ErrorDetails) -> str:
        loc, found = detail["loc"], _shown(detail["input"])
        if detail["type"] == "extra_forbidden":
            problem = f"unknown key{_suggestion(str(loc[-1]), _known_keys(loc[:-1]))}"
        elif detail["type"] == "missing":
            problem = "is missing"
        elif detail["type"] == "value_error":  # our own words, which already say what was found
            problem = str(detail["ctx"]["error"])
        elif detail["type"] == "model_type":
            problem = f"expected keys and values, found {found}"
        else:
            problem = f"{detail['msg'].replace('Input should', 'should')}, found {found}"
        return self._message(loc, problem)

    def _mark(self, loc: Sequence[int | str]) -> yaml.Mark | None:
        """Where the key at ``loc`` stands, or the nearest thing around it."""
        node, mark = self._root, self._root.start_mark if self._root else None
        for part in loc:
            if isinstance(node, yaml.SequenceNode) and isinstance(part, int):
                node = node.value[part]
                mark = node.start_mark
            elif isinstance(node, yaml.MappingNode):
                pair = next((pair for pair in node.value if pair[0].value == part), None)
                if pair is None:
                    break
                mark, node = pair[0].start_mark, pair[1]
        return mark


def _known_keys(loc: Iterable[int | str]) -> list[str]:
    """The keys that may stand at ``loc``."""
    model: type[BaseModel] = ConfigFile
    for part in loc:
        if isinstance(part, str):
            annotation = model.model_fields[part.replace("-", "_")].annotation
            model = (get_args(annotation) or (annotation,))[0]
    return [_with_dashes(name) for name in model.model_fields]


def _suggestion(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {close[0]!r}?" if close else f", expected one of {', '.join(known)}"


def _shown(value: object) -> str:
    text = "nothing" if value is None else mask_url(repr(value))
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"


def _place(mark: yaml.Mark | None) -> str:
    return "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
