"""When a call has waited long enough for a worker."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Add it."""
    op.add_column("kept", sa.Column("late_at", sa.Float))
    queued = sa.text("state = 'queued'")
    op.create_index(
        "kept_late",
        "kept",
        ["key_id", "late_at"],
        sqlite_where=queued,
        postgresql_where=queued,
    )
