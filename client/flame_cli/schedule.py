"""``flame schedule``: calls that are made again and again; looked at, paused, run, removed."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Final

import typer

from flame_cli.connecting import asking
from flame_cli.options import ContextName, Json
from flame_cli.tables import Column, show_record, show_table

__all__ = ["app"]

app = typer.Typer(rich_markup_mode=None)

_COLUMNS: Final = (
    Column("name"),
    Column("state"),
    Column("cron"),
    Column("timezone", spare=3),
    Column("next"),
    Column("last", spare=1),
    Column("fired", spare=2, right=True),
    Column("label"),
)
_TIMES: Final = {
    "next_at": "next",
    "last_at": "last",
    "skipped_at": "skipped",
    "created_at": "created",
    "due_at": "due",
    "ended_at": "ended",
}

Name = Annotated[str, typer.Argument(metavar="NAME", help="As `flame schedule` lists it.")]


@app.callback(invoke_without_command=True)
def schedule(context: typer.Context, context_name: ContextName = None, json: Json = False) -> None:
    """List the schedules: calls that the orchestrator makes again and again.

    A program makes one with `service.schedule("0 3 * * *", name="nightly")`.

    \b
    Examples:
      flame schedule
      flame schedule --json
    """
    if context.invoked_subcommand is None:
        list_(context=context_name, json=json)


@app.command("list")
def list_(context: ContextName = None, json: Json = False) -> None:
    """List the schedules, by name, with when each is due.

    \b
    Example:
      flame schedule list --json
    """
    with asking(context) as cluster:
        rows = [_row(facts) for facts in cluster.schedules()]
    show_table(rows, _COLUMNS, as_json=json, empty="there are no schedules")


@app.command()
def show(name: Name, context: ContextName = None, json: Json = False) -> None:
    """Show all that is known of one: its next times, its latest calls, what it skipped and why.

    \b
    Example:
      flame schedule show nightly
    """
    with asking(context) as cluster:
        record = _row(cluster.schedule(name))
    record["ahead"] = [datetime.fromtimestamp(at, UTC) for at in record.get("ahead", ())]
    record["calls"] = [_row(call) for call in record.get("calls", ())]
    if not json:
        record["calls"] = [f"{call['id']} {call['state']}" for call in record["calls"]]
    show_record(record, as_json=json)


@app.command()
def pause(name: Name, context: ContextName = None) -> None:
    """Make no more calls until it is resumed; those that were made go on.

    \b
    Example:
      flame schedule pause nightly
    """
    with asking(context) as cluster:
        cluster.pause_schedule(name)
    typer.echo(f"{name} is paused")


@app.command()
def resume(name: Name, context: ContextName = None) -> None:
    """Go on with the next time from now; what was due meanwhile is not caught up on.

    \b
    Example:
      flame schedule resume nightly
    """
    with asking(context) as cluster:
        cluster.resume_schedule(name)
        due = _row(cluster.schedule(name))["next"]
    typer.echo(f"{name} goes on, next {due:%Y-%m-%d %H:%M:%SZ}" if due else f"{name} has no time")


@app.command()
def run(name: Name, context: ContextName = None) -> None:
    """Make a call now, besides those on time, and print its id.

    \b
    Example:
      flame result "$(flame schedule run nightly)"
    """
    with asking(context) as cluster:
        typer.echo(cluster.run_schedule(name))


@app.command()
def remove(name: Name, context: ContextName = None) -> None:
    """Forget a schedule; the calls that it has made go on.

    \b
    Example:
      flame schedule remove nightly
    """
    with asking(context) as cluster:
        cluster.remove_schedule(name)
    typer.echo(f"{name} is removed")


def _row(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts with times in place of seconds since 1970."""
    row = {_TIMES.get(name, name): value for name, value in facts.items()}
    for name in _TIMES.values():
        if isinstance(row.get(name), (int, float)):
            row[name] = datetime.fromtimestamp(row[name], UTC)
    return row
