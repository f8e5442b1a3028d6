"""The tables. One row serves a frame of calls or of results; only failures have rows of their own.

A million calls of a map are some five thousand rows: ids are ``<client>-<counter>``, so the calls
of a frame are a client and a few numbers (PROTOCOL.md, rule 8).
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
)

__all__ = ["batches", "clients", "failures", "metadata", "outcomes"]

metadata: Final = MetaData()

clients: Final = Table(
    "clients",
    metadata,
    Column("client", Text, primary_key=True),
    Column("widest", Integer, nullable=False),  # last - first of its widest frame
)
"""What bounds the search for frames that hold a counter: an index on intervals there is none."""

batches: Final = Table(
    "batches",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("mark", LargeBinary, nullable=False, unique=True),  # the frame's signature
    Column("client", Text, nullable=False),
    Column("first", Integer, nullable=False),
    Column("last", Integer, nullable=False),
    Column("calls", Integer, nullable=False),
    Column("counters", LargeBinary),  # msgpack; NULL where they are consecutive
    Column("label", Text, nullable=False),
    Column("target", Text, nullable=False),
    Column("queue", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("queued_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("body", LargeBinary, nullable=False),  # the frame itself, to be run again
    Column("done", LargeBinary, nullable=False),  # a bit for each call that has ended
    Column("unended", Integer, nullable=False),
)
"""Calls that were queued together."""

Index("batches_of_client", batches.c.client, batches.c.first)
Index(
    "batches_unended",
    batches.c.id,
    sqlite_where=text("unended > 0"),
    postgresql_where=text("unended > 0"),
)

outcomes: Final = Table(
    "outcomes",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("mark", LargeBinary, nullable=False, unique=True),
    Column("client", Text, nullable=False),
    Column("first", Integer, nullable=False),
    Column("last", Integer, nullable=False),
    Column("worker", Text, nullable=False),
    Column("ended_at", Float, nullable=False),
    Column("seconds", Float, nullable=False),
    Column("body", LargeBinary, nullable=False),
)
"""Results that were sent together."""

Index("outcomes_of_client", outcomes.c.client, outcomes.c.first)

failures: Final = Table(
    "failures",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("client", Text, nullable=False),
    Column("counter", Integer, nullable=False),
    Column("state", Text, nullable=False),
    Column("error", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("worker", Text, nullable=False),
    Column("ended_at", Float, nullable=False),
    UniqueConstraint("client", "counter"),
)
"""Calls that did not succeed."""
