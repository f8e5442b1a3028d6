"""What became of a call, as JSON: for programs that read what a command prints."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import flame

__all__ = ["outcome_of", "value_of"]

_DEEPEST: Final = 100


def outcome_of(
    future: flame.ObjectFuture[Any], story: Mapping[str, Any] | None
) -> dict[str, object]:
    """Id, label, state, and the error if there was one.

    Args:
        future: Of the call.
        story: What the history knows of it, as it is now.
    """
    known = story or {}
    error = known.get("error")
    return {
        "id": future.id,
        "label": future.label,
        "state": known.get("state"),
        "error": {"type": error, "message": known.get("reason")} if error else None,
    }


def value_of(value: object) -> dict[str, object]:
    """``value`` where JSON has all of it, else its ``repr`` and its ``type``."""
    if _is_json(value, _DEEPEST):
        return {"value": value}
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else _full_name(kind)
    return {"repr": repr(value), "type": name}


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_json(value: object, depth: int) -> bool:
    """Whether JSON gives it back; of what holds itself, or is too deep, it does not."""
    kind = type(value)
    if kind is str:
        return _is_text(str(value))
    if kind is float:
        return isfinite(value)  # type: ignore[arg-type]  # it is a float
    if kind is list or kind is tuple:
        return depth > 0 and all(_is_json(one, depth - 1) for one in value)  # type: ignore[attr-defined]
    if kind is dict:
        items = value.items()  # type: ignore[attr-defined]
        return depth > 0 and all(
            type(key) is str and _is_text(key) and _is_json(one, depth - 1) for key, one in items
        )
    return value is None or kind is bool or kind is int


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # halves of characters
        return False
    return True
