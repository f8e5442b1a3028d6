"""The ``flame`` command: finds the sub-command, runs it, turns errors into exit codes.

Only the command that is run gets imported; the others stand in the help as a name and a summary.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from flame_broker.errors import FlameError
from flame_cli.commands import COMMANDS
from flame_cli.completion import COMPLETE_VARIABLE, PROGRAM
from flame_cli.exits import exit_code

__all__ = ["build", "main"]

_YAML_ENDINGS = (".yaml", ".yml")
# What the completion scripts of bash, and of zsh and fish, put the typed line into.
_COMPLETION_LINES = ("COMP_WORDS", "_TYPER_COMPLETE_ARGS")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    Args:
        arguments: Words after ``flame``, ``sys.argv`` if not given.
    """
    words = _with_run(list(sys.argv[1:] if arguments is None else arguments))
    # Python ends with a search for cycles in all that was imported, a fifth of what `ps` takes.
    atexit.register(gc.freeze)
    try:
        typer.main.get_command(build(words))(args=words, prog_name=PROGRAM)
    except FlameError as error:
        typer.secho(f"{PROGRAM}: error: ", fg="red", bold=True, err=True, nl=False)
        typer.echo(str(error), err=True)
        sys.exit(exit_code(error))
    sys.exit()


def build(words: Sequence[str]) -> typer.Typer:
    """The application, in which the command that ``words`` ask for is the real one."""
    app = typer.Typer(
        name=PROGRAM,
        # Typer can complete only when it also adds --install-completion; keep that out of sight.
        add_completion=COMPLETE_VARIABLE in os.environ,
        no_args_is_help=True,
        rich_markup_mode=None,
        # A pretty traceback would be able to show a local variable that holds a secret.
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_frame)
    wanted = _command_word(words)
    for name, command in COMMANDS.items():
        if name == wanted:
            command.add_to(app, name)
        else:
            command.add_stub_to(app, name)
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"{PROGRAM} {version('flame')}")
        raise typer.Exit


def _frame(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Run Python calls and Runnables on workers behind a message queue.

    \b
    Examples:
      flame run FILE.yaml     run the Runnable of a file on a worker
      flame FILE.yaml         the same, in short
      flame ping              how far away the broker and a worker are
      flame doctor            what is wrong, and what to do
      flame config            what is configured, and where it was found
      flame config key        a new key for a cluster
    """


def _with_run(words: list[str]) -> list[str]:
    """``flame FILE.yaml`` is short for ``flame run FILE.yaml``."""
    known = any(word in COMMANDS for word in words[:1])
    if not known and any(word.endswith(_YAML_ENDINGS) for word in words):
        return ["run", *words]
    return words


def _command_word(words: Sequence[str]) -> str | None:
    """The word that names the command; while completing, it stands in the typed line."""
    if COMPLETE_VARIABLE in os.environ:
        line = next((os.environ[name] for name in _COMPLETION_LINES if name in os.environ), "")
        words = line.split()[1:]
    return next((word for word in words if not word.startswith("-")), None)


if __name__ == "__main__":
    main()
