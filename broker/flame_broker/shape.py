"""What a document may look like, and in words what of it does not.

>>> shape = Section({"name": Text(needed=True), "tags": Sequence(Text(needed=True))})
>>> [*shape.mistakes({"nam": "a", "tags": [1]})]  # doctest: +NORMALIZE_WHITESPACE
[Mistake(place=('name',), problem='is missing'),
 Mistake(place=('tags', 0), problem='should be a valid string, found 1'),
 Mistake(place=('nam',), problem="unknown key, did you mean 'name'?")]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final, NamedTuple, Protocol

from flame_broker.urls import mask_url

__all__ = ["Mistake", "Place", "Section", "Sequence", "Shape", "Text", "suggestion"]

_SHOWN_CHARACTERS: Final = 80

Place = tuple[int | str, ...]
"""The keys and numbers that lead to a value."""


class Mistake(NamedTuple):
    """What is wrong with the value at a place."""

    place: Place
    problem: str


class Shape(Protocol):
    """What a value may be.

    Attributes:
        needed: Whether its key must be there.
    """

    needed: bool

    def mistakes(self, value: object, place: Place = ()) -> Iterator[Mistake]:
        """Everything that is wrong with a value, in the order of the shape."""


class Text:
    """A string; none at all where it is not needed.

    Args:
        check: Raises ``ValueError`` for a string that will not do.
        needed: Whether its key must be there.
        filled: Whether it must have a character.
    """

    def __init__(
        self,
        check: Callable[[str], object] | None = None,
        *,
        needed: bool = False,
        filled: bool = False,
    ) -> None:
        self.needed = needed
        self._check = check
        self._filled = filled

    def mistakes(self, value: object, place: Place = ()) -> Iterator[Mistake]:
        """That it is no string, an empty one, or not what the check expects."""
        if value is None and not self.needed:
            return
        if not isinstance(value, str):
            yield Mistake(place, f"should be a valid string, found {_shown(value)}")
        elif self._filled and not value:
            yield Mistake(place, f"should have at least 1 character, found {_shown(value)}")
        elif self._check is not None:
            try:
                self._check(value)
            except ValueError as error:  # its words say already what was found
                yield Mistake(place, str(error))


class Sequence:
    """A list.

    Args:
        item: What each item may be.
        needed: Whether its key must be there, with at least one item.
    """

    def __init__(self, item: Shape, *, needed: bool = False) -> None:
        self.needed = needed
        self._item = item

    def mistakes(self, value: object, place: Place = ()) -> Iterator[Mistake]:
        """That it is no list, an empty one, or what is wrong with its items."""
        if not isinstance(value, list):
            yield Mistake(place, f"should be a valid list, found {_shown(value)}")
        elif self.needed and not value:
            yield Mistake(place, f"should have at least 1 item, found {_shown(value)}")
        else:
            for number, item in enumerate(value):
                yield from self._item.mistakes(item, (*place, number))


class Section:
    """Keys and values; a key that is not among them is a mistake.

    Args:
        keys: What may stand under each key.
    """

    needed = False

    def __init__(self, keys: Mapping[str, Shape]) -> None:
        self._keys = keys

    def mistakes(self, value: object, place: Place = ()) -> Iterator[Mistake]:
        """That it is no section, which keys are missing, wrong or unknown."""
        if not isinstance(value, dict):
            yield Mistake(place, f"expected keys and values, found {_shown(value)}")
            return
        for key, shape in self._keys.items():
            if key in value:
                yield from shape.mistakes(value[key], (*place, key))
            elif shape.needed:
                yield Mistake((*place, key), "is missing")
        for key in value:
            if key not in self._keys:
                problem = f"unknown key{suggestion(str(key), self._keys)}"
                yield Mistake((*place, str(key)), problem)


def suggestion(word: str, known: Iterable[str]) -> str:
    """What to say after a word that is not among the known ones."""
    from difflib import get_close_matches

    names = [*known]
    close = get_close_matches(word, names, n=1)
    return f", did you mean {close[0]!r}?" if close else f", expected one of {', '.join(names)}"


def _shown(value: object) -> str:
    text = "nothing" if value is None else mask_url(repr(value))
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"
