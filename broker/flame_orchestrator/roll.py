"""The roll of workers: who was heard, when last, and what they said about themselves then."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from flame_broker.clock import elapsed
from flame_broker.facts import MAX_FACTS_BYTES
from flame_broker.messages import Plain

__all__ = ["Roll"]

_REMEMBERED_S: Final = 24 * 3600.0
_MOST_WORKERS: Final = 20_000
_PAGE_BYTES: Final = 1024 * 1024  # a quarter of what a message may hold


class _Heard(NamedTuple):
    at: float
    facts: bytes


class Roll:
    """Remembers workers of a cluster key for a day; whoever leaves by himself is forgotten.

    Every orchestrator hears all heartbeats, so each has the whole roll, in memory alone.

    Args:
        clock: Seconds since some moment, never set back; of the computer by default.
    """

    def __init__(self, clock: Callable[[], float] = elapsed) -> None:
        self._clock = clock
        # In the order in which they were heard last, so that who is to be forgotten stands first.
        self._heard: OrderedDict[str, _Heard] = OrderedDict()

    def hear(self, worker: str, facts: bytes) -> None:
        """A worker has beaten.

        Args:
            worker: Its name.
            facts: What it says about itself, folded; what is too much is not kept.
        """
        kept = facts if len(facts) <= MAX_FACTS_BYTES else b""
        self._heard[worker] = _Heard(self._clock(), kept)
        self._heard.move_to_end(worker)
        if len(self._heard) > _MOST_WORKERS:
            self._heard.popitem(last=False)

    def forget(self, worker: str) -> None:
        """A worker has left."""
        self._heard.pop(worker, None)

    def answer(self, asked: Mapping[str, Any]) -> dict[str, Plain]:
        """The question ``workers``: each with the seconds since it was heard, and its facts.

        They come by name, a page at a time: ``after`` is the last name of the page before, and
        ``worker`` asks for one alone.
        """
        self._forget_old()
        after, only, now = str(asked.get("after", "")), str(asked.get("worker", "")), self._clock()
        page, size, more = list[Plain](), 0, False
        for name, heard in sorted(self._heard.items()):
            if name <= after or only not in ("", name):
                continue
            size += len(name) + len(heard.facts)
            if page and size > _PAGE_BYTES:
                more = True
                break
            page.append((name, round(now - heard.at, 3), heard.facts))
        return {"workers": tuple(page), "more": more}

    def _forget_old(self) -> None:
        oldest = self._clock() - _REMEMBERED_S
        while self._heard and next(iter(self._heard.values())).at < oldest:
            self._heard.popitem(last=False)
