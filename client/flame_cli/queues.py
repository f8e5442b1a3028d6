"""``flame queues``: how much waits, and where."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from flame_cli.connecting import asking
from flame_cli.options import ContextName, Json
from flame_cli.pools import pools_with_workers
from flame_cli.tables import Column, show_table

__all__ = ["queues"]

_COLUMNS = (
    Column("pool"),
    Column("kind"),
    Column("resources", "class"),
    Column("priority"),
    Column("messages", right=True),
    Column("name", "queue"),
)


def queues(
    pool: Annotated[
        list[str] | None,
        typer.Option(help="A pool, may be repeated; by default all that have workers."),
    ] = None,
    context: ContextName = None,
    json: Json = False,
) -> None:
    """Show how many messages wait in the queues; one message holds up to 256 calls.

    What a worker has taken is not counted. Calls wait by resource class and priority; "suspects"
    are run alone because their worker was lost, "dead" nobody can run, "parked" needs another key
    or version, "ledger", "custody" and "logs" are for the orchestrator, which keeps the history,
    calls that need time, and what calls print; "replies" is this command's own.

    \b
    Examples:
      flame queues
      flame queues --pool default --json
    """
    with asking(context) as cluster:
        rows = [asdict(depth) for depth in cluster.queues(pool or pools_with_workers(cluster))]
    show_table(rows, _COLUMNS, as_json=json)
