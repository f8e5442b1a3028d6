"""``flame workers``: who runs calls, what they do, and sending them home."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from flame_broker.errors import FlameError
from flame_cli.advice import start_worker
from flame_cli.connecting import asking
from flame_cli.options import ContextName, Json
from flame_cli.tables import Column, show_json, show_record, show_table

if TYPE_CHECKING:
    from flame.inquiry import Facts
    from flame.questions import Questions

__all__ = ["app"]

app = typer.Typer(rich_markup_mode=None)

_COLUMNS = (
    Column("worker"),
    Column("pool"),
    Column("host", spare=5),  # the names of workers begin with it
    Column("slots", right=True),
    Column("busy", right=True),
    Column("gpus", right=True, spare=1),
    Column("started", spare=3),
    Column("python", spare=4),
    Column("connected", spare=6),
    Column("draining", spare=2),
    Column("last_heartbeat", "heartbeat", spare=7),
    Column("silent_since", "silent since"),
    Column("runs"),
)
_ANSWER_S: Final = 1.0
_LEAVE_POLL_S: Final = 0.5
_NAMED: Final = 3  # of the calls that run; more would fill the screen

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
    """List the workers: what they do at this moment, and whose heartbeats have ceased.

    Where an orchestrator runs, it remembers for a day which workers it has heard. Those that do
    not answer now are shown as they were with their last heartbeat, "silent since" then; who left
    by itself is not.

    \b
    Examples:
      flame workers
      flame workers --json
    """
    if context.invoked_subcommand is not None:
        return
    with asking(context_name) as cluster:
        rows = [_row(facts) for facts in cluster.roll_call(timeout_s)]
        empty = f"no worker answered within {timeout_s:g} s: {start_worker(cluster.key_id)}"
    if not json:
        rows = [{**row, "runs": _named(row["running"])} for row in rows]
    show_table(rows, _COLUMNS, as_json=json, empty=empty)


@app.command()
def show(name: Name, context: ContextName = None, json: Json = False) -> None:
    """Show all that one worker says about itself, or said with its last heartbeat.

    \b
    Example:
      flame workers show "$(flame workers | awk 'NR == 2 {print $1}')"
    """
    with asking(context) as cluster:
        row = _row(_find(cluster, name))
    if not json:
        row["running"] = [_in_words(call) for call in row["running"]]
    show_record(row, as_json=json)


@app.command()
def drain(
    name: Name,
    wait: Annotated[bool, typer.Option("--wait", help="Until it has left.")] = False,
    context: ContextName = None,
    json: Json = False,
) -> None:
    """Tell a worker to finish what runs, hand back the rest and leave.

    \b
    Example:
      flame workers drain "$(flame workers | awk 'NR == 2 {print $1}')" --wait
    """
    with asking(context) as cluster:
        silent_since = _row(_find(cluster, name))["silent_since"]
        if silent_since is not None:
            raise FlameError(
                f"{name} does not answer: nothing was heard of it since {silent_since:%F %TZ}, so "
                "it hangs, is cut off, or is gone; see to its machine"
            )
        cluster.drain_worker(name)
        while wait and name in _answers(cluster, name):
            time.sleep(_LEAVE_POLL_S)
    if json:
        show_json({"worker": name, "left": wait})
    else:
        typer.echo(f"{name} {'has left' if wait else 'drains'}")


def _find(cluster: Questions, name: str) -> Facts:
    """The worker of this name, which may be silent."""
    found = {str(facts.get("worker")): facts for facts in cluster.roll_call(_ANSWER_S, name=name)}
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
    row["started"] = _time(row.pop("started_at", None))
    heard = row["last_heartbeat"] = _time(row.pop("heard_at", None))
    row["silent_since"] = None if row.pop("answers") else heard
    row["running"] = [
        {"id": call["id"], "label": call["label"], "since": _time(call["since_at"])}
        for call in row.pop("running")
    ]
    row.pop("clock", None)
    return row


def _time(seconds: object) -> datetime | None:
    return datetime.fromtimestamp(seconds, UTC) if isinstance(seconds, (int, float)) else None


def _named(running: Sequence[Mapping[str, Any]]) -> str:
    """The calls that run, those that have run longest first."""
    names = [f"{call['label']} {call['id']}" for call in running[:_NAMED]]
    more = len(running) - len(names)
    return ", ".join([*names, f"and {more} more"] if more else names)


def _in_words(call: Mapping[str, Any]) -> str:
    return f"{call['label']} {call['id']} since {call['since']:%F %TZ}"
