"""Options that several commands take alike."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["ContextName", "Json"]

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

ContextName = Annotated[
    str | None, typer.Option("--context", help="A context of the settings file.")
]
