"""The YAML of a Runnable: an optional document of extensions, then one tagged Runnable.

Reading takes two passes. ``read_document`` finds what is wrong with the text without knowing any
class; ``construct`` makes the object once the extensions are imported. Every error names the
file, the line and the column. Nothing but the classes of the extensions is ever called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

import yaml

from flame.runnable.registry import Registry, TagError
from flame_broker.errors import ConfigError

__all__ = ["Document", "check_tags", "construct", "parse", "read_document"]

_NOT_YET: Final = {
    "!@": "links (!@)",
    "!g": "grids (!g)",
    "!s": "samples (!s)",
    "!cluster": "cluster resources (!cluster)",
}
_NULL: Final = "tag:yaml.org,2002:null"
_EXAMPLE: Final = "one tagged Runnable, such as `!ext.MyRunnable`"


@dataclass(frozen=True, slots=True)
class Document:
    """A file that is YAML of the right shape.

    Args:
        file: Its name, for messages.
        text: All of it.
        extensions: Name to location, as the first document has them.
        node: The last document, not constructed yet.
    """

    file: str
    text: str
    extensions: dict[str, str]
    node: yaml.Node


def read_document(path: Path) -> Document:
    """Read and check a file.

    Raises:
        ConfigError: It cannot be read, or ``parse`` refuses it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path}: is not UTF-8 text: {exc.reason}") from exc
    return parse(text, str(path))


def parse(text: str, file: str) -> Document:
    """Check the form of a Runnable's YAML.

    Raises:
        ConfigError: It is no YAML, has over two documents, a first one that is no mapping of names
            to locations, a last one that is not tagged, or a key that stands twice.
    """
    documents = _compose(text, file)
    if not documents:
        raise ConfigError(f"{file}: the file is empty; expected {_EXAMPLE}")
    if len(documents) > 2:
        raise ConfigError(
            f"{_place(file, documents[2])}: expected at most two documents (extensions, then "
            f"{_EXAMPLE}), found {len(documents)}"
        )
    node = documents[-1]
    if not node.tag.startswith("!"):
        raise ConfigError(f"{_place(file, node)}: expected {_EXAMPLE}, found {_kind(node)}")
    extensions = _extensions(documents[0], file) if len(documents) == 2 else {}
    for document in documents:
        _refuse_double_keys(document, file)
    return Document(file, text, extensions, node)


def check_tags(document: Document, registry: Registry) -> None:
    """Look every tag up.

    Raises:
        TagError: One means no class.
    """
    for node in _walk(document.node):
        if node.tag.startswith("!"):
            _find(node, document.file, registry)
        elif node.tag not in yaml.SafeLoader.yaml_constructors:
            raise TagError(f"{_place(document.file, node)}: unknown tag {node.tag}")


def construct(document: Document, registry: Registry) -> Any:
    """Make the object that the last document describes, and those nested in it.

    Raises:
        TagError: A tag means no class.
        ConfigError: A class does not take a keyword, misses one, or refuses what it was given.
    """

    class Loader(yaml.SafeLoader):
        """Knows our tags, for this one file."""

    def build(loader: yaml.SafeLoader, tag: str, node: yaml.Node) -> Any:
        target = _find(node, document.file, registry)
        return _call(target, tag, _keywords(loader, node, document.file), node, document.file)

    Loader.add_multi_constructor("!", build)
    loader = Loader("")
    try:
        return loader.construct_document(document.node)
    except yaml.MarkedYAMLError as exc:
        raise _syntax_error(exc, document.text, document.file) from exc
    finally:
        loader.dispose()


# ── the text ─────────────────────────────────────────────────────────────────


def _compose(text: str, file: str) -> list[yaml.Node]:
    try:
        nodes: list[yaml.Node] = list(yaml.compose_all(text, Loader=yaml.SafeLoader))
    except yaml.MarkedYAMLError as exc:
        raise _syntax_error(exc, text, file) from exc
    except yaml.reader.ReaderError as exc:
        line = text.count("\n", 0, exc.position) + 1
        column = exc.position - (text.rfind("\n", 0, exc.position) + 1) + 1
        raise ConfigError(f"{file}:{line}:{column}: not YAML: {exc.reason}") from exc
    return nodes


def _syntax_error(exc: yaml.MarkedYAMLError, text: str, file: str) -> ConfigError:
    mark = exc.problem_mark or exc.context_mark
    if mark is None:
        return ConfigError(f"{file}: not YAML: {exc.problem}")
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    hint = ""
    if line.rstrip().endswith(":") and mark.column == len(line.rstrip()) - 1:
        hint = "; remove the ':' at the end of the line"
    return ConfigError(
        f"{file}:{mark.line + 1}:{mark.column + 1}: not YAML: {exc.problem}{hint}\n"
        f"  {line}\n  {' ' * mark.column}^"
    )


def _extensions(node: yaml.Node, file: str) -> dict[str, str]:
    if node.tag == _NULL:
        return {}
    if not isinstance(node, yaml.MappingNode) or node.tag.startswith("!"):
        raise ConfigError(
            f"{_place(file, node)}: expected extensions as `name: location`, found {_kind(node)}"
        )
    found = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or not key.value.isidentifier():
            raise ConfigError(
                f"{_place(file, key)}: expected the name of a module, found {_kind(key)}"
            )
        if not isinstance(value, yaml.ScalarNode) or not value.value.strip():
            raise ConfigError(
                f"{_place(file, value)}: expected a location of the extension {key.value!r} (a "
                f"path, an address or a requirement), found {_kind(value)}"
            )
        found[key.value] = value.value.strip()
    return found


def _refuse_double_keys(document: yaml.Node, file: str) -> None:
    for node in _walk(document):
        if not isinstance(node, yaml.MappingNode):
            continue
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise ConfigError(f"{_place(file, key)}: the key {key.value!r} stands twice")
                seen.add(key.value)


def _walk(root: yaml.Node) -> Iterator[yaml.Node]:
    """Every node once; an anchored one may be inside itself."""
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, yaml.MappingNode):
            waiting.extend(part for pair in reversed(node.value) for part in reversed(pair))
        elif isinstance(node, yaml.SequenceNode):
            waiting.extend(reversed(node.value))


def _place(file: str, node: yaml.Node) -> str:
    mark = node.start_mark
    return f"{file}:{mark.line + 1}:{mark.column + 1}"


def _kind(node: yaml.Node) -> str:
    if node.tag.startswith("!"):
        return f"the tag {node.tag}"
    if isinstance(node, yaml.MappingNode):
        return "a mapping without a tag"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return "nothing" if not node.value else repr(node.value)


# ── the objects ──────────────────────────────────────────────────────────────


def _find(node: yaml.Node, file: str, registry: Registry) -> Callable[..., Any]:
    if node.tag in _NOT_YET:
        raise ConfigError(
            f"{_place(file, node)}: {_NOT_YET[node.tag]} come with experiments, which this version "
            "does not have yet"
        )
    try:
        return registry.find(node.tag.removeprefix("!"))
    except TagError as exc:
        raise TagError(f"{_place(file, node)}: {exc}") from exc.__cause__


def _keywords(loader: yaml.SafeLoader, node: yaml.Node, file: str) -> dict[str, Any]:
    if isinstance(node, yaml.ScalarNode) and not node.value:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            f"{_place(file, node)}: {node.tag} takes keywords (`name: value`), "
            f"found {_kind_of_value(node)}"
        )
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{_place(file, key)}: expected a keyword, found {_kind(key)}")
    keywords = loader.construct_mapping(node, deep=True)
    return {str(name): value for name, value in keywords.items()}


def _kind_of_value(node: yaml.Node) -> str:
    return "a list" if isinstance(node, yaml.SequenceNode) else f"the value {node.value!r}"


def _call(
    target: Callable[..., Any], tag: str, keywords: dict[str, Any], node: yaml.Node, file: str
) -> Any:
    _check_keywords(target, tag, keywords, node, file)
    try:
        return target(**keywords)
    except ConfigError:
        raise
    # The border to the user's constructor, which may raise anything.
    except Exception as exc:
        raise ConfigError(
            f"{_place(file, node)}: !{tag} could not be made: {type(exc).__name__}: {exc}"
        ) from exc


def _check_keywords(
    target: Callable[..., Any], tag: str, keywords: dict[str, Any], node: yaml.Node, file: str
) -> None:
    try:
        parameters = inspect.signature(target).parameters.values()
    except ValueError:  # some builtins tell nobody what they take
        return
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    open_end = any(p.kind is p.VAR_KEYWORD for p in parameters)
    shape = f"!{tag}({', '.join(map(_shown, parameters))})"
    for name in keywords:
        if name not in named and not open_end:
            close = get_close_matches(name, named, n=1)
            advice = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(
                f"{_place_of_key(node, name, file)}: {shape} takes no {name!r}{advice}"
            )
    missing = [n for n, p in named.items() if p.default is p.empty and n not in keywords]
    if missing:
        raise ConfigError(f"{_place(file, node)}: {shape} needs {', '.join(map(repr, missing))}")


def _shown(parameter: inspect.Parameter) -> str:
    """Without annotations, which make a long line."""
    return str(parameter.replace(annotation=inspect.Parameter.empty))


def _place_of_key(node: yaml.Node, name: str, file: str) -> str:
    keys = (key for key, _ in node.value) if isinstance(node, yaml.MappingNode) else ()
    return _place(file, next((key for key in keys if key.value == name), node))
