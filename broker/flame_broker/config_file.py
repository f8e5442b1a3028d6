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

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from flame_broker.config import FileContext, PackageSettings
from flame_broker.errors import ConfigError
from flame_broker.shape import Place, Section, Sequence, Text, suggestion
from flame_broker.urls import check_broker_url, check_store_url

__all__ = ["read_context"]

_CONTEXT: Final = Section(
    {
        "name": Text(needed=True, filled=True),
        "cluster": Section({"endpoint": Text(check_broker_url), "key-file": Text()}),
        "cache": Section({"endpoint": Text(check_store_url)}),
        "package": Section(
            {"storage": Text(check_store_url), "excludes": Sequence(Text(needed=True))}
        ),
        "runner": Section({"template": Text()}),
    }
)
_FILE: Final = Section({"current-context": Text(), "contexts": Sequence(_CONTEXT, needed=True)})


def read_context(path: Path, name: str | None = None) -> FileContext:
    """One context of a file: the named one, else its ``current-context``, else its only one.

    Raises:
        ConfigError: The file can't be read or is wrong, or it has no such context.
    """
    document = _Document(path)
    data = document.checked()
    contexts = {str(context["name"]): context for context in data["contexts"]}
    wanted = (
        name
        or data.get("current-context")
        or (next(iter(contexts)) if len(contexts) == 1 else None)
    )
    if wanted is None:
        raise document.error(("contexts",), f"current-context is needed to choose of {[*contexts]}")
    if wanted not in contexts:
        place: Place = () if name else ("current-context",)
        raise document.error(place, f"there is no context {wanted!r}{suggestion(wanted, contexts)}")
    cluster, cache, package, runner = (
        contexts[wanted].get(section, {}) for section in ("cluster", "cache", "package", "runner")
    )
    key_file = cluster.get("key-file")
    return FileContext(
        name=wanted,
        file=path,
        broker_url=cluster.get("endpoint"),
        store_url=cache.get("endpoint"),
        key_file=path.parent / Path(key_file).expanduser() if key_file else None,
        package=PackageSettings(package.get("storage"), tuple(package.get("excludes", ()))),
        template=runner.get("template"),
    )


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
            raise ConfigError(f"{path}{_position(error.problem_mark)}: {error.problem}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: is not YAML: {error}") from error

    def checked(self) -> Mapping[str, Any]:
        """What the file says, if all of it is as expected."""
        mistakes = [*_FILE.mistakes(self._data)]
        if mistakes:
            raise ConfigError("\n".join(self._message(*mistake) for mistake in mistakes))
        assert isinstance(self._data, dict)
        names = [context["name"] for context in self._data["contexts"]]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise self.error(("contexts", number, "name"), f"{name!r} is taken already")
        return self._data

    def error(self, place: Place, problem: str) -> ConfigError:
        return ConfigError(self._message(place, problem))

    def _message(self, place: Place, problem: str) -> str:
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
        where = f"{self._path}{_position(self._mark(place))}"
        return f"{where}: {path.lstrip('.')}: {problem}" if path else f"{where}: {problem}"

    def _mark(self, place: Place) -> yaml.Mark | None:
        """Where the key at ``place`` stands, or the nearest thing around it."""
        node, mark = self._root, self._root.start_mark if self._root else None
        for part in place:
            if isinstance(node, yaml.SequenceNode) and isinstance(part, int):
                node = node.value[part]
                mark = node.start_mark
            elif isinstance(node, yaml.MappingNode):
                pair = next((pair for pair in node.value if pair[0].value == part), None)
                if pair is None:
                    break
                mark, node = pair[0].start_mark, pair[1]
        return mark


def _position(mark: yaml.Mark | None) -> str:
    return "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
