"""``flame doctor``: is everything there that a call needs?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

import typer

from flame_broker.config import Settings, load
from flame_broker.errors import ConfigError, FlameError
from flame_broker.topology import DEFAULT_POOL
from flame_cli.checkup import (
    check_access,
    check_aside,
    check_broker,
    check_clocks,
    check_home,
    check_key,
    check_pools,
    check_store,
    check_unseen_workers,
    check_versions,
    check_worker_stores,
)
from flame_cli.findings import Finding, Verdict
from flame_cli.options import ContextName, Json
from flame_cli.tables import show_json

if TYPE_CHECKING:
    from flame.client import Client

__all__ = ["doctor", "examine"]

_ANSWER_S: Final = 1.0
_COLOURS: Final = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.FAIL: "red"}


def doctor(context: ContextName = None, json: Json = False) -> None:
    """Check home, key, broker, store, workers, versions and clocks; say what to do.

    The exit code is 0 if nothing failed (warnings are no failure), 1 if something did, 22 if it
    is a setting, and 69 if the broker or the store cannot be reached.

    \b
    Examples:
      flame doctor
      flame doctor --json
      FLAME_BROKER_URL=amqp://guest:guest@127.0.0.1/ flame doctor
    """
    found = []
    for finding in examine(context):
        found.append(finding)
        if not json:
            _show(finding)
    if json:
        show_json([asdict(finding) for finding in found])
    raise typer.Exit(max(finding.code for finding in found))


def examine(context: str | None = None) -> Iterator[Finding]:
    """All checks, one after another; those that need what has failed are left out."""
    try:
        settings = load(context=context)
    except ConfigError as exc:
        yield Finding.fail("settings", exc, "correct it; `flame config show` prints what applies")
        return
    yield check_home(settings)
    key = check_key(settings)
    yield key
    broker = check_broker(settings)
    yield broker
    store = check_store(settings)
    yield store
    if Verdict.FAIL not in (key.verdict, broker.verdict):
        tries_store = settings.store_url is not None and store.verdict is not Verdict.FAIL
        yield from _examine_cluster(settings, tries_store=tries_store)


def _examine_cluster(settings: Settings, *, tries_store: bool) -> Iterator[Finding]:
    from flame.client import Client

    with Client(settings) as client:
        try:
            access = check_access(client)
            yield access
            if access.verdict is not Verdict.FAIL:
                yield from _examine_workers(client, tries_store=tries_store)
        except FlameError as exc:
            yield Finding.fail("workers", exc, "the connection was lost meanwhile: try again")


def _examine_workers(client: Client, *, tries_store: bool) -> Iterator[Finding]:
    from flame_cli.trial import carry

    trial = carry if tries_store else None
    if not client.reaches_workers:
        yield check_unseen_workers(client, trial)
        yield from check_aside(client, [DEFAULT_POOL])
        return
    workers = client.workers(_ANSWER_S)
    yield from check_pools(client, workers, trial)
    yield from check_worker_stores(client.settings, workers)
    yield from check_versions(workers)
    yield from check_clocks(workers)
    yield from check_aside(client, sorted({DEFAULT_POOL, *(str(f.get("pool")) for f in workers)}))


def _show(finding: Finding) -> None:
    typer.secho(f"{finding.verdict:4}", fg=_COLOURS[finding.verdict], bold=True, nl=False)
    typer.echo(f"  {finding.check:8}  {finding.text}")
    if finding.remedy:
        typer.echo(f"{'':16}→ {finding.remedy}")
