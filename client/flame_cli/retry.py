"""``flame retry``: ended calls run again."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Final

import typer

from flame_broker.config import load
from flame_broker.errors import CallError, ConfigError
from flame_broker.messages import parse_call_id
from flame_cli.connecting import asking
from flame_cli.exits import DONE, WORK_FAILED
from flame_cli.options import ContextName, Json
from flame_cli.tables import Column, show_table

__all__ = ["retry"]

_COLUMNS: Final = (Column("id"), Column("retry"), Column("problem"))


def retry(
    calls: Annotated[
        list[str], typer.Argument(metavar="ID...", help="Calls, as `flame ps` lists.")
    ],
    context: ContextName = None,
    json: Json = False,
) -> None:
    """Run ended calls again, each as a new call, and print the new ids.

    The history has what they were called with. They start afresh, with the options of their
    service, but without the queue timeout of calls that the orchestrator did not keep. The exit
    code is 1 if one was refused: it has not ended, or what it was called with is not known.

    \b
    Examples:
      flame retry "$(flame ps --state failed --limit 1 | awk 'NR == 2 {print $1}')"
      flame ps --state failed --json | jq -r '.[].id' | xargs flame retry
    """
    for call in calls:
        _check(call)
    if load(context=context).broker_url is None:
        raise ConfigError(
            "no broker is configured, and an embedded cluster would end with this command: set "
            "FLAME_BROKER_URL, name a --context, or use client.retry(id) in a program"
        )
    rows: list[dict[str, Any]] = []
    with asking(context) as cluster:
        for call in calls:
            try:
                rows.append({"id": call, "retry": cluster.retry(call), "problem": None})
            except CallError as refusal:
                rows.append({"id": call, "retry": None, "problem": str(refusal)})
    if json:
        show_table(rows, _COLUMNS, as_json=True)
    else:
        for row in rows:
            typer.echo(row["retry"] or f"flame: {row['problem']}", err=row["retry"] is None)
    sys.exit(DONE if all(row["retry"] for row in rows) else WORK_FAILED)


def _check(call: str) -> None:
    try:
        parse_call_id(call)
    except ValueError as problem:
        raise typer.BadParameter(str(problem)) from problem
