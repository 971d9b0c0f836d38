"""The line of a training file that an example comes from, and with what a task's context was planned."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the columns; of rows that are there neither is known."""
    op.add_column("examples", sa.Column("line", sa.Integer(), nullable=True))
    op.add_column("tasks", sa.Column("planned_with", sa.Text(), nullable=True))


def downgrade() -> None:
    """Drop them."""
    op.drop_column("tasks", "planned_with")
    op.drop_column("examples", "line")
