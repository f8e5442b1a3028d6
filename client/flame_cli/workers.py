"""``flame workers``: who runs calls, what they do, and sending them home."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from flame_broker.errors import FlameError
from flame_cli.advice import start_worker
from flame_cli.connecting import asking
from flame_cli.options import ContextName, Json
from flame_cli.tables import Column, show_record, show_table

if TYPE_CHECKING:
    from flame.inquiry import Facts
    from flame.questions import Questions

__all__ = ["app"]

app = typer.Typer(rich_markup_mode=None)

_COLUMNS = (
    Column("worker"),
    Column("pool"),
    Column("host", spare=3),  # the names of workers begin with it
    Column("slots", right=True),
    Column("busy", right=True),
    Column("gpus", right=True, spare=1),
    Column("started"),
    Column("python", spare=2),
    Column("connected", spare=4),
    Column("draining"),
)
_ANSWER_S: Final = 1.0
_LEAVE_POLL_S: Final = 0.5

Name = Annotated[str, typer.Argument(help="The worker, as `flame workers` lists it.")]


@app.callback(invoke_without_command=True)
def workers(
    context: typer.Context,
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=0.1, help="Seconds to wait for answers.")
    ] = _ANSWER_S,
    context_name: ContextName = None,
    json: Json = False,
) -> None:
    """List the workers that answer, with what they do at this moment.

    \b
    Examples:
      flame workers
      flame workers --json
    """
    if context.invoked_subcommand is not None:
        return
    with asking(context_name) as cluster:
        rows = [_row(facts) for facts in cluster.workers(timeout_s)]
        empty = f"no worker answered within {timeout_s:g} s: {start_worker(cluster.key_id)}"
    show_table(rows, _COLUMNS, as_json=json, empty=empty)


@app.command()
def show(name: Name, context: ContextName = None, json: Json = False) -> None:
    """Show all that one worker says about itself.

    \b
    Example:
      flame workers show "$(flame workers | awk 'NR == 2 {print $1}')"
    """
    with asking(context) as cluster:
        row = _row(_find(cluster, name))
    show_record(row, as_json=json)


@app.command()
def drain(
    name: Name,
    wait: Annotated[bool, typer.Option("--wait", help="Until it has left.")] = False,
    context: ContextName = None,
) -> None:
    """Tell a worker to finish what runs, hand back the rest and leave.

    \b
    Example:
      flame workers drain "$(flame workers | awk 'NR == 2 {print $1}')" --wait
    """
    with asking(context) as cluster:
        _find(cluster, name)
        cluster.drain_worker(name)
        while wait and _ask(cluster, name) is not None:
            time.sleep(_LEAVE_POLL_S)
    typer.echo(f"{name} {'has left' if wait else 'drains'}")


def _ask(cluster: Questions, name: str) -> Facts | None:
    return _answers(cluster, name).get(name)


def _find(cluster: Questions, name: str) -> Facts:
    found = _answers(cluster, name)
    if name in found:
        return found[name]
    near = get_close_matches(name, found, n=1)
    hint = f"; did you mean {near[0]}?" if near else "; `flame workers` lists those that do"
    raise FlameError(f"no worker {name} answered{hint}")


def _answers(cluster: Questions, name: str) -> dict[str, Facts]:
    """The answers by worker; with the one that is looked for, they may be incomplete."""

    def there(answers: Sequence[Facts]) -> bool:
        return any(facts.get("worker") == name for facts in answers)

    return {str(facts.get("worker")): facts for facts in cluster.workers(_ANSWER_S, enough=there)}


def _row(facts: Facts) -> dict[str, Any]:
    """A worker's facts with times in place of seconds since 1970."""
    row: dict[str, Any] = dict(facts)
    started_at = row.pop("started_at", None)
    if isinstance(started_at, (int, float)):
        row["started"] = datetime.fromtimestamp(started_at, UTC)
    row.pop("clock", None)
    return row
