"""Everything that tenants own, on disk before it is acknowledged.

In: files, jobs and examples of a tenant. Out: the same, after any kill. The bytes of a file are written, synced and renamed
before its row is committed; a task is offered by the commit that makes it ready; what is deleted loses its name first and is
removed after. `Store.of(tenant)` is the only way to anything by name or id, and its one `_own` keeps tenants apart.

Calls block on the disk: the service runs them in threads.
"""

import hashlib
import os
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG
from typing import TypeVar

import filelock
from sqlalchemy import Select, delete, func, select, text
from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from manyicl.errors import UserInputError
from manyicl.files import storage_errors, write_bytes_atomic
from manyicl.serving.backends import Prepared, TaskSpec
from manyicl.serving.database import (
    ExampleRow,
    FileRow,
    JobEventRow,
    JobRow,
    TaskRow,
    open_database,
    writing_engine,
)
from manyicl.serving.errors import ApiError, not_found
from manyicl.serving.settings import Settings
from manyicl.serving.spec_cache import SpecCache
from manyicl.serving.store_checks import UNFINISHED, find_problems, pair, require_existing
from manyicl.tasks.task import Example

Row = TypeVar("Row", FileRow, JobRow, TaskRow)
Entry = TypeVar("Entry", FileRow, JobRow)

_OPEN_CHARACTERS = 2**26
_ADVISORY_LOCK = 0x6D616E79  # "many": one service on a PostgreSQL database.
_MAX_LEFT_OUT = 1000


@dataclass(frozen=True)
class JobRequest:
    """What a fine-tuning job is asked for; `name` is the model that it makes."""

    file_id: str
    name: str
    seed: int
    labels: tuple[str, ...] | None = None
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Page:
    """Which part of a list: entries beyond the one with the id `after`, at most `limit`, newest first unless `is_ascending`."""

    after: str | None = None
    limit: int = 20
    is_ascending: bool = False


class Store:
    """The database and the files of a service; one process at a time has it open.

    Args:
        is_checked: For a look at it: nothing is made, updated or removed.

    Raises:
        UserInputError: another service uses the folder or the database, they do not belong together, or cannot be opened.
    """

    def __init__(self, settings: Settings, *, is_checked: bool = False) -> None:
        self.limits = settings.limits
        self.folder = settings.data_dir / "files"
        if is_checked:
            require_existing(settings)
        with storage_errors(settings.data_dir):
            settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.mkdir(exist_ok=True)
            self._lock = _lock_folder(settings.data_dir)
        self._guard: Connection | None = None
        self._specs = SpecCache(_OPEN_CHARACTERS)
        self.scratch_keys: set[str] = set()  # Of measurements that are under way.
        with ExitStack() as undo:
            undo.callback(self._lock.release)
            self._reading = open_database(settings.database_url, settings.data_dir, is_changed=not is_checked)
            undo.callback(self._close_database)
            self._take_database()
            self._writing = writing_engine(self._reading)
            self._turn = threading.Lock() if self._reading.dialect.name == "sqlite" else nullcontext()
            with self.writing() as session:
                pair(session, settings.data_dir, is_changed=not is_checked)
            if not is_checked:
                self._tidy()
            undo.pop_all()

    def close(self) -> None:
        """Let another service have it."""
        self._close_database()
        self._lock.release()

    def _close_database(self) -> None:
        if self._guard is not None:
            self._guard.close()
        self._reading.dispose()

    def of(self, tenant: str) -> "Owned":
        """What one tenant owns."""
        return Owned(self, tenant)

    def reading(self) -> Session:
        """A session that only reads."""
        return Session(self._reading, expire_on_commit=False)

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A transaction that may write, committed at its end.

        On SQLite one thread after another: its own waiting for a turn sleeps longer and longer.
        """
        with self._turn, Session(self._writing, expire_on_commit=False) as session, session.begin():
            yield session

    def path_of(self, file_id: str) -> Path:
        """Where the bytes of a stored file stand."""
        return self.folder / f"{file_id}.jsonl"

    def read_spec(self, row: TaskRow) -> TaskSpec:
        """A task with its examples; those read last are kept in memory."""
        held, moment = self._specs.find(row.key, row.num_examples)
        if held is not None:
            return held
        with self.reading() as session:
            found = session.execute(
                select(ExampleRow.input, ExampleRow.answer)
                .where(ExampleRow.task == row.number, ExampleRow.position < row.num_examples)
                .order_by(ExampleRow.position)
            ).all()
        if len(found) != row.num_examples:  # Deleted since the row was read.
            raise not_found("model", row.name or "")
        spec = TaskSpec(row.key, tuple(Example(given, answer) for given, answer in found), tuple(row.labels), row.instruction)
        self._specs.hold(spec, moment)
        return spec

    def doomed_keys(self) -> list[str]:
        """Keys of tasks that were deleted, or never finished, and that the backend must forget."""
        with self.reading() as session:
            return list(session.scalars(select(TaskRow.key).where(TaskRow.state == "deleting")))

    def remove_task(self, key: str) -> None:
        """Remove what is left of a deleted task, once the backend has forgotten it."""
        with self.writing() as session:
            session.execute(delete(TaskRow).where(TaskRow.key == key, TaskRow.state == "deleting"))
        self._specs.remove(key)

    def ping(self) -> None:
        """Ask the database for nothing, which fails where it is away."""
        with self.reading() as session:
            session.execute(text("SELECT 1"))

    def count_jobs(self) -> dict[str, int]:
        """Jobs by status, of all tenants."""
        with self.reading() as session:
            return {row[0]: row[1] for row in session.execute(select(JobRow.status, func.count()).group_by(JobRow.status))}

    def check(self) -> list[str]:
        """What is wrong with the store, a sentence each; nothing may ever be.

        Costs reading every stored file once.
        """
        with self.reading() as session:
            return find_problems(session, self.path_of)

    def _take_database(self) -> None:
        """Keep other services off a PostgreSQL database, by a lock that ends with this process."""
        if self._reading.dialect.name == "sqlite":
            return
        self._guard = self._reading.connect()
        if not self._guard.scalar(text(f"SELECT pg_try_advisory_lock({_ADVISORY_LOCK})")):
            self._guard.close()
            raise UserInputError("another service is using this database. Stop it, or give another --database-url.")
        self._guard.commit()

    def _tidy(self) -> None:
        """Remove bytes that no row speaks of: of uploads that were not acknowledged, and of files that were deleted."""
        with self.reading() as session:
            known = {self.path_of(file_id).name for file_id in session.scalars(select(FileRow.id))}
        with storage_errors(self.folder):
            for path in self.folder.iterdir():
                is_upload = path.name.lstrip(".").startswith("file-") and S_ISREG(path.lstat().st_mode)
                if is_upload and path.name not in known:
                    path.unlink(missing_ok=True)


class Owned:
    """What one tenant owns. Whatever is another tenant's is not found."""

    def __init__(self, store: Store, tenant: str) -> None:
        self.store = store
        self.tenant = tenant

    def _own(self, kind: type[Row]) -> Select[Row]:
        """The rows of this tenant: the one place where tenants are kept apart."""
        return select(kind).where(kind.tenant == self.tenant)

    def _find(self, session: Session, kind: type[Entry], row_id: str, *, is_changed: bool = False) -> Entry:
        """A row, locked until the transaction ends where it is to be changed."""
        query = self._own(kind).where(kind.id == row_id)
        row = session.scalar(query.with_for_update() if is_changed else query)
        if row is None:
            raise not_found("file" if kind is FileRow else "job", row_id)
        return row

    def _list(self, session: Session, kind: type[Entry], page: Page) -> tuple[list[Entry], bool]:
        query = self._own(kind)
        if page.after is not None:
            start = self._find(session, kind, page.after).number
            query = query.where(kind.number > start if page.is_ascending else kind.number < start)
        order = kind.number.asc() if page.is_ascending else kind.number.desc()
        rows = list(session.scalars(query.order_by(order).limit(page.limit + 1)))
        return rows[: page.limit], len(rows) > page.limit

    def _count(self, session: Session, query: Select[Row]) -> int:
        return session.scalar(select(func.count()).select_from(query.subquery())) or 0

    def add_file(self, name: str, content: bytes) -> FileRow:
        """Keep a file; it is on disk when this returns.

        Raises:
            ApiError: this tenant has as many files as it may.
            StorageError: the disk is full; nothing of the file is kept.
        """
        row = FileRow(
            id=f"file-{secrets.token_hex(12)}",
            tenant=self.tenant,
            name=name,
            num_bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            created_at=int(time.time()),
        )
        path = self.store.path_of(row.id)
        try:
            write_bytes_atomic(path, content)
            _sync_folder(path.parent)
            with self.store.writing() as session:
                if self._count(session, self._own(FileRow)) >= self.store.limits.max_files:
                    raise _too_many("files", self.store.limits.max_files)
                session.add(row)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return row

    def file(self, file_id: str) -> FileRow:
        """One file."""
        with self.store.reading() as session:
            return self._find(session, FileRow, file_id)

    def files(self, page: Page) -> tuple[list[FileRow], bool]:
        """Files, and whether there are more."""
        with self.store.reading() as session:
            return self._list(session, FileRow, page)

    def file_content(self, file_id: str) -> bytes:
        """The bytes of a file."""
        try:
            return self.store.path_of(self.file(file_id).id).read_bytes()
        except FileNotFoundError:  # Deleted since its row was read.
            raise not_found("file", file_id) from None

    def delete_file(self, file_id: str) -> None:
        """Remove a file; models made of it stay."""
        with self.store.writing() as session:
            session.delete(self._find(session, FileRow, file_id, is_changed=True))
        with suppress(OSError):  # Without its row it is nobody's, and goes at the next start.
            self.store.path_of(file_id).unlink()

    def add_job(self, request: JobRequest) -> JobRow:
        """Queue a job and take its model's name; neither is lost once this returns.

        Raises:
            ApiError: the file is not there, the name is taken, or there are too many jobs or models.
        """
        now, limits = int(time.time()), self.store.limits
        task = TaskRow(key=secrets.token_hex(16), tenant=self.tenant, name=request.name, state="preparing", created_at=now)
        job = JobRow(
            id=f"ftjob-{secrets.token_hex(12)}",
            tenant=self.tenant,
            status="queued",
            task_key=task.key,
            model_name=request.name,
            file_id=request.file_id,
            seed=request.seed,
            labels=None if request.labels is None else list(request.labels),
            user_metadata=request.metadata,
            created_at=now,
        )
        try:
            with self.store.writing() as session:
                self._find(session, FileRow, request.file_id)
                if self._count(session, self._own(TaskRow).where(TaskRow.name.is_not(None))) >= limits.max_tasks:
                    raise _too_many("models", limits.max_tasks)
                if self._count(session, self._own(JobRow).where(JobRow.status.in_(UNFINISHED))) >= limits.max_unfinished_jobs:
                    raise ApiError(429, f"{limits.max_unfinished_jobs} jobs are unfinished. Wait.", headers={"Retry-After": "10"})
                session.add_all([task, job])
                session.flush()
                session.add(new_event(job, "Created fine-tuning job: " + job.id))
                self._drop_old_jobs(session)
        except IntegrityError as error:
            message = f"A model named '{request.name}' exists or is being made. Delete it, or choose another suffix."
            raise ApiError(409, message, code="model_exists", param="suffix") from error
        return job

    def _drop_old_jobs(self, session: Session) -> None:
        """Remove the oldest finished jobs beyond the limit, with their events; the models that they made stay."""
        finished = self._own(JobRow).where(JobRow.status.not_in(UNFINISHED)).order_by(JobRow.number.desc())
        old = finished.with_only_columns(JobRow.number).offset(self.store.limits.max_finished_jobs)
        session.execute(delete(JobRow).where(JobRow.number.in_(old)), execution_options={"synchronize_session": False})

    def job(self, job_id: str) -> JobRow:
        """One job."""
        with self.store.reading() as session:
            return self._find(session, JobRow, job_id)

    def jobs(self, page: Page) -> tuple[list[JobRow], bool]:
        """Jobs, and whether there are more."""
        with self.store.reading() as session:
            return self._list(session, JobRow, page)

    def cancel_job(self, job_id: str) -> JobRow:
        """End a job that is not finished; its model will not be.

        Raises:
            ApiError: it is finished.
        """
        with self.store.writing() as session:
            job = self._find(session, JobRow, job_id, is_changed=True)
            if job.status not in UNFINISHED:
                raise ApiError(400, f"The job has {job.status} already.", code="job_finished", param="id")
            end_job(session, job, "cancelled", "The job was cancelled.")
        return job

    def job_events(self, job_id: str, page: Page) -> tuple[list[JobEventRow], bool]:
        """What happened to a job, and whether there is more."""
        with self.store.reading() as session:
            job = self._find(session, JobRow, job_id)
            query = select(JobEventRow).where(JobEventRow.job == job.number)
            if page.after is not None:
                start = session.scalar(query.where(JobEventRow.id == page.after))
                if start is None:
                    raise not_found("event", page.after)
                query = query.where(JobEventRow.number < start.number)
            rows = list(session.scalars(query.order_by(JobEventRow.number.desc()).limit(page.limit + 1)))
        return rows[: page.limit], len(rows) > page.limit

    def task(self, name: str) -> TaskRow:
        """One task that is ready."""
        with self.store.reading() as session:
            return self._find_task(session, name)

    def _find_task(self, session: Session, name: str, *, is_changed: bool = False) -> TaskRow:
        query = self._own(TaskRow).where(TaskRow.name == name, TaskRow.state == "ready")
        row = session.scalar(query.with_for_update() if is_changed else query)
        if row is None:
            raise not_found("model", name)
        return row

    def tasks(self) -> list[TaskRow]:
        """The tasks that are ready, oldest first."""
        with self.store.reading() as session:
            return list(session.scalars(self._own(TaskRow).where(TaskRow.state == "ready").order_by(TaskRow.number)))

    def append_examples(self, before: TaskRow, examples: Sequence[Example], prepared: Prepared, *, planned_with: str) -> TaskRow:
        """Add examples behind those of a task, which is served with them from now on; without any, note how it is served now.

        Args:
            planned_with: The `context_identity` of the backend that prepared or planned it.

        Raises:
            ApiError: the task is not as it was `before`.
        """
        with self.store.writing() as session:
            row = self._find_task(session, before.name or "", is_changed=True)
            if (row.key, row.num_examples) != (before.key, before.num_examples):
                raise ApiError(
                    409, f"'{before.name}' was changed in the meantime. Look at it and try again.", code="task_changed"
                )
            add_examples(session, row, examples, start=row.num_examples)
            row.num_examples += len(examples)
            set_prepared(session, row, prepared, planned_with=planned_with)
        return row

    def delete_task(self, name: str) -> str:
        """Take a task's name away, which is when it is gone, and return the key that is still to be forgotten."""
        with self.store.writing() as session:
            row = self._find_task(session, name, is_changed=True)
            row.name, row.state = None, "deleting"
        return row.key

    def set_temperature(self, before: TaskRow, temperature: float) -> None:
        """Keep the temperature that a task's probabilities are told at.

        Raises:
            ApiError: the task is gone.
        """
        with self.store.writing() as session:
            row = self._find_task(session, before.name or "", is_changed=True)
            if row.key != before.key:
                raise not_found("model", before.name or "")
            row.temperature = temperature

    def add_scratch(self, key: str) -> None:
        """Keep a task that nobody can call, for a measurement; its key is among `scratch_keys` before.

        It is removed by the job runner once its key is no longer there, or after a restart.
        """
        row = TaskRow(key=key, tenant=self.tenant, name=None, state="deleting", created_at=int(time.time()))
        with self.store.writing() as session:
            session.add(row)


def new_event(job: JobRow, message: str, *, level: str = "info") -> JobEventRow:
    """An event of a job that stands in the database."""
    now = int(time.time())
    return JobEventRow(id=f"ftevent-{secrets.token_hex(12)}", job=job.number, level=level, message=message, created_at=now)


def end_job(session: Session, job: JobRow, status: str, message: str, *, level: str = "info") -> None:
    """Finish a job; without success its model loses its name and is to be removed."""
    job.status, job.finished_at = status, int(time.time())
    session.add(new_event(job, message, level=level))
    task = session.scalar(select(TaskRow).where(TaskRow.key == job.task_key))
    if task is not None and status != "succeeded":
        task.name, task.state = None, "deleting"


def add_examples(session: Session, row: TaskRow, examples: Sequence[Example], *, start: int) -> None:
    """Add examples to a task from the place `start` on; the line of each stands in its source."""
    for place, example in enumerate(examples, start):
        line = int(example.source.rpartition(":")[2]) if example.source else None
        session.add(ExampleRow(task=row.number, position=place, input=example.input, answer=example.answer, line=line))


def set_prepared(session: Session, row: TaskRow, prepared: Prepared, *, planned_with: str) -> None:
    """Note what came of a task's examples."""
    lines: dict[int, int | None] = {}
    if prepared.left_out:
        found = session.execute(select(ExampleRow.position, ExampleRow.line).where(ExampleRow.task == row.number))
        lines = {entry.position: entry.line for entry in found}
    row.num_used = prepared.num_used
    row.prefix_tokens = prepared.prefix_tokens
    row.computed_tokens = (row.computed_tokens or 0) + prepared.computed_tokens
    row.prefill_seconds = (row.prefill_seconds or 0.0) + prepared.seconds
    row.left_out = [[position, reason, lines[position]] for position, reason in prepared.left_out[:_MAX_LEFT_OUT]]
    row.planned_with = planned_with


def _lock_folder(data_dir: Path) -> filelock.FileLock:
    lock = filelock.FileLock(data_dir / ".lock", timeout=0, thread_local=False)  # Closed by any thread.
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise UserInputError(f"{data_dir}: another service is using this folder. Stop it, or give another.") from error
    return lock


def _too_many(what: str, limit: int) -> ApiError:
    return ApiError(403, f"You have {limit} {what}, which is the most. Delete some.", code="limit_reached")


def _sync_folder(folder: Path) -> None:
    """Have the names in a folder on disk too, not only what the files hold."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
