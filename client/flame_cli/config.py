"""``flame config``: what is configured, where it was found, and new keys."""

from __future__ import annotations

from typing import Any

import typer

from flame_broker.config import Settings, config_path, load
from flame_broker.keys import KEY_FILE_NAME, generate_key
from flame_broker.urls import mask_url
from flame_cli.options import ContextName, Json
from flame_cli.tables import Column, show_json, show_table

__all__ = ["app"]

app = typer.Typer(rich_markup_mode=None)

_COLUMNS = (Column("setting"), Column("value"), Column("source"))


@app.callback(invoke_without_command=True)
def config(context: typer.Context, context_name: ContextName = None, json: Json = False) -> None:
    """Show what is configured, or make a key."""
    if context.invoked_subcommand is None:
        show(context=context_name, json=json)


@app.command()
def show(context: ContextName = None, json: Json = False) -> None:
    """Show every setting and where it was found.

    Passwords are masked, and of the keys only the ids show.

    \b
    Examples:
      flame config show
      FLAME_BROKER_URL=amqp://broker.example/ flame config show --json
    """
    settings = load(context=context)
    values = _values(settings)
    if json:
        show_json({**values, "sources": dict(settings.sources)})
    else:
        rows = [
            {"setting": name, "value": value, "source": settings.sources.get(name)}
            for name, value in values.items()
        ]
        show_table(rows, _COLUMNS)


@app.command()
def key() -> None:
    """Print a new key, 32 random bytes as text.

    The broker's clients and workers need the same one, in FLAME_KEY or in a file of mode 600 that
    FLAME_KEY_FILE names. Who holds it can run code on the workers.

    \b
    Examples:
      export FLAME_KEY=$(flame config key)
      (umask 077; flame config key > factory.key)
    """
    typer.echo(generate_key())


@app.command()
def path() -> None:
    """Print where the settings file is, or would be.

    \b
    Example:
      cat "$(flame config path)"
    """
    typer.echo(config_path())


def _values(settings: Settings) -> dict[str, Any]:
    return {
        "home": str(settings.home),
        "file": str(settings.file) if settings.file else None,
        "context": settings.context,
        "broker": _masked(settings.broker_url) or "embedded",
        "store": _masked(settings.store_url),
        "database": _masked(settings.database_url),
        "key": _key(settings),
        "package.storage": _masked(settings.package.storage),
        "package.excludes": list(settings.package.excludes),
        "runner.template": settings.template,
    }


def _masked(url: str | None) -> str | None:
    return None if url is None else mask_url(url)


def _key(settings: Settings) -> list[str] | None:
    """The ids of the keys; None where there is none yet: showing settings never makes one."""
    in_home = settings.local and (settings.home / KEY_FILE_NAME).exists()
    if settings.key_text is None and settings.key_file is None and not in_home:
        return None
    return [f"id {hex_id}" for hex_id in settings.keyring.ids]
