"""Alembic's entrance: the connection is the caller's, and so is its transaction."""

from alembic import context

from manyicl.serving.database import Base

context.configure(connection=context.config.attributes["connection"], target_metadata=Base.metadata)
context.run_migrations()
