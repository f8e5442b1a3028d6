"""Calls that are made again and again."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "schedules",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("key_id", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("client", sa.Text, nullable=False, unique=True),
        sa.Column("cron", sa.Text, nullable=False),
        sa.Column("timezone", sa.Text, nullable=False),
        sa.Column("catch_up", sa.Text, nullable=False),
        sa.Column("overlap", sa.Boolean, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("paused", sa.Boolean, nullable=False),
        sa.Column("due_at", sa.Float),
        sa.Column("fired", sa.Integer, nullable=False),
        sa.Column("fired_at", sa.Float),
        sa.Column("skipped_at", sa.Float),
        sa.Column("skipped_why", sa.Text, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.UniqueConstraint("key_id", "name"),
    )
    op.create_index("schedules_due", "schedules", ["key_id", "due_at"])
