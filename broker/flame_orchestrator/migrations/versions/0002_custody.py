"""Calls in the custody of the orchestrator, and who leads."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "kept",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("key_id", sa.Text, nullable=False),
        sa.Column("client", sa.Text, nullable=False),
        sa.Column("counter", sa.Integer, nullable=False),
        sa.Column("once", sa.Text),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("due_at", sa.Float, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("retry", sa.LargeBinary),
        sa.Column("queue_timeout_s", sa.Float, nullable=False),
        sa.Column("reply", sa.Text, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("ended_at", sa.Float),
        sa.Column("ended_by", sa.LargeBinary),
        sa.UniqueConstraint("client", "counter"),
        sa.UniqueConstraint("key_id", "once"),
    )
    waiting = sa.text("state = 'waiting'")
    op.create_index(
        "kept_due", "kept", ["key_id", "due_at"], sqlite_where=waiting, postgresql_where=waiting
    )
    op.create_table(
        "followers",
        sa.Column("client", sa.Text, primary_key=True),
        sa.Column("counter", sa.Integer, primary_key=True),
        sa.Column("reply", sa.Text, nullable=False),
        sa.Column("of", sa.Integer, nullable=False, index=True),
    )
    op.create_table(
        "leaders",
        sa.Column("key_id", sa.Text, primary_key=True),
        sa.Column("epoch", sa.Integer, nullable=False),
        sa.Column("holder", sa.Text, nullable=False),
        sa.Column("since", sa.Float, nullable=False),
    )
    op.create_table(
        "tombstones",
        sa.Column("mark", sa.LargeBinary, primary_key=True),
        sa.Column("client", sa.Text, nullable=False),
        sa.Column("counters", sa.LargeBinary, nullable=False),
        sa.Column("until", sa.Float, nullable=False, index=True),
    )
