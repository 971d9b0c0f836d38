"""Whether what a service keeps is whole, and whether its folder and its database belong together.

A random id stands in both, and a service starts only where they are the same: with another service's database, or a new one,
every uploaded file would be one that no row speaks of. Where an id is missing (at the first start, after a restore) the files
tell: the two belong together if a file of the one is in the other, or if neither has any.
"""

import secrets
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from manyicl.errors import UserInputError
from manyicl.files import hash_file, write_text_atomic
from manyicl.serving.database import SQLITE_FILE, ExampleRow, FileRow, IdentityRow, JobRow, TaskRow, check_integrity
from manyicl.serving.settings import Settings

IDENTITY_FILE = "identity"
UNFINISHED = ("queued", "running")


def require_existing(settings: Settings) -> None:
    """Refuse a folder that no service has used.

    Raises:
        UserInputError: there are no files, or there is no database.
    """
    if not (settings.data_dir / "files").is_dir():
        raise UserInputError(f"{settings.data_dir}: no data folder of a service. Give the --data-dir of one that has run.")
    database = settings.data_dir / SQLITE_FILE
    if settings.database_url is None and not database.is_file():
        raise UserInputError(f"{database}: there is no database. Give the --database-url that the service has, if it has one.")


def pair(session: Session, data_dir: Path, *, is_changed: bool = True) -> None:
    """Make sure that a folder and a database belong together.

    Args:
        is_changed: Write the id where it is missing.

    Raises:
        UserInputError: they do not; the message has what is known of both.
    """
    path = data_dir / IDENTITY_FILE
    own = path.read_text(encoding="utf-8").strip() if path.is_file() else None
    theirs = session.scalar(select(IdentityRow.id))
    if own is not None and own == theirs:
        return
    stored = {found.name for found in (data_dir / "files").glob("file-*.jsonl")}
    known = {f"{file_id}.jsonl" for file_id in session.scalars(select(FileRow.id))}
    if (own is not None and theirs is not None) or ((stored or known) and not stored & known):
        raise UserInputError(
            f"{data_dir}: the folder and the database do not belong together: {len(stored)} uploaded files are in the folder, "
            f"and {len(stored & known)} of them among the {len(known)} of the database. Give the --data-dir and the "
            f"--database-url that were used together; if these were, remove {path} and try again."
        )
    if not is_changed:
        return
    found = own or theirs or secrets.token_hex(16)
    if theirs is None:
        session.add(IdentityRow(id=found))
    if own is None:
        write_text_atomic(path, f"{found}\n")


def find_problems(session: Session, path_of: Callable[[str], Path]) -> list[str]:
    """What is wrong with a store, a sentence each; see `Store.check`."""
    problems = check_integrity(session.connection())
    for row in session.scalars(select(FileRow)):
        path = path_of(row.id)
        if not path.is_file():
            problems.append(f"file {row.id}: its bytes are gone")
        elif path.stat().st_size != row.num_bytes or hash_file(path) != row.sha256:
            problems.append(f"file {row.id}: its bytes are not those that were uploaded")
    counts = select(ExampleRow.task, func.count().label("rows"), func.max(ExampleRow.position).label("last"))
    found = {task: (rows, last) for task, rows, last in session.execute(counts.group_by(ExampleRow.task))}
    unfinished = set(session.scalars(select(JobRow.task_key).where(JobRow.status.in_(UNFINISHED))))
    for task in session.scalars(select(TaskRow)):
        rows, last = found.get(task.number, (0, -1))
        if task.state == "ready" and (rows != task.num_examples or last != rows - 1 or not rows):
            problems.append(f"task {task.key}: {rows} examples up to place {last}; {task.num_examples} were acknowledged")
        if task.state == "preparing" and task.key not in unfinished:
            problems.append(f"task {task.key}: in preparation, and no job prepares it")
        if (task.name is None) != (task.state == "deleting"):
            problems.append(f"task {task.key}: {task.state} {'with' if task.name else 'without'} a name")
    return problems
