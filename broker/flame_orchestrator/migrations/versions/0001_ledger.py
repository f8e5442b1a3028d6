"""The first tables: batches of calls, their outcomes, and failures."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make them."""
    op.create_table(
        "clients",
        sa.Column("client", sa.Text, primary_key=True),
        sa.Column("widest", sa.Integer, nullable=False),
    )
    op.create_table(
        "batches",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("mark", sa.LargeBinary, nullable=False, unique=True),
        sa.Column("client", sa.Text, nullable=False),
        sa.Column("first", sa.Integer, nullable=False),
        sa.Column("last", sa.Integer, nullable=False),
        sa.Column("calls", sa.Integer, nullable=False),
        sa.Column("counters", sa.LargeBinary),
        sa.Column("label", sa.Text, nullable=False),
        sa.Column("target", sa.Text, nullable=False),
        sa.Column("queue", sa.Text, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("queued_at", sa.Float, nullable=False),
        sa.Column("expires_at", sa.Float, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("done", sa.LargeBinary, nullable=False),
        sa.Column("unended", sa.Integer, nullable=False),
    )
    op.create_index("batches_of_client", "batches", ["client", "first"])
    unended = sa.text("unended > 0")
    op.create_index(
        "batches_unended", "batches", ["id"], sqlite_where=unended, postgresql_where=unended
    )
    op.create_table(
        "outcomes",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("mark", sa.LargeBinary, nullable=False, unique=True),
        sa.Column("client", sa.Text, nullable=False),
        sa.Column("first", sa.Integer, nullable=False),
        sa.Column("last", sa.Integer, nullable=False),
        sa.Column("worker", sa.Text, nullable=False),
        sa.Column("ended_at", sa.Float, nullable=False),
        sa.Column("seconds", sa.Float, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
    )
    op.create_index("outcomes_of_client", "outcomes", ["client", "first"])
    op.create_table(
        "failures",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("client", sa.Text, nullable=False),
        sa.Column("counter", sa.Integer, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("error", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("worker", sa.Text, nullable=False),
        sa.Column("ended_at", sa.Float, nullable=False),
        sa.UniqueConstraint("client", "counter"),
    )
