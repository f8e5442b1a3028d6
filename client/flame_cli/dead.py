"""``flame dead``: messages that were set aside, to be looked at, sent again or dropped."""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from flame_broker.errors import FlameError, ResourceError
from flame_cli.options import ContextName, Json
from flame_cli.tables import Column, show_record, show_table

if TYPE_CHECKING:
    from flame_cli.aside import Aside
    from flame_cli.replay import Edits

__all__ = ["app"]

app = typer.Typer(rich_markup_mode=None)

_COLUMNS: Final = (
    Column("id"),
    Column("pool", spare=2),
    Column("queue"),
    Column("since", spare=1),
    Column("holds"),
    Column("calls", spare=3),
    Column("reason"),
)
_LIMIT: Final = 50

Pools = Annotated[
    list[str] | None,
    typer.Option(
        "--pool", help="A pool, may be repeated; by default `default` and all that have workers."
    ),
]
Limit = Annotated[int, typer.Option(min=1, help="At most so many, the oldest of each queue first.")]
Ids = Annotated[
    list[str] | None,
    typer.Argument(metavar="ID...", help="Messages, as `flame dead` lists them."),
]
All = Annotated[bool, typer.Option("--all", help="All that are set aside in these pools.")]


@app.callback(invoke_without_command=True)
def dead(
    context: typer.Context,
    pool: Pools = None,
    limit: Limit = _LIMIT,
    context_name: ContextName = None,
    json: Json = False,
) -> None:
    """List the messages that workers set aside, with the reasons.

    "dead" is what nobody can run: malformed, wrongly signed, or quarantined after its worker was
    lost three times. "parked" is what another worker might read: an unknown key, a newer version.
    Nothing is unpickled, and what is looked at stays where it is.

    \b
    Examples:
      flame dead
      flame dead --pool default --json
    """
    if context.invoked_subcommand is None:
        list_(pool=pool, limit=limit, context=context_name, json=json)


@app.command("list")
def list_(
    pool: Pools = None, limit: Limit = _LIMIT, context: ContextName = None, json: Json = False
) -> None:
    """List the messages that were set aside, with the reasons.

    \b
    Examples:
      flame dead list
      flame dead list --pool default --limit 500 --json
    """
    from flame_cli.scene import Scene
    from flame_cli.tally import first_and_last

    scene = Scene.of(context, pool)
    found = scene.survey(limit)
    rows = [aside.row() for aside in found.asides]
    hidden = found.lying - len(rows)
    if not json:
        rows = [{**row, "calls": first_and_last(row["calls"])} for row in rows]
    show_table(rows, _COLUMNS, as_json=json, empty=f"nothing is set aside in {scene.place}")
    if hidden > 0:
        typer.echo(f"{hidden} more lie there: --limit {found.lying} shows all", err=True)


@app.command()
def show(
    message: Annotated[str, typer.Argument(metavar="ID", help="As `flame dead` lists it.")],
    pool: Pools = None,
    context: ContextName = None,
    json: Json = False,
) -> None:
    """Show all that is known of one message: the reason, its circumstances, sizes.

    \b
    Example:
      flame dead show "$(flame dead | awk 'NR == 2 {print $1}')"
    """
    from flame_cli.scene import Scene

    scene = Scene.of(context, pool)
    choice = scene.survey().find([message])
    if choice.problems:
        raise FlameError(
            f"{choice.problems[message]}; `flame dead list` shows those in {scene.place}, --pool "
            "looks elsewhere"
        )
    record = {**choice.asides[0].record(), "copies": len(choice.asides)}
    if not json and "arguments" in record:
        record["arguments"] = [_sizes(sizes) for sizes in record["arguments"]]
    show_record(record, as_json=json)


@app.command()
def replay(  # noqa: PLR0913, PLR0917  # one parameter an option
    messages: Ids = None,
    everything: All = False,
    timeout_s: Annotated[
        float | None, typer.Option("--timeout", min=0, help="Seconds a call may run; 0: any.")
    ] = None,
    queue_timeout_s: Annotated[
        float | None, typer.Option("--queue-timeout", min=0, help="Seconds it may wait from now.")
    ] = None,
    resources: Annotated[
        str | None, typer.Option(help="What a call needs: c2-m4-g1, or cpu=2,mem=4g,gpu=1.")
    ] = None,
    mem: Annotated[str | None, typer.Option(help="The memory it needs, such as 4g.")] = None,
    pool: Pools = None,
    context: ContextName = None,
    json: Json = False,
) -> None:
    """Send calls again to their own pool, then take them off.

    They start afresh: without strikes, and without the queue timeout that they had. A message is
    taken off when the broker has confirmed the new one, so a call is never lost, and sent twice at
    most. What cannot be read under the keys here, or is dead and was not quarantined, stays.

    \b
    Examples:
      flame dead replay "$(flame dead | awk 'NR == 2 {print $1}')" --mem 8g
      flame dead replay --all --timeout 600
    """
    _check_choice(messages, everything=everything)
    edits = _edits(timeout_s, queue_timeout_s, resources, mem)
    from flame_cli.clearing import replay as send_again
    from flame_cli.scene import Scene
    from flame_cli.tally import Tally

    scene = Scene.of(context, pool)
    choice = scene.choose(messages)
    tally = Tally("replayed", choice.problems)
    good = []
    for aside in choice.asides:
        problem = _refusal(aside, edits)
        if problem:
            tally.refuse(aside, problem)
        else:
            good.append(aside)
    with tally.shown(good, as_json=json):
        if good:
            asyncio.run(send_again(scene.url, scene.keyring, good, edits, tally.done, tally.refuse))
    raise typer.Exit(tally.code)


@app.command()
def drop(
    messages: Ids = None,
    everything: All = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    pool: Pools = None,
    context: ContextName = None,
    json: Json = False,
) -> None:
    """Delete messages for good; asks before.

    \b
    Examples:
      flame dead drop "$(flame dead | awk 'NR == 2 {print $1}')"
      flame dead drop --all --pool default --yes
    """
    _check_choice(messages, everything=everything)
    if not (yes or sys.stdin.isatty()):
        raise typer.BadParameter("nobody can be asked here: --yes drops without a question")
    from flame_cli.clearing import drop as take_off
    from flame_cli.scene import Scene
    from flame_cli.tally import Tally

    scene = Scene.of(context, pool)
    choice = scene.choose(messages)
    tally = Tally("dropped", choice.problems)
    if choice.asides and not yes:
        _ask(choice.asides)
    with tally.shown(choice.asides, as_json=json):
        if choice.asides:
            asyncio.run(take_off(scene.url, choice.asides, tally.done))
    raise typer.Exit(tally.code)


def _check_choice(messages: Sequence[str] | None, *, everything: bool) -> None:
    if everything and messages:
        raise typer.BadParameter("name messages or say --all, not both")
    if not (everything or messages):
        raise typer.BadParameter("which messages? name them as `flame dead` lists them, or --all")


def _edits(
    timeout_s: float | None, queue_timeout_s: float | None, resources: str | None, mem: str | None
) -> Edits:
    from flame_cli.replay import Edits

    for name, seconds in (("--timeout", timeout_s), ("--queue-timeout", queue_timeout_s)):
        if seconds is not None and not math.isfinite(seconds):
            raise typer.BadParameter(f"{name} {seconds}: expected a number of seconds")
    try:
        return Edits.parse(
            timeout_s=timeout_s, queue_timeout_s=queue_timeout_s, resources=resources, mem=mem
        )
    except ResourceError as problem:
        raise typer.BadParameter(str(problem)) from problem


def _refusal(aside: Aside, edits: Edits) -> str:
    """Why a message cannot be sent again; ``""`` if it can."""
    from flame_cli.replay import renewed

    if aside.problem or aside.frame is None:
        return aside.problem
    try:
        renewed(aside.frame, aside.shelf, edits)
    except ResourceError as problem:
        return f"{problem}; --resources names others"
    return ""


def _ask(asides: Sequence[Aside]) -> None:
    """Raise unless somebody at the terminal agrees."""
    for aside in asides[:_LIMIT]:
        typer.echo(f"  {aside.id}  {aside.shelf.pool}  {aside.summary}", err=True)
    if len(asides) > _LIMIT:
        typer.echo(f"  … and {len(asides) - _LIMIT} more", err=True)
    typer.confirm(f"Delete {_count(asides)} for good?", abort=True, err=True)


def _count(asides: Sequence[Aside]) -> str:
    return f"{len(asides)} message{'s' * (len(asides) > 1)}"


def _sizes(sizes: Mapping[str, Any]) -> str:
    text = f"{sizes['call']}: {sizes['payload_bytes']} bytes"
    if sizes["objects"]:
        text += f" and {sizes['objects']} stored objects of {sizes['object_bytes']} bytes"
    return text
