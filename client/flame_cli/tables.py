"""Lists and records on the screen: a table on a terminal, plain columns in a pipe, or JSON.

What is shown may come from other machines, so control characters never reach the terminal.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from pathlib import PurePath
from typing import Any, Final

import typer

__all__ = ["Column", "json_text", "show_json", "show_record", "show_table"]

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
_NOTHING = "-"
_GAP = "  "


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table.

    Args:
        key: Which value of a row it shows.
        header: What stands above it; the key if not given.
        right: Aligned to the right, as numbers are.
        spare: Left out on a terminal that is too narrow for all; the highest number goes first,
            0 never. A pipe gets every column.
    """

    key: str
    header: str = ""
    right: bool = False
    spare: int = 0

    @property
    def title(self) -> str:
        """What stands above the column."""
        return self.header or self.key


def show_table(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[Column],
    *,
    as_json: bool = False,
    empty: str = "",
) -> None:
    """Print rows.

    Args:
        rows: The values; keys without a column show in JSON only.
        columns: What a table shows, in order.
        as_json: Print a JSON array instead.
        empty: What to say on stderr when there is no row.
    """
    if as_json:
        show_json(list(rows))
    elif not rows:
        typer.echo(empty, err=True, nl=bool(empty))
    else:
        values = [[row.get(column.key) for column in columns] for row in rows]
        (_show_rich if sys.stdout.isatty() else _show_plain)(columns, values)


def show_record(record: Mapping[str, Any], *, as_json: bool = False) -> None:
    """Print one record, a line for each value, or as a JSON object."""
    if as_json:
        show_json(record)
        return
    width = max(map(len, record), default=0)
    for name, value in record.items():
        typer.echo(f"{name:{width}}  {_cell(value)}")


def show_json(value: object) -> None:
    """Print JSON; times are ISO 8601 in UTC, durations are seconds."""
    typer.echo(json_text(value))


def json_text(value: object) -> str:
    """What ``show_json`` prints."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=_jsonable)


def _jsonable(value: object) -> object:
    if isinstance(value, datetime):
        return _utc(value).isoformat().replace("+00:00", "Z")
    if isinstance(value, timedelta):
        return value.total_seconds()
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    for kind, convert in _JSON_FORMS.items():
        if isinstance(value, kind):
            return convert(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


_JSON_FORMS: Final[dict[type, Callable[[Any], object]]] = {
    Enum: lambda value: value.value,
    PurePath: str,
    Mapping: dict,
    set: sorted,
    frozenset: sorted,
}


def _cell(value: object) -> str:
    """A value as one line of text."""
    if value is None or value in ("", (), []):
        return _NOTHING
    if isinstance(value, (list, tuple, set, frozenset)):
        return ", ".join(_cell(one) for one in value)
    for kind, text in _TEXT_FORMS.items():
        if isinstance(value, kind):
            return text(value)
    return _CONTROL.sub(" ", str(value)).strip()


_TEXT_FORMS: Final[dict[type, Callable[[Any], str]]] = {
    bool: lambda value: "yes" if value else "no",
    float: lambda value: f"{value:.4g}",
    datetime: lambda value: _utc(value).strftime("%Y-%m-%d %H:%M:%SZ"),
    timedelta: lambda value: f"{value.total_seconds():.4g} s",
    Enum: lambda value: _cell(value.value),
}


def _utc(moment: datetime) -> datetime:
    """A time without a zone is the local clock's."""
    return moment.astimezone(UTC)


def _show_plain(columns: Sequence[Column], values: Sequence[Sequence[object]]) -> None:
    table = [_titles(columns), *([_cell(value) for value in line] for line in values)]
    widths = _widths(table)
    for line in table:
        aligned = (
            f"{cell:>{width}}" if column.right else f"{cell:<{width}}"
            for column, width, cell in zip(columns, widths, line, strict=True)
        )
        typer.echo(_GAP.join(aligned).rstrip())


def _show_rich(columns: Sequence[Column], values: Sequence[Sequence[object]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    cells = [[_short(value) for value in line] for line in values]
    shown = _those_that_fit(columns, _widths([_titles(columns), *cells]), console.width)
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, len(_GAP), 0, 0))
    for number in shown:
        column = columns[number]
        # Ids and times stay whole; what the last column holds may go on in the next line.
        table.add_column(
            column.title.upper(),
            justify="right" if column.right else "left",
            no_wrap=number != shown[-1],
            overflow="fold",
        )
    for line in cells:
        table.add_row(*(Text(line[number]) for number in shown))
    console.print(table)


def _those_that_fit(columns: Sequence[Column], widths: Sequence[int], room: int) -> list[int]:
    """Numbers of the columns that a terminal shows."""
    shown = list(range(len(columns)))
    for number in sorted(shown, key=lambda number: -columns[number].spare):
        total = sum(widths[one] for one in shown) + len(_GAP) * (len(shown) - 1)
        if total <= room or not columns[number].spare:
            break
        shown.remove(number)
    return shown


def _titles(columns: Sequence[Column]) -> list[str]:
    return [column.title.upper() for column in columns]


def _widths(table: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, cell)) for cell in zip(*table, strict=True)]


def _short(value: object) -> str:
    """A cell for a person: times to the minute, by the local clock."""
    if isinstance(value, datetime):
        return value.astimezone().strftime("%m-%d %H:%M")
    return _cell(value)
