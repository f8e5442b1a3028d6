"""The workers of a cluster: those that answer, and those that an orchestrator has heard before."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from time import time
from typing import NamedTuple

from flame.inquiry import Facts, Inquiry
from flame_broker.errors import FlameError, MalformedMessage
from flame_broker.facts import unfold
from flame_broker.messages import Plain

__all__ = ["roll_call"]


class _Known(NamedTuple):
    heard_at: float  # in seconds since 1970, by our clock
    facts: Facts


async def roll_call(inquiry: Inquiry, timeout_s: float, name: str) -> list[Facts]:
    """What workers say about themselves, or said with their last heartbeat; by name.

    Args:
        inquiry: Asks.
        timeout_s: How long to wait for answers.
        name: Only this worker; ``""`` for all.

    Raises:
        ConfigError: The broker has no fan-out, so workers cannot be asked.
    """

    def there(answers: Sequence[Facts]) -> bool:
        return any(facts.get("worker") == name for facts in answers)

    asking = asyncio.ensure_future(_known(inquiry, timeout_s, name))
    try:
        present = await inquiry.workers(timeout_s, there if name else None)
        known = await asking
    finally:
        asking.cancel()
    found = {worker: _told(one.facts, one, answers=False) for worker, one in known.items()}
    for facts in present:
        worker = str(facts.get("worker"))
        found[worker] = _told(facts, known.get(worker), answers=True)
    return [found[worker] for worker in sorted(found)]


async def _known(inquiry: Inquiry, timeout_s: float, name: str) -> dict[str, _Known]:
    """Whom an orchestrator has heard; nobody if there is none, or it is of an earlier version."""
    found: dict[str, _Known] = {}
    after, more = "", True
    while more:
        try:
            answer = await inquiry.ask("workers", patience_s=timeout_s, worker=name, after=after)
        except FlameError:  # those that answer are there all the same
            return found
        page = answer.get("workers")
        for row in page if isinstance(page, tuple) else ():
            if isinstance(row, tuple):
                after, one = _read(*row)
                found[after] = one
        more = bool(answer.get("more")) and bool(page)
    return found


def _read(*row: Plain) -> tuple[str, _Known]:
    name, silent_s, folded = row
    facts: dict[str, Plain] = {"worker": name}
    if isinstance(folded, bytes) and folded:
        try:
            facts |= unfold(folded)
        except MalformedMessage:
            facts["labels"] = "of another version: it cannot be read here"
    silence_s = silent_s if isinstance(silent_s, (int, float)) else 0.0
    return str(name), _Known(round(time() - silence_s, 3), facts)


def _told(facts: Facts, known: _Known | None, *, answers: bool) -> Facts:
    """Facts with times in place of seconds: other clocks than ours do not count."""
    heard_at = None if known is None else known.heard_at
    said_at = time() if answers or heard_at is None else heard_at
    told: dict[str, Plain] = {
        **facts,
        "answers": answers,
        "heard_at": heard_at,
        "running": tuple(_running(facts.get("running"), said_at)),
    }
    return told


def _running(calls: Plain, said_at: float) -> list[Plain]:
    found: list[Plain] = []
    for call in calls if isinstance(calls, tuple) else ():
        if isinstance(call, tuple) and len(call) == 3 and isinstance(call[2], (int, float)):
            since_at = round(said_at - call[2], 3)
            found.append({"id": call[0], "label": call[1], "since_at": since_at})
    return found
