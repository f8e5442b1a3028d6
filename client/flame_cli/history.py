"""``flame ps``, ``show``, ``result``, ``wait`` and ``cancel``: what becomes of calls."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from flame_broker.errors import CallError
from flame_cli.connecting import asking, following
from flame_cli.exits import DONE, WORK_FAILED
from flame_cli.options import CallId, ContextName, Json, checked
from flame_cli.outcome import outcome_of, value_of
from flame_cli.tables import Column, json_text, show_json, show_record, show_table
from flame_cli.waiting import wait_for

if TYPE_CHECKING:
    import flame

__all__ = ["cancel", "ps", "result", "show", "wait"]

_COLUMNS: Final = (
    Column("id"),
    Column("label"),
    Column("state"),
    Column("pool"),
    Column("queued"),
    Column("ended"),
    Column("worker"),
    Column("reason"),
)
_TIMES: Final = {
    "queued_at": "queued",
    "due_at": "due",
    "started_at": "started",
    "ended_at": "ended",
    "expires_at": "expires",
}
_CANCELLED: Final = (Column("id"), Column("label"), Column("was"), Column("cancelled"))
_REASON_LENGTH: Final = 60


def ps(
    state: Annotated[
        str,
        typer.Option(
            help="Only waiting, queued, running (for five seconds or more), succeeded, failed, "
            "cancelled, expired or quarantined ones."
        ),
    ] = "",
    label: Annotated[str, typer.Option(help="Only calls of the service with this name.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="At most so many, the newest first.")] = 50,
    context: ContextName = None,
    json: Json = False,
) -> None:
    """List calls, the newest first, with what became of them.

    With no broker configured, those of all programs of this FLAME_HOME.

    \b
    Examples:
      flame ps
      flame ps --state failed
      flame ps --label train --limit 500 --json
    """
    with asking(context) as cluster:
        rows = [_row(facts) for facts in cluster.calls(state=state, label=label, limit=limit)]
    if not json:
        rows = [{**row, "reason": _short(row.get("reason"))} for row in rows]
    show_table(rows, _COLUMNS, as_json=json, empty="no such calls in the history")


def show(call: CallId, context: ContextName = None, json: Json = False) -> None:
    """Show all that is known of a call.

    \b
    Example:
      flame show "$(flame ps --limit 1 | awk 'NR == 2 {print $1}')"
    """
    with asking(context) as cluster:
        facts = cluster.story(checked(call))
    if facts is None:
        raise CallError(f"the history knows no call {call}; `flame ps` lists those it knows", call)
    show_record(_row(facts), as_json=json)


def result(
    call: CallId,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write it there; bytes as they are.")
    ] = None,
    timeout_s: Annotated[
        float | None, typer.Option("--timeout", min=0, help="Wait so many seconds at most.")
    ] = None,
    context: ContextName = None,
    json: Json = False,
) -> None:
    """Print what a call returned, waited for; what it raised is raised here.

    With --json: its id, label and state; its "value" where it is plain data, else its "repr" and
    "type"; and its "error", with type and message. The exit code is 1 if it did not succeed.

    \b
    Examples:
      flame result "$(flame ps --limit 1 | awk 'NR == 2 {print $1}')" -o result.txt
      flame result "$(flame ps --limit 1 | awk 'NR == 2 {print $1}')" --json
    """
    import flame

    succeeded = True
    with following(context) as client:
        future = flame.attach(checked(call), client=client)
        if json:
            future.wait(timeout_s)
            succeeded = future.went_well()
            found = outcome_of(future, client.story(call))
            found |= value_of(future.result(0)) if succeeded else {}
            value: Any = f"{json_text(found)}\n"
        else:
            value = _outcome(future, timeout_s)
    if output is None:
        typer.echo(value if isinstance(value, str) else repr(value), nl=not json)
    elif isinstance(value, bytes):
        output.write_bytes(value)
    else:
        output.write_text(value if isinstance(value, str) else f"{value!r}\n")
    sys.exit(DONE if succeeded else WORK_FAILED)


def wait(
    calls: Annotated[
        list[str], typer.Argument(metavar="ID...", help="Calls, as `flame ps` lists.")
    ],
    timeout_s: Annotated[
        float | None, typer.Option("--timeout", min=0, help="Seconds for all together.")
    ] = None,
    context: ContextName = None,
    json: Json = False,
) -> None:
    """Wait until calls have ended; the exit code is 1 if one of them did not succeed.

    On a terminal it shows which are not over yet. With --json it prints them all at the end: id,
    label, state, and the error with type and message; `flame result` has what they returned.

    \b
    Examples:
      flame wait "$(flame ps --limit 1 | awk 'NR == 2 {print $1}')" --timeout 60
      flame wait "$(flame ps --limit 1 | awk 'NR == 2 {print $1}')" --json
    """
    import flame

    with following(context) as client:
        futures = [flame.attach(checked(call), client=client) for call in calls]
        late = wait_for(futures, timeout_s)
        failed = [future for future in futures if not future.went_well()]
        if json:
            show_json([outcome_of(future, client.story(future.id)) for future in futures])
    if late:
        raise CallError(f"{late[0].id} has not ended after {timeout_s:g} s", late[0].id)
    for future in failed:
        typer.echo(
            f"{future.id} ({future.label}) did not succeed: flame show {future.id}", err=True
        )
    sys.exit(WORK_FAILED if failed else DONE)


def cancel(
    calls: Annotated[
        list[str], typer.Argument(metavar="ID...", help="Calls, as `flame ps` lists.")
    ],
    context: ContextName = None,
    json: Json = False,
) -> None:
    """Cancel calls: those that wait never start, those that run are stopped.

    The exit code is 1 if one of them had ended before.

    \b
    Example:
      flame cancel "$(flame ps --state waiting --limit 1 | awk 'NR == 2 {print $1}')"
    """
    import flame

    rows = []
    with following(context) as client:
        for call in calls:
            future = flame.attach(checked(call), client=client)
            story = client.story(call) or {}
            before = str(story.get("state", ""))
            ended = story.get("ended_at") is not None or not _cancelled(future)
            rows.append({"id": call, "label": future.label, "was": before, "cancelled": not ended})
    if json:
        show_table(rows, _CANCELLED, as_json=True, empty="")
    else:
        for row in rows:
            what = "is cancelled" if row["cancelled"] else f"had ended before: {row['was']}"
            typer.echo(f"{row['id']} ({row['label']}) {what}")
    sys.exit(DONE if all(row["cancelled"] for row in rows) else WORK_FAILED)


def _cancelled(future: flame.ObjectFuture[Any]) -> bool:
    """Whether it could be cancelled; not if it has ended.

    Raises:
        CallError: It is out of reach.
    """
    done = future.cancel()
    if not done and not future.done():
        raise CallError(
            f"{future.id} ({future.label}) is in the embedded cluster of a program that runs, "
            "and only that program reaches it: cancel the call there, or end the program",
            future.id,
        )
    return done


def _outcome(future: flame.ObjectFuture[Any], timeout_s: float | None) -> Any:
    try:
        return future.result(timeout_s)
    except TimeoutError:
        raise CallError(
            f"{future.id} ({future.label}) has not ended after {timeout_s:g} s", future.id
        ) from None


def _row(facts: Mapping[str, Any]) -> dict[str, Any]:
    """A call's facts with times in place of seconds since 1970."""
    row = {_TIMES.get(name, name): value for name, value in facts.items()}
    for name in _TIMES.values():
        if isinstance(row.get(name), (int, float)):
            row[name] = datetime.fromtimestamp(row[name], UTC)
    return row


def _short(reason: object) -> str:
    first = str(reason or "").partition("\n")[0]
    return first if len(first) <= _REASON_LENGTH else first[: _REASON_LENGTH - 1] + "…"
