"""Takes chosen messages off the shelves: dropped, or sent again first."""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final, NamedTuple

from flame_broker.errors import PayloadTooLarge
from flame_broker.frames import open_frame
from flame_broker.keys import Keyring
from flame_broker.messages import CallFrame
from flame_broker.transport import Delivery
from flame_cli.aside import Aside, Shelf, digest_of
from flame_cli.hands import Hands, Pile
from flame_cli.replay import Edits, Replayer, in_time, renewed

__all__ = ["Done", "drop", "replay"]

_AHEAD: Final = 256
_AT_ONCE: Final = 64

Done = Callable[[Aside, str], None]
"""Told of each message that is dealt with: to which queue it went, or ``""``."""


class _Held(NamedTuple):
    aside: Aside
    pile: Pile
    delivery: Delivery


class _Sent(NamedTuple):
    queue: str
    confirmed: asyncio.Future[None]


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
    sent: dict[str, _Sent] = {}
    waiting: deque[tuple[_Held, _Sent]] = deque()

    async def settle() -> None:
        held, copy = waiting.popleft()
        await in_time(copy.confirmed)
        held.pile.take_off(held.delivery)
        done(held.aside, copy.queue)

    async with Hands(url) as hands:
        replayer = Replayer(hands.desk)
        async for held in _held(hands, chosen):
            digest = held.aside.digest
            if digest not in sent:
                try:
                    sent[digest] = await _send(replayer, held, keyring, edits)
                except PayloadTooLarge as problem:
                    refused(held.aside, str(problem))
                    continue
            waiting.append((held, sent[digest]))
            if len(waiting) == _AT_ONCE:
                await settle()
        while waiting:
            await settle()


async def _send(replayer: Replayer, held: _Held, keyring: Keyring, edits: Edits) -> _Sent:
    frame, key = open_frame(held.delivery.body, keyring)
    assert isinstance(frame, CallFrame)  # the survey saw the same bytes
    fresh = renewed(frame, held.aside.shelf, edits)
    return _Sent(fresh.queue, await replayer.send(fresh, held.aside.shelf, key))


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
