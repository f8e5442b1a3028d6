"""``flame completion``: what a shell needs to complete commands and options."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

__all__ = ["COMPLETE_VARIABLE", "PROGRAM", "Shell", "completion"]

PROGRAM = "flame"
COMPLETE_VARIABLE = "_FLAME_COMPLETE"
"""Set by the printed script when the shell asks for completions."""


class Shell(StrEnum):
    """Shells that a script can be printed for."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def completion(shell: Annotated[Shell, typer.Argument(help="The shell to complete in.")]) -> None:
    """Print a shell completion script.

    \b
    Examples:
      eval "$(flame completion bash)"
      flame completion zsh > "${fpath[1]}/_flame"
      flame completion fish > ~/.config/fish/completions/flame.fish
    """
    # Typer documents only --show-completion, which prints just this but wants to detect the shell.
    from typer.completion import get_completion_script  # type: ignore[attr-defined]

    script = get_completion_script(
        prog_name=PROGRAM, complete_var=COMPLETE_VARIABLE, shell=shell.value
    )
    typer.echo(script)
