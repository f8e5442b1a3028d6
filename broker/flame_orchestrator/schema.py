"""The tables. One row serves a frame of calls or of results; only failures have rows of their own.

A million calls of a map are some five thousand rows: ids are ``<client>-<counter>``, so the calls
of a frame are a client and a few numbers (PROTOCOL.md, rule 8).
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    Boolean,
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

__all__ = [
    "HIGHEST",
    "NEVER",
    "batches",
    "clients",
    "dependencies",
    "disowned",
    "failures",
    "followers",
    "kept",
    "leaders",
    "log_chunks",
    "metadata",
    "outcomes",
    "schedules",
    "tombstones",
]

HIGHEST: Final = 2**31 - 1
"""The highest number that every database takes: PostgreSQL's integer."""

NEVER: Final = 1e18
"""When a call is due that is barred, in seconds since 1970."""

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

disowned: Final = Table(
    "disowned",
    metadata,
    Column("note", LargeBinary, primary_key=True),  # the signature of the client's word
    Column("mark", LargeBinary, nullable=False),  # of the results, as in ``outcomes``
    Column("client", Text, nullable=False),
    Column("first", Integer, nullable=False),
    Column("last", Integer, nullable=False),
    Column("counters", LargeBinary),  # msgpack; NULL where they are consecutive
    Column("at", Float, nullable=False),
)
"""Results that their client did not take, since it had others of the same calls."""

Index("disowned_of_client", disowned.c.client, disowned.c.first)

kept: Final = Table(
    "kept",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("key_id", Text, nullable=False),  # of the cluster key that its queues carry
    Column("client", Text, nullable=False),
    Column("counter", Integer, nullable=False),
    Column("once", Text),  # what it is done once for; NULL: it stands for itself
    Column("state", Text, nullable=False),  # waiting, queued, running; then how it ended
    Column("attempt", Integer, nullable=False),
    Column("due_at", Float, nullable=False),
    Column("reason", Text, nullable=False),  # why it waits again
    Column("retry", LargeBinary),  # msgpack; NULL: one attempt
    Column("queue_timeout_s", Float, nullable=False),
    Column("reply", Text, nullable=False),
    Column("body", LargeBinary, nullable=False),  # the frame that a worker gets
    Column("ended_at", Float),
    Column("ended_by", LargeBinary),  # the signature of the message that ended it
    Column("run", Text),  # who has, or had, the lease: one start at one worker
    Column("worker", Text, nullable=False, server_default=""),
    Column("started_at", Float),
    Column("not_before", Float, nullable=False, server_default="0"),  # due_at, once nothing bars it
    Column("unmet", Integer, nullable=False, server_default="0"),  # calls that it waits for
    Column("limit_key", Text),
    Column("limit_calls", Integer),
    Column("place", Integer),  # 1: it has one under its limit; 0: it waits for one alone
    Column("late_at", Float),  # when it has waited long enough in its queue; NULL: never
    UniqueConstraint("client", "counter"),
    UniqueConstraint("key_id", "once"),
)
"""Calls in the custody of the orchestrator."""

Index(
    "kept_due",
    kept.c.key_id,
    kept.c.due_at,
    sqlite_where=text("state = 'waiting'"),
    postgresql_where=text("state = 'waiting'"),
)

Index(
    "kept_running",
    kept.c.key_id,
    kept.c.run,
    sqlite_where=text("state = 'running'"),
    postgresql_where=text("state = 'running'"),
)

Index(
    "kept_placeless",
    kept.c.key_id,
    kept.c.limit_key,
    kept.c.not_before,
    sqlite_where=text("place = 0"),
    postgresql_where=text("place = 0"),
)
Index(
    "kept_placed",
    kept.c.key_id,
    kept.c.limit_key,
    sqlite_where=text("place = 1"),
    postgresql_where=text("place = 1"),
)

Index(
    "kept_late",
    kept.c.key_id,
    kept.c.late_at,
    sqlite_where=text("state = 'queued'"),
    postgresql_where=text("state = 'queued'"),
)

dependencies: Final = Table(
    "dependencies",
    metadata,
    Column("call", Integer, primary_key=True),  # the kept call that waits
    Column("client", Text, primary_key=True),
    Column("counter", Integer, primary_key=True),
)
"""Calls that others wait for; a row goes when it has ended."""

Index("dependencies_on", dependencies.c.client, dependencies.c.counter)

followers: Final = Table(
    "followers",
    metadata,
    Column("client", Text, primary_key=True),
    Column("counter", Integer, primary_key=True),
    Column("reply", Text, nullable=False),
    Column("of", Integer, nullable=False, index=True),  # the kept call
)
"""Calls that get the outcome of another one, with the same idempotency key."""

leaders: Final = Table(
    "leaders",
    metadata,
    Column("key_id", Text, primary_key=True),
    Column("epoch", Integer, nullable=False),
    Column("holder", Text, nullable=False),
    Column("since", Float, nullable=False),
)
"""Who leads, for each cluster key; a writer of an older epoch is refused (PROTOCOL.md, rule 11)."""

tombstones: Final = Table(
    "tombstones",
    metadata,
    Column("mark", LargeBinary, primary_key=True),  # the signature of the letter that cancelled
    Column("client", Text, nullable=False),
    Column("counters", LargeBinary, nullable=False),  # msgpack
    Column("until", Float, nullable=False, index=True),
)
"""Calls that were cancelled: workers that come later must not start them (rule 10)."""

schedules: Final = Table(
    "schedules",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("key_id", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("client", Text, nullable=False, unique=True),  # of the calls that it makes
    Column("cron", Text, nullable=False),
    Column("timezone", Text, nullable=False),
    Column("catch_up", Text, nullable=False),
    Column("overlap", Boolean, nullable=False),
    Column("body", LargeBinary, nullable=False),  # the deposit that each firing makes
    Column("paused", Boolean, nullable=False),
    Column("due_at", Float),  # NULL: no time is left that the expression names
    Column("fired", Integer, nullable=False),  # how many calls it has made: the last one's counter
    Column("fired_at", Float),  # when the last of them was due
    Column("skipped_at", Float),  # when the last one was due that was not made
    Column("skipped_why", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    UniqueConstraint("key_id", "name"),
)
"""Calls that are made again and again; their next time is the database's, not a process's."""

Index("schedules_due", schedules.c.key_id, schedules.c.due_at)

log_chunks: Final = Table(
    "log_chunks",
    metadata,
    Column("client", Text, primary_key=True),
    Column("counter", Integer, primary_key=True),
    Column("start", Integer, primary_key=True),  # its first line, in the log of the call
    Column("lines", Integer, nullable=False),
    Column("size", Integer, nullable=False),  # of the text, with a little for each line
    Column("worker", Text, nullable=False),
    Column("run", Integer, nullable=False),  # among those of that worker
    Column("attempt", Integer, nullable=False),
    Column("upto", Integer, nullable=False),  # the number of the run's next line
    Column("cut", Boolean, nullable=False),  # the log ends here, whatever the call says more
    Column("at", Float, nullable=False),  # when it was written last
    Column("body", LargeBinary),  # compressed; NULL where it is in the object store
    Column("ref", LargeBinary),  # msgpack; where it is there
)
"""What calls have printed: some lines of one run in each row (``logs.py``)."""

Index("log_chunks_at", log_chunks.c.at)
