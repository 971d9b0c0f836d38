"""What the service knows, as tables: SQLite in its data folder, or PostgreSQL by URL, behind the same SQLAlchemy layer.

    files ──┐                       uploaded bytes stand beside, in data_dir/files/<id>.jsonl
    jobs ───┴─► tasks ──► examples  a task is a model's name, offered to clients once it is ready
      └──► job_events

A commit is on disk when it returns (SQLite: write-ahead log, synchronous=FULL). Examples and events belong to whom
their task or job belongs to, and every other row names its tenant.
"""

import sqlite3
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import (
    JSON,
    BigInteger,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Index,
    Integer,
    String,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    make_url,
)
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from manyicl.errors import UserInputError

SQLITE_FILE = "service.sqlite"

_BUSY_SECONDS = 30
_WRITES = "manyicl_writes"


class Base(DeclarativeBase):
    """The tables."""


class IdentityRow(Base):
    """Whose database this is: one row, whose id stands in the data folder too."""

    __tablename__ = "identity"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)


class FileRow(Base):
    """An uploaded file; its bytes were on disk before this row was."""

    __tablename__ = "files"
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(40), unique=True)
    tenant: Mapped[str] = mapped_column(String(64), index=True)
    name: Mapped[str] = mapped_column(String(255))
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[int] = mapped_column(BigInteger)


class TaskRow(Base):
    """A task. `state` is preparing, ready or deleting; only a ready one is offered, and one without a name is to be removed.

    `num_used`, `prefix_tokens` and `left_out` are true for the backend's `context_identity` that stands in `planned_with`.
    """

    __tablename__ = "tasks"
    __table_args__ = (UniqueConstraint("tenant", "name", name="one_task_of_a_name"),)
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    key: Mapped[str] = mapped_column(String(32), unique=True)
    tenant: Mapped[str] = mapped_column(String(64))
    name: Mapped[str | None] = mapped_column(String(64))
    state: Mapped[str] = mapped_column(String(16), index=True)
    labels: Mapped[list[str]] = mapped_column(JSON, default=list)
    instruction: Mapped[str] = mapped_column(Text, default="")
    num_examples: Mapped[int] = mapped_column(Integer, default=0)
    num_used: Mapped[int] = mapped_column(Integer, default=0)
    prefix_tokens: Mapped[int] = mapped_column(Integer, default=0)
    computed_tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    prefill_seconds: Mapped[float] = mapped_column(Float, default=0.0)
    temperature: Mapped[float] = mapped_column(Float, default=1.0)
    left_out: Mapped[list[Any]] = mapped_column(JSON, default=list)
    planned_with: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[int] = mapped_column(BigInteger)


class ExampleRow(Base):
    """An example of a task, at its place in the context; `line` of its training file, None where it was appended."""

    __tablename__ = "examples"
    task: Mapped[int] = mapped_column(ForeignKey("tasks.number", ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    input: Mapped[str] = mapped_column(Text)
    answer: Mapped[str] = mapped_column(Text)
    line: Mapped[int | None] = mapped_column(Integer)


class JobRow(Base):
    """A fine-tuning job. `status` is queued, running, succeeded, failed or cancelled."""

    __tablename__ = "jobs"
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(40), unique=True)
    tenant: Mapped[str] = mapped_column(String(64), index=True)
    status: Mapped[str] = mapped_column(String(16), index=True)
    task_key: Mapped[str] = mapped_column(String(32))
    model_name: Mapped[str] = mapped_column(String(64))
    file_id: Mapped[str] = mapped_column(String(40))
    seed: Mapped[int] = mapped_column(BigInteger)
    labels: Mapped[list[str] | None] = mapped_column(JSON(none_as_null=True))
    user_metadata: Mapped[dict[str, str]] = mapped_column(JSON, default=dict)
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)
    created_at: Mapped[int] = mapped_column(BigInteger)
    finished_at: Mapped[int | None] = mapped_column(BigInteger)


class JobEventRow(Base):
    """Something that happened to a job."""

    __tablename__ = "job_events"
    __table_args__ = (Index("events_of_a_job", "job", "number"),)
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(40), unique=True)
    job: Mapped[int] = mapped_column(ForeignKey("jobs.number", ondelete="CASCADE"))
    level: Mapped[str] = mapped_column(String(8))
    message: Mapped[str] = mapped_column(Text)
    created_at: Mapped[int] = mapped_column(BigInteger)


def open_database(url: str | None, folder: Path, *, is_changed: bool = True) -> Engine:
    """A database whose tables are as this version wants them; made, or brought up to date, where they are not.

    Args:
        url: Of PostgreSQL; None takes SQLite in `folder`.
        is_changed: Make and update tables; otherwise they have to be there, up to date.

    Raises:
        UserInputError: it cannot be reached or opened.
    """
    try:
        address = make_url(url) if url else make_url(f"sqlite:///{folder / SQLITE_FILE}")
        if address.get_backend_name() == "sqlite":
            engine = create_engine(address, connect_args={"timeout": _BUSY_SECONDS})
            event.listen(engine, "connect", _set_up_sqlite)
            event.listen(engine, "begin", _begin_sqlite)
        else:
            engine = create_engine(address, pool_pre_ping=True)
        try:
            with writing(engine) if is_changed else engine.connect() as connection:
                (migrate if is_changed else _require_current)(connection)
        except BaseException:
            engine.dispose()
            raise
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
        raise UserInputError(
            f"the database's URL cannot be used ({error}). Write postgresql://USER:PASSWORD@HOST/NAME."
        ) from error
    except SQLAlchemyError as error:
        shown = make_url(url).render_as_string(hide_password=True) if url else str(folder)
        raise UserInputError(f"{shown}: the database cannot be opened ({type(error).__name__}: {_first_line(error)}).") from error
    return engine


def migrate(connection: Connection) -> None:
    """Bring the tables up to date, in the transaction of `connection`."""
    config = _migrations()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _require_current(connection: Connection) -> None:
    newest = ScriptDirectory.from_config(_migrations()).get_current_head()
    found = MigrationContext.configure(connection).get_current_revision()
    if found != newest:
        raise UserInputError(
            f"the database's tables are those of version {found or 0}, not {newest}. Start the service once, which updates them."
        )


def _migrations() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    return config


def writing(engine: Engine) -> Any:
    """A transaction that may write: on SQLite it takes the one writer's place at its start, so that it never fails half-way."""
    return engine.execution_options(**{_WRITES: True}).begin()


def writing_engine(engine: Engine) -> Engine:
    """The same database, each of whose transactions may write."""
    return engine.execution_options(**{_WRITES: True})


def check_integrity(connection: Connection) -> list[str]:
    """What SQLite finds wrong with its own file; PostgreSQL has checksums for that."""
    if connection.dialect.name != "sqlite":
        return []
    found = [str(row[0]) for row in connection.exec_driver_sql("PRAGMA integrity_check")]
    found += [f"foreign key: {tuple(row)}" for row in connection.exec_driver_sql("PRAGMA foreign_key_check")]
    return [line for line in found if line != "ok"]


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _set_up_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # Transactions are begun below; the driver would begin them late, and not for DDL.
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
