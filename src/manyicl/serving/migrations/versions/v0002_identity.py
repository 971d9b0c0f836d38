"""The id that a database shares with its folder."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Make its table."""
    op.create_table("identity", sa.Column("id", sa.String(length=32), nullable=False), sa.PrimaryKeyConstraint("id"))


def downgrade() -> None:
    """Drop it."""
    op.drop_table("identity")
