"""``flame logs``: what a call has printed, and what it prints now."""

from __future__ import annotations

import json as encoding
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Final

import typer

from flame_cli.connecting import asking
from flame_cli.options import CallId, ContextName, checked

if TYPE_CHECKING:
    from flame.logs import LogLine

__all__ = ["logs"]

_NOTE: Final = "note"
# All but tabs and colours: a call may print what its reader's terminal must not do.
_CONTROL: Final = re.compile(r"(?!\x1b\[[0-9;]*m)[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def logs(
    call: CallId,
    *,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Go on until the call has ended.")
    ] = False,
    stdout: Annotated[
        bool, typer.Option("--stdout", help="Only what it wrote to standard output.")
    ] = False,
    stderr: Annotated[
        bool, typer.Option("--stderr", help="Only what it wrote to standard error.")
    ] = False,
    timestamps: Annotated[
        bool, typer.Option("--timestamps", help="Begin each line with its time.")
    ] = False,
    context: ContextName = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object for each line.")
    ] = False,
) -> None:
    """Print what a call has printed, also one of another program or machine.

    Both its streams come to standard output. Lines that begin with … are no part of them: they say
    what is missing, or that the call was started again.

    \b
    Examples:
      flame logs "$(flame ps --limit 1 | awk 'NR == 2 {print $1}')"
      flame logs "$(flame ps --limit 1 | awk 'NR == 2 {print $1}')" -f --timestamps
    """
    hidden = {"stderr"} if stdout and not stderr else {"stdout"} if stderr and not stdout else set()
    printed = False
    with asking(context) as cluster:
        kept = cluster.log(checked(call), follow=follow)
        wanted = (line for line in kept if line.stream not in hidden)
        shown = map(_in_json, wanted) if json else _in_words(wanted, timestamps=timestamps)
        for text in shown:
            printed = True
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()
    if not printed and not json:
        stream = "" if len(hidden) != 1 else " to stdout" if "stderr" in hidden else " to stderr"
        typer.echo(f"nothing is kept of what {call} has printed{stream}", err=True)


def _in_json(line: LogLine) -> str:
    return encoding.dumps({**asdict(line), "at": _time(line)})


def _in_words(lines: Iterable[LogLine], *, timestamps: bool) -> Iterator[str]:
    """The lines as they were printed, and a word where another run of the call begins."""
    for_people = sys.stdout.isatty()
    before: tuple[int, str, int] | None = None
    for line in lines:
        run = line.attempt, line.worker, line.run
        start = f"{_time(line)} " if timestamps else ""
        if run != before and (before is not None or line.attempt > 1):
            yield f"{start}… attempt {line.attempt} on {line.worker}"
        before = run
        text = _CONTROL.sub("", line.text) if for_people else line.text
        yield f"{start}… {text}" if line.stream == _NOTE else f"{start}{text}"


def _time(line: LogLine) -> str:
    return f"{datetime.fromtimestamp(line.at, UTC):%Y-%m-%dT%H:%M:%S.%f}"[:-3] + "Z"
