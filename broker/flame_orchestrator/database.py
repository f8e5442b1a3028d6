"""Opening the database: SQLite by default, PostgreSQL by URL, brought to this version's schema."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Engine, create_engine, event, inspect, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    NoSuchModuleError,
    OperationalError,
    SQLAlchemyError,
)

from flame_broker.errors import ConfigError, FlameError

__all__ = ["SCHEMA_VERSION", "default_url", "in_words", "open_database"]

SCHEMA_VERSION: Final = "0009"
"""The last migration."""

_MIGRATIONS: Final = Path(__file__).with_name("migrations")
# Whoever asks waits behind a write that waits for a lock; it is tried again anyhow.
_LOCK_WAIT_MS: Final = 2_000
_PLAIN: Final = {"postgresql", "postgres"}


def default_url(home: Path) -> str:
    """Where the history is kept unless told: a file in ``FLAME_HOME``."""
    return f"sqlite:///{home.absolute()}/ledger.sqlite"


def open_database(url: str) -> Engine:
    """Connect and bring the tables up to date.

    Raises:
        ConfigError: The URL is not one, its driver is missing, or the database cannot be opened.
        FlameError: PostgreSQL does not answer; it may later.
    """
    try:
        parsed = _with_driver(make_url(url))
        if parsed.get_backend_name() == "sqlite" and parsed.database:
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(parsed)
        if parsed.get_backend_name() == "sqlite":
            event.listen(engine, "connect", _prepare_sqlite)
        else:
            event.listen(engine, "connect", _prepare_postgresql)
        _migrate(engine)
    except (ArgumentError, NoSuchModuleError, ImportError) as exc:
        raise ConfigError(
            f"FLAME_DATABASE_URL: {exc}; expected sqlite:///file or postgresql://user@host/name"
        ) from exc
    except OperationalError as exc:
        said = f"the database {_masked(url)} cannot be opened: {in_words(exc)}"
        if parsed.get_backend_name() == "sqlite":
            raise ConfigError(said) from exc
        # No wrong setting as far as anybody knows: whoever started us may try again.
        raise FlameError(f"{said}; is it running?") from exc
    except (SQLAlchemyError, OSError) as exc:
        raise ConfigError(f"the database {_masked(url)} cannot be opened: {exc}") from exc
    return engine


def _with_driver(url: URL) -> URL:
    """PostgreSQL's own URLs name no driver, and SQLAlchemy's choice is not the one we install."""
    return url.set(drivername="postgresql+psycopg") if url.drivername in _PLAIN else url


def in_words(problem: Exception) -> str:
    """What went wrong, on one line; of a statement what the database said, without its values."""
    said = problem.orig if isinstance(problem, DBAPIError) else problem
    return " ".join(str(said).split())


def _prepare_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    # A write-ahead log lets readers go on beside the writer. FULL syncs it at each commit: what is
    # acked must outlive a power cut (sqlite.org/wal.html).
    for pragma in ("journal_mode=WAL", "synchronous=FULL", f"busy_timeout={_LOCK_WAIT_MS}"):
        connection.execute(f"PRAGMA {pragma}")


def _prepare_postgresql(connection: DBAPIConnection, _record: Any) -> None:
    # By default a write waits for a lock without end, and nobody hears of it.
    with closing(connection.cursor()) as cursor:
        cursor.execute(f"SET lock_timeout = {_LOCK_WAIT_MS}")
    connection.commit()


def _migrate(engine: Engine) -> None:
    if _version(engine) == SCHEMA_VERSION:
        return  # alembic takes longer to load than all the rest
    from alembic import command
    from alembic.config import Config
    from alembic.util.exc import CommandError

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    try:
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except CommandError as exc:
        raise ConfigError(
            f"the database {_masked(str(engine.url))} is not of this version of Flame ({exc}): "
            "upgrade Flame here, or keep the history elsewhere"
        ) from exc


def _version(engine: Engine) -> str | None:
    with engine.connect() as connection:
        if not inspect(connection).has_table("alembic_version"):
            return None
        return str(connection.scalar(text("SELECT version_num FROM alembic_version")))


def _masked(url: str) -> str:
    return make_url(url).render_as_string(hide_password=True)
