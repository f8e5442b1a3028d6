"""Where the commands of ``flame dead`` look: a broker, keys, and the shelves of some pools."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import typer

from flame_broker.config import Settings, load
from flame_broker.errors import ConfigError
from flame_broker.keys import Keyring
from flame_broker.topology import check_pool
from flame_cli.aside import Shelf, shelves
from flame_cli.connecting import connected
from flame_cli.hands import MOST
from flame_cli.pools import pools_with_workers
from flame_cli.survey import Choice, Survey, survey

__all__ = ["Scene"]


@dataclass(frozen=True, slots=True)
class Scene:
    """A broker, and where on it messages may lie that were set aside.

    Args:
        url: The broker.
        keyring: The keys whose signatures count.
        pools: Whose shelves.
    """

    url: str
    keyring: Keyring
    pools: tuple[str, ...]

    @classmethod
    def of(cls, context: str | None, pools: Sequence[str] | None) -> Self:
        """As the settings say.

        Args:
            context: A context of the settings file.
            pools: By default those that have workers, and the default one.

        Raises:
            typer.BadParameter: No pool can have such a name.
            ConfigError: No broker is configured, or the key is not at hand.
            BrokerUnavailable: No broker answered that knows which pools there are.
        """
        for pool in pools or ():
            try:
                check_pool(pool)
            except ValueError as problem:
                raise typer.BadParameter(f"--pool {pool}: {problem}") from problem
        settings = load(context=context)
        url = _broker(settings)
        named = pools or _pools_with_workers(context)
        return cls(url, settings.keyring, tuple(dict.fromkeys(named)))

    @property
    def shelves(self) -> list[Shelf]:
        """The queues to look at."""
        return shelves(self.keyring.ids, self.pools)

    @property
    def place(self) -> str:
        """The pools, in words."""
        return f"pool{'s' * (len(self.pools) > 1)} {', '.join(self.pools)}"

    def survey(self, most: int | None = None) -> Survey:
        """Look at what lies there.

        Args:
            most: At most so many messages; None for as many as can be in hand.
        """
        limit = MOST * len(self.shelves) if most is None else most
        return asyncio.run(survey(self.url, self.keyring, self.shelves, limit))

    def choose(self, words: Sequence[str] | None) -> Choice:
        """The messages of these ids, or all that lie there."""
        found = self.survey()
        if words:
            return found.find(words)
        if not found.asides:
            typer.echo(f"nothing is set aside in {self.place}", err=True)
        return Choice(found.asides)


def _broker(settings: Settings) -> str:
    url = settings.broker_url
    if url is None:
        raise ConfigError(
            "no broker is configured, and the embedded one sets nothing aside for the next "
            "program: set FLAME_BROKER_URL, or name a --context"
        )
    if url.startswith("worker://"):
        raise ConfigError(
            "this is a call, whose process does not hold the cluster key: run `flame dead` outside"
        )
    return url


def _pools_with_workers(context: str | None) -> list[str]:
    with connected(context) as client:
        return pools_with_workers(client)
