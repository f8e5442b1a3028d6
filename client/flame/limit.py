"""``flame.Limit``: how many calls that share a key may be under way at a time."""

from __future__ import annotations

from dataclasses import dataclass

from flame_broker.messages import Limitation, is_plain

__all__ = ["Limit"]

_KEY_CHARACTERS = 500


@dataclass(frozen=True, slots=True)
class Limit:
    """At most so many calls with the same key at a time, of whatever service and client.

    A call is under way from when it is queued for a worker to its end. Others wait in the order in
    which they were made, and one that pauses before it is tried again gives its place to them.

    Args:
        key: What they share, such as the name of a license or of a data base.
        calls: How many. Each call obeys its own number.

    Raises:
        TypeError: An argument is of a wrong type.
        ValueError: It has a value that it cannot have.

    >>> Limit("warehouse", calls=4)
    Limit(key='warehouse', calls=4)
    """

    key: str
    calls: int

    def __post_init__(self) -> None:
        given: tuple[object, object] = self.key, self.calls
        if not isinstance(given[0], str) or not isinstance(given[1], int):
            raise TypeError(f"{self!r}: expected a text and a number, as in Limit('license', 4)")
        if not self.key or len(self.key) > _KEY_CHARACTERS or not is_plain(self.key):
            raise ValueError(
                f"key={self.key[:20]!r}: expected 1 to {_KEY_CHARACTERS} characters, none of them "
                "a zero or half a character"
            )
        if not 1 <= self.calls <= 1_000_000:
            raise ValueError(f"calls={self.calls}: expected 1 or more, up to a million")

    @property
    def limitation(self) -> Limitation:
        """As it travels."""
        return Limitation(self.key, self.calls)
