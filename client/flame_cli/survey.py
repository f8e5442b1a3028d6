"""What lies on the shelves, and which of it somebody means by an id."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from flame_broker.keys import Keyring
from flame_cli.aside import Aside, Shelf, read
from flame_cli.hands import MOST, Hands

__all__ = ["Choice", "Survey", "survey"]

_ID: Final = re.compile(r"[0-9a-f]{4,64}")


@dataclass(frozen=True, slots=True)
class Choice:
    """What was meant.

    Attributes:
        asides: The messages, every copy of each.
        problems: By the words that name no message, or several, what is wrong with them.
    """

    asides: list[Aside] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Survey:
    """What was seen.

    Attributes:
        asides: By shelf, the oldest first.
        lying: How many messages lie there, seen or not.
    """

    asides: list[Aside]
    lying: int

    def find(self, words: Sequence[str]) -> Choice:
        """The messages with these ids; four digits are enough where they name one.

        Args:
            words: Ids, or how they begin.
        """
        choice = Choice()
        chosen: set[str] = set()
        for word in dict.fromkeys(words):
            found = self._beginning(word.lower())
            digests = sorted({aside.digest for aside in found})
            if not digests:
                choice.problems[word] = f"no message that is set aside has the id {word}"
            elif len(digests) > 1:
                ids = ", ".join(digest[: len(word) + 6] for digest in digests)
                choice.problems[word] = f"{word} is the beginning of several ids: {ids}"
            elif not chosen.issuperset(digests):
                chosen.update(digests)
                choice.asides.extend(found)
        return choice

    def _beginning(self, word: str) -> list[Aside]:
        if _ID.fullmatch(word) is None:
            return []
        return [aside for aside in self.asides if aside.digest.startswith(word)]


async def survey(url: str, keyring: Keyring, shelves: Sequence[Shelf], most: int = MOST) -> Survey:
    """Look at what lies on the shelves, and leave it there.

    Args:
        url: The broker.
        keyring: The keys whose signatures count.
        shelves: Where to look.
        most: At most so many messages.

    Raises:
        BrokerUnavailable: No broker answered, or the connection was lost.
        ConfigError: The broker cannot be looked at without harm.
    """
    found: list[Aside] = []
    lying = 0
    async with Hands(url) as hands:
        for shelf in shelves:
            depth = await hands.depth(shelf)
            lying += depth
            seen = await _look(hands, shelf, keyring, min(depth, most - len(found), MOST))
            found.extend(seen)
    return Survey(found, lying)


async def _look(hands: Hands, shelf: Shelf, keyring: Keyring, count: int) -> list[Aside]:
    found: list[Aside] = []
    if count < 1:
        return found
    pile = await hands.reach(shelf, count)
    while len(found) < count and (delivery := await pile.next()) is not None:
        found.append(read(delivery.body, delivery.headers, shelf, keyring))
    return found
