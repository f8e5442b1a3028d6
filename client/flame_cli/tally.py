"""What became of messages that somebody wanted to clear away."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import typer

from flame_cli.aside import Aside
from flame_cli.exits import DONE, WORK_FAILED
from flame_cli.tables import Column, show_table

__all__ = ["Tally", "first_and_last"]

_COLUMNS: Final = (
    Column("id"),
    Column("outcome"),
    Column("pool", spare=2),
    Column("holds"),
    Column("calls", spare=1),
    Column("to"),
)


class Tally:
    """Counts what was done, shows it, and knows the exit code.

    Args:
        outcome: What a success is called: ``dropped``, ``replayed``.
        unknown: By the words that named no message, what is wrong with them.
    """

    def __init__(self, outcome: str, unknown: Mapping[str, str]) -> None:
        self._outcome = outcome
        self._done: list[dict[str, Any]] = []
        self._failed: list[dict[str, Any]] = [
            {"id": word, "outcome": "not found", "problem": problem}
            for word, problem in unknown.items()
        ]
        self._told: Counter[str] = Counter()

    @property
    def code(self) -> int:
        """The exit code."""
        return WORK_FAILED if self._failed else DONE

    def done(self, aside: Aside, queue: str = "") -> None:
        """It went well.

        Args:
            aside: The message.
            queue: Where its calls went, if anywhere.
        """
        self._told[aside.digest] += 1
        self._done.append({**aside.row(), "outcome": self._outcome, "to": queue or None})

    def refuse(self, aside: Aside, problem: str) -> None:
        """It stays where it is."""
        self._told[aside.digest] += 1
        self._failed.append({**aside.row(), "outcome": "refused", "problem": problem})

    @contextmanager
    def shown(self, wanted: Sequence[Aside], *, as_json: bool) -> Iterator[None]:
        """Show at the end what was done, also when an error ends the work half-way.

        Args:
            wanted: The messages that are worked on.
            as_json: Print a JSON array.
        """
        try:
            yield
            self._count_those_gone(wanted)
        finally:
            self._show(as_json=as_json)

    def _count_those_gone(self, wanted: Sequence[Aside]) -> None:
        missing = Counter(aside.digest for aside in wanted) - self._told
        for aside in {aside.digest: aside for aside in wanted if missing[aside.digest]}.values():
            problem = "it is no longer there: somebody else took it in hand meanwhile"
            self._failed.append({**aside.row(), "outcome": "gone", "problem": problem})

    def _show(self, *, as_json: bool) -> None:
        if as_json:
            show_table([*self._done, *self._failed], _COLUMNS, as_json=True)
            return
        rows = [{**row, "calls": first_and_last(row["calls"])} for row in self._done]
        if rows:
            show_table(rows, _COLUMNS)
        for row in self._failed:
            where = " and stays" if row["outcome"] == "refused" else ""
            typer.echo(f"{row['id']}: {row['outcome']}{where}: {row['problem']}", err=True)


def first_and_last(calls: Sequence[str]) -> str:
    """Call ids in the room of two.

    >>> first_and_last(["k3j9-1", "k3j9-2", "k3j9-3"])
    'k3j9-1 … k3j9-3'
    """
    return " … ".join([*calls[:1], *calls[1:][-1:]])
