"""Options that several commands take alike."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["CallId", "ContextName", "Json", "checked"]

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

ContextName = Annotated[
    str | None, typer.Option("--context", help="A context of the settings file.")
]

CallId = Annotated[str, typer.Argument(metavar="ID", help="The call, as `flame ps` lists it.")]


def checked(call: str) -> str:
    """The id itself, if it is one.

    Raises:
        typer.BadParameter: It is none; the command ends with its usage.
    """
    from flame_broker.messages import parse_call_id

    try:
        parse_call_id(call)
    except ValueError as problem:
        raise typer.BadParameter(str(problem)) from problem
    return call
