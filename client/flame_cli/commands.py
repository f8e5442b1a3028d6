"""The table of commands: one line each, and nothing is imported before it is used.

``flame --help`` must answer in a quarter of a second, so the frame knows of each command only its
name, where it lives and a summary. The module is imported when its command is the one to run.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import typer

__all__ = ["COMMANDS", "Command"]


@dataclass(frozen=True, slots=True)
class Command:
    """Where a command lives.

    Args:
        target: ``module:attribute``, a function (one command) or a ``typer.Typer`` (a group).
        summary: One line for ``flame --help``.
    """

    target: str
    summary: str

    def add_to(self, app: typer.Typer, name: str) -> None:
        """Import the command and add it."""
        import typer

        module, _, attribute = self.target.partition(":")
        loaded: Any = getattr(import_module(module), attribute)
        if isinstance(loaded, typer.Typer):
            app.add_typer(loaded, name=name, short_help=self.summary)
        else:
            app.command(name)(loaded)

    def add_stub_to(self, app: typer.Typer, name: str) -> None:
        """Add only the name and the summary."""
        app.command(name, help=self.summary)(_stub)


def _stub() -> None:
    """Stands for a command that was not asked for."""
    raise AssertionError("the frame imports the command that is run")


COMMANDS: Final = {
    "run": Command("flame_cli.run:run", "Run the Runnable of a YAML file on a worker."),
    "ping": Command("flame_cli.ping:ping", "Measure round trips to the broker and a worker."),
    "ps": Command("flame_cli.history:ps", "List calls and what became of them."),
    "show": Command("flame_cli.history:show", "Show all that is known of a call."),
    "logs": Command("flame_cli.logs:logs", "Print what a call has printed, or follow it."),
    "result": Command("flame_cli.history:result", "Print or save what a call returned."),
    "wait": Command("flame_cli.history:wait", "Wait until calls have ended."),
    "cancel": Command("flame_cli.history:cancel", "Cancel calls that wait or run."),
    "retry": Command("flame_cli.retry:retry", "Run ended calls again, as new ones."),
    "schedule": Command("flame_cli.schedule:app", "List, pause, resume, run, remove schedules."),
    "workers": Command("flame_cli.workers:app", "List, show and drain workers."),
    "queues": Command("flame_cli.queues:queues", "Show how much waits in the queues."),
    "dead": Command("flame_cli.dead:app", "Look at messages that were set aside; replay, drop."),
    "doctor": Command("flame_cli.doctor:doctor", "Check broker, store, key, clocks and workers."),
    "config": Command("flame_cli.config:app", "Show settings, make a key."),
    "completion": Command("flame_cli.completion:completion", "Print a shell completion script."),
}
"""Every command of ``flame``, in the order that ``flame --help`` lists them."""
