"""Leases: which run of a call counts, and where it runs."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the columns."""
    op.add_column("kept", sa.Column("run", sa.Text))
    op.add_column("kept", sa.Column("worker", sa.Text, nullable=False, server_default=""))
    op.add_column("kept", sa.Column("started_at", sa.Float))
    running = sa.text("state = 'running'")
    op.create_index(
        "kept_running", "kept", ["key_id", "run"], sqlite_where=running, postgresql_where=running
    )
