"""Takes chosen messages off the shelves: dropped, or sent again first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final, NamedTuple

from flame_broker.errors import PayloadTooLarge
from flame_broker.frames import open_frame
from flame_broker.keys import Keyring
from flame_broker.messages import CallFrame
from flame_broker.transport import Delivery
from flame_cli.aside import Aside, Shelf, digest_of
from flame_cli.hands import Hands, Pile
from flame_cli.replay import Edits, Replayer, renewed

__all__ = ["Done", "drop", "replay"]

_AHEAD: Final = 256

Done = Callable[[Aside, str], None]
"""Told of each message that is dealt with: to which queue it went, or ``""``."""


class _Held(NamedTuple):
    aside: Aside
    pile: Pile
    delivery: Delivery


async def drop(url: str, chosen: Sequence[Aside], done: Done) -> None:
    """Take messages off for good.

    Args:
        url: The broker.
        chosen: Which, as a survey found them.
        done: Told of each.

    Raises:
        BrokerUnavailable: No broker answered, or the connection was lost; the rest is still there.
    """
    async with Hands(url) as hands:
        async for aside, pile, delivery in _held(hands, chosen):
            pile.take_off(delivery)
            done(aside, "")


async def replay(
    url: str,
    keyring: Keyring,
    chosen: Sequence[Aside],
    edits: Edits,
    done: Done,
    refused: Callable[[Aside, str], None],
) -> None:
    """Send the calls of messages again, and take off what was confirmed.

    Copies of one message are sent once. What is stopped in between is sent twice at most.

    Args:
        url: The broker.
        keyring: The keys whose signatures count.
        chosen: Which, as a survey found them, all replayable.
        edits: What is to be different.
        done: Told of each that was sent.
        refused: Told of each that stays, and why.

    Raises:
        BrokerUnavailable: No broker answered, or the connection was lost; the rest is still there.
    """
    sent: dict[str, str] = {}
    async with Hands(url) as hands:
        replayer = Replayer(hands.desk)
        async for aside, pile, delivery in _held(hands, chosen):
            if aside.digest not in sent:
                frame, key = open_frame(delivery.body, keyring)
                assert isinstance(frame, CallFrame)  # the survey saw the same bytes
                fresh = renewed(frame, aside.shelf, edits)
                try:
                    await replayer.send(fresh, aside.shelf, key)
                except PayloadTooLarge as problem:
                    refused(aside, str(problem))
                    continue
                sent[aside.digest] = fresh.queue
            pile.take_off(delivery)
            done(aside, sent[aside.digest])


async def _held(hands: Hands, chosen: Sequence[Aside]) -> AsyncIterator[_Held]:
    """Bring the chosen messages in hand, one after another; those that are gone do not come."""
    by_shelf: dict[Shelf, list[Aside]] = defaultdict(list)
    for aside in chosen:
        by_shelf[aside.shelf].append(aside)
    for shelf, asides in by_shelf.items():
        wanted = {aside.digest: aside for aside in asides}
        left = len(asides)
        # What is not wanted stays in hand; what is wanted comes a few at a time.
        others = max(0, await hands.depth(shelf) - left)
        pile = await hands.reach(shelf, others + _AHEAD)
        while left and (delivery := await pile.next()) is not None:
            found = wanted.get(digest_of(delivery.body))
            if found is not None:
                left -= 1
                yield _Held(found, pile, delivery)
