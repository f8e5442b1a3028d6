"""Results that their client did not take."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Add the table."""
    op.create_table(
        "disowned",
        sa.Column("note", sa.LargeBinary, primary_key=True),
        sa.Column("mark", sa.LargeBinary, nullable=False),
        sa.Column("client", sa.Text, nullable=False),
        sa.Column("first", sa.Integer, nullable=False),
        sa.Column("last", sa.Integer, nullable=False),
        sa.Column("counters", sa.LargeBinary),
        sa.Column("at", sa.Float, nullable=False),
    )
    op.create_index("disowned_of_client", "disowned", ["client", "first"])
