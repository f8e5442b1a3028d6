"""What bars a kept call from its start: other calls, and limits."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Add them."""
    for column in (
        sa.Column("not_before", sa.Float, nullable=False, server_default="0"),
        sa.Column("unmet", sa.Integer, nullable=False, server_default="0"),
        sa.Column("limit_key", sa.Text),
        sa.Column("limit_calls", sa.Integer),
        sa.Column("place", sa.Integer),
    ):
        op.add_column("kept", column)
    for name, columns, where in (
        ("kept_placeless", ["key_id", "limit_key", "not_before"], sa.text("place = 0")),
        ("kept_placed", ["key_id", "limit_key"], sa.text("place = 1")),
    ):
        op.create_index(name, "kept", columns, sqlite_where=where, postgresql_where=where)
    op.create_table(
        "dependencies",
        sa.Column("call", sa.Integer, primary_key=True),
        sa.Column("client", sa.Text, primary_key=True),
        sa.Column("counter", sa.Integer, primary_key=True),
    )
    op.create_index("dependencies_on", "dependencies", ["client", "counter"])
