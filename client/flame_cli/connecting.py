"""A connection for a command, and a word to who waits for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Timer
from typing import TYPE_CHECKING, Final

import typer

if TYPE_CHECKING:
    from flame.client import Client
    from flame.questions import Questions

__all__ = ["asking", "connected", "following"]

_PATIENCE_S: Final = 2.0


@contextmanager
def connected(context: str | None) -> Iterator[Client]:
    """A client that is closed at the end.

    Args:
        context: A context of the settings file.
    """
    import flame

    with _word_to_the_waiting():
        client = flame.connect(context=context)
    with client:
        yield client


@contextmanager
def following(context: str | None) -> Iterator[Client]:
    """The same for commands that make no calls, and wait for those of others.

    Args:
        context: A context of the settings file.
    """
    from flame.client import Client
    from flame_broker.config import load

    with _word_to_the_waiting():
        client = Client(load(context=context), works=False)
        client.session  # noqa: B018  # connects
    with client:
        yield client


@contextmanager
def asking(context: str | None) -> Iterator[Questions]:
    """Somebody to ask, for commands that make no calls: up sooner than a client.

    Args:
        context: A context of the settings file.
    """
    from flame.asking import Asker
    from flame_broker.config import load

    with ExitStack() as left:
        with _word_to_the_waiting():
            asker = left.enter_context(Asker(load(context=context)))
        yield asker


@contextmanager
def _word_to_the_waiting() -> Iterator[None]:
    """A broker that is away is tried for 10 s: on a terminal, say what takes so long."""
    timer = Timer(_PATIENCE_S, _say)
    timer.daemon = True
    if sys.stderr.isatty():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _say() -> None:
    typer.echo("no answer from the broker yet, still trying …", err=True)
