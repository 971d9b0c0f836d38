"""Fine-tuning jobs: a file of examples becomes a model that is ready to be called.

    queued ──► running ──► succeeded      the task is offered by the same commit
                      ├──► failed         the task is removed; the error names the file and line
                      └──► cancelled      by its owner, also while queued

A job that a killed service was running is queued again at the next start, and what the backend kept of it is found again. While
the backend is away, a job waits for it. Tenants take turns: the next job is that of the tenant who was served longest ago.
Deleted tasks are removed beside the jobs, so that none of them waits for a long one.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from sqlalchemy import Select, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from manyicl.errors import ManyICLError, OverloadedError, StorageError, UserInputError
from manyicl.serving.backends import Backend, Prepared, ShortMemoryError, TaskSpec
from manyicl.serving.database import JobRow, TaskRow
from manyicl.serving.errors import find_errno, has_no_space
from manyicl.serving.store import Store, add_examples, end_job, new_event, set_prepared
from manyicl.serving.threads import run_whole
from manyicl.serving.training_files import check_labels, find_lone_answer, infer_labels, read_training_file, shuffle_examples
from manyicl.tasks.task import Example

logger = logging.getLogger(__name__)

_PROGRESS_SECONDS = 2.0
_SHOWN_LEFT_OUT = 5
_MAX_ATTEMPTS = 10
_FIRST_WAIT_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 60.0
_PATIENCE_SECONDS = 3600.0


@dataclass(frozen=True)
class _Claim:
    """A job that this service runs now."""

    number: int
    id: str
    tenant: str
    task_key: str
    file_id: str
    seed: int
    labels: tuple[str, ...] | None


class JobQueue:
    """The jobs of all tenants, as the service sees them."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._served: dict[str, int] = {}
        self._turn = 0

    def requeue(self, *, is_orderly: bool = False) -> None:
        """Queue again the jobs that stand as running, and fail those that a service died of again and again.

        Args:
            is_orderly: The service is told to stop, which is no fault of the job's.
        """
        with self._store.writing() as session:
            for job in session.scalars(select(JobRow).where(JobRow.status == "running")).all():
                if is_orderly:
                    job.attempts -= 1
                if job.attempts < _MAX_ATTEMPTS:
                    job.status = "queued"
                    session.add(new_event(job, "The service was stopped; the job will go on."))
                else:
                    message = f"The service stopped {job.attempts} times while it ran this job, which is given up."
                    job.error = {"code": "interrupted", "message": message, "param": None}
                    end_job(session, job, "failed", message, level="error")

    def claim(self) -> _Claim | None:
        """The next job, now running; None where none is queued."""
        with self._store.writing() as session:
            jobs = session.scalars(select(JobRow).where(JobRow.status == "queued").order_by(JobRow.number)).all()
            if not jobs:
                return None
            job = min(jobs, key=lambda job: (self._served.get(job.tenant, 0), job.number))
            job.status = "running"
            job.attempts += 1
            session.add(new_event(job, "Fine-tuning job started."))
        self._turn += 1
        self._served[job.tenant] = self._turn
        labels = None if job.labels is None else tuple(job.labels)
        return _Claim(job.number, job.id, job.tenant, job.task_key, job.file_id, job.seed, labels)

    def read(self, claim: _Claim) -> TaskSpec | None:
        """The task that a job makes: its file read and its examples kept; None where the job was cancelled meanwhile.

        Raises:
            UserInputError: the file was deleted, or cannot be used.
        """
        with self._store.reading() as session:
            task = session.scalar(_preparing(claim))
        if task is None:
            return None
        if task.num_examples:  # Kept before the service was killed.
            return self._store.read_spec(task)
        owned = self._store.of(claim.tenant)
        try:
            row = owned.file(claim.file_id)
        except ManyICLError as error:
            raise UserInputError(f"the training file {claim.file_id} was deleted before it was read. Upload it again.") from error
        training = read_training_file(self._store.path_of(row.id), name=row.name, limits=self._store.limits)
        labels = infer_labels(training.examples) if claim.labels is None else claim.labels
        check_labels(training.examples, labels)
        if len(labels) > self._store.limits.max_labels:
            raise UserInputError(f"{row.name}: {len(labels)} labels; a task takes {self._store.limits.max_labels}.")
        examples = shuffle_examples(training.examples, seed=claim.seed)
        with self._store.writing() as session:
            task = session.scalar(_preparing(claim))
            if task is None:
                return None
            add_examples(session, task, examples, start=0)
            task.num_examples, task.labels, task.instruction = len(examples), list(labels), training.instruction
        lone = None if labels or claim.labels is not None else find_lone_answer(training.examples)
        if lone is not None:
            line = lone[0].source.rpartition(":")[2]
            self.note(claim, f"{row.name}: line {line}: {lone[1]} in the job's `labels`.", level="warn")
        plain = tuple(Example(example.input, example.answer) for example in examples)  # As they are read back.
        return TaskSpec(claim.task_key, plain, tuple(labels), training.instruction)

    def note(self, claim: _Claim, message: str, *, level: str = "info") -> None:
        """Add an event to a job that still runs."""
        with self._store.writing() as session:
            job = self._find(session, claim)
            if job is not None:
                session.add(new_event(job, message, level=level))

    def finish(self, claim: _Claim, prepared: Prepared, *, planned_with: str) -> bool:
        """Offer the model; False where the job was cancelled meanwhile."""
        with self._store.writing() as session:
            job = self._find(session, claim)
            task = session.scalar(select(TaskRow).where(TaskRow.key == claim.task_key).with_for_update())
            if job is None or task is None:
                return False
            set_prepared(session, task, prepared, planned_with=planned_with)
            task.state, job.trained_tokens = "ready", prepared.prefix_tokens
            if task.left_out:
                session.add(new_event(job, describe_left_out(task), level="warn"))
            end_job(session, job, "succeeded", f"New fine-tuned model created: {job.model_name}")
        return True

    def fail(self, claim: _Claim, message: str, *, code: str) -> None:
        """End a job that cannot be done."""
        with self._store.writing() as session:
            job = self._find(session, claim)
            if job is not None:
                job.error = {
                    "code": code,
                    "message": message,
                    "param": "training_file" if code == "invalid_training_file" else None,
                }
                end_job(session, job, "failed", message, level="error")

    def _find(self, session: Session, claim: _Claim) -> JobRow | None:
        query = select(JobRow).where(JobRow.number == claim.number, JobRow.status == "running")
        return session.scalar(query.with_for_update())


def _preparing(claim: _Claim) -> Select[TaskRow]:
    return select(TaskRow).where(TaskRow.key == claim.task_key, TaskRow.state == "preparing")


def describe_left_out(task: TaskRow) -> str:
    """A sentence on the examples that are not in the context."""
    shown = "; ".join(f"line {line}: {reason}" for _, reason, line in task.left_out[:_SHOWN_LEFT_OUT])
    more = " …" if len(task.left_out) > _SHOWN_LEFT_OUT else ""
    return f"{task.num_examples - task.num_used} of {task.num_examples} examples are not in the context: {shown}{more}"


class JobRunner:
    """Runs jobs one after another, beside the service's requests, and removes deleted tasks beside them.

    Args:
        store: Where the jobs stand.
        backend: What computes the models.
    """

    def __init__(self, store: Store, backend: Backend) -> None:
        self.queue = JobQueue(store)
        self._store = store
        self._backend = backend
        self._has_jobs = asyncio.Event()
        self._has_doomed = asyncio.Event()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._notes: set[asyncio.Task[None]] = set()
        self._loops: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Go on with what was unfinished: jobs, and the removal of deleted tasks."""
        self.wake()
        work = ((self._has_jobs, self._run_queued), (self._has_doomed, self._forget_doomed))
        self._loops = [asyncio.create_task(self._repeat(*each)) for each in work]

    async def stop(self) -> None:
        """Stop at once; a job that runs is queued again. Nothing is written after this."""
        tasks = [*self._loops, *self._running.values(), *self._notes]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await run_whole(self.queue.requeue, is_orderly=True)

    def wake(self) -> None:
        """There is a new job, or something to remove."""
        self._has_jobs.set()
        self._has_doomed.set()

    def cancel(self, job_id: str) -> None:
        """Stop computing a job that was cancelled."""
        if job_id in self._running:
            self._running[job_id].cancel()
        self.wake()

    async def _repeat(self, is_wanted: asyncio.Event, work: Callable[[], Awaitable[None]]) -> None:
        """Work whenever it is wanted; what fails is tried again."""
        while True:
            await is_wanted.wait()
            is_wanted.clear()
            try:
                await work()
            except Exception as error:  # A full disk, a database that is away: try again later rather than never.
                logger.error("%s while jobs are run; trying again", type(error).__name__)
                await asyncio.sleep(_PROGRESS_SECONDS)
                is_wanted.set()

    async def _run_queued(self) -> None:
        await run_whole(self.queue.requeue)
        while (claim := await run_whole(self.queue.claim)) is not None:
            await self._do_claimed(claim)
            self._has_doomed.set()

    async def _do_claimed(self, claim: _Claim) -> None:
        """Run a job where its owner can cancel it without stopping this loop."""
        running = self._running[claim.id] = asyncio.create_task(self._do(claim))
        await asyncio.wait([running])
        del self._running[claim.id]
        if not running.cancelled():
            running.result()

    async def _forget_doomed(self) -> None:
        for key in await run_whole(self._store.doomed_keys):
            if key not in self._store.scratch_keys:
                await self._backend.forget(key)
                await run_whole(self._store.remove_task, key)

    async def _do(self, claim: _Claim) -> None:
        """One job, from its file to its model."""
        code, message = "internal_error", "The service failed at this job. It was logged; try again later."
        try:
            spec = await run_whole(self.queue.read, claim)
            if spec is None:
                return
            kind = f"{len(spec.labels)} labels" if spec.labels else "free text"
            await run_whole(self.queue.note, claim, f"{len(spec.examples)} examples read; {kind}.")
            prepared = await self._prepare(claim, spec)
            await run_whole(self.queue.finish, claim, prepared, planned_with=self._backend.context_identity)
            return
        except StorageError as error:
            self._log(claim, error)
            if has_no_space(error):
                code, message = "storage_full", "The service has no space left for this model."
        except UserInputError as error:
            code, message = "invalid_training_file", str(error)
        except ShortMemoryError as error:
            self._log(claim, error)
            code, message = "out_of_memory", "The service has too little memory for this model. Send less, or try again later."
        except ManyICLError as error:
            self._log(claim, error)
            code, message = "model_unavailable", "The model did not answer for too long. Try again later."
        except Exception as error:
            self._log(claim, error)
        await run_whole(self.queue.fail, claim, message, code=code)

    def _log(self, claim: _Claim, error: Exception) -> None:
        logger.error("%s in a job", type(error).__name__, extra={"job": claim.id, "errno": find_errno(error)})

    async def _prepare(self, claim: _Claim, spec: TaskSpec) -> Prepared:
        """What came of the examples; a backend that is busy or away is asked again and again, as long as patience lasts."""
        end, wait = time.monotonic() + _PATIENCE_SECONDS, _FIRST_WAIT_SECONDS
        while True:
            try:
                return await self._backend.prepare(spec, progress=self._progress(claim))
            except (UserInputError, ShortMemoryError):
                raise
            except ManyICLError as error:
                if time.monotonic() > end:
                    raise
                if wait == _FIRST_WAIT_SECONDS:
                    await run_whole(self.queue.note, claim, "The model does not answer; it is asked again.", level="warn")
                asked = error.retry_after_seconds if isinstance(error, OverloadedError) else 0.0
            await asyncio.sleep(min(max(wait, asked), _LONGEST_WAIT_SECONDS))
            wait = min(2 * wait, _LONGEST_WAIT_SECONDS)

    def _progress(self, claim: _Claim) -> Callable[[int, int], None]:
        """A function that notes how far a prefill is, now and then."""
        noted = time.monotonic()

        def note(done: int, total: int) -> None:
            nonlocal noted
            if done < total and time.monotonic() - noted > _PROGRESS_SECONDS:
                noted = time.monotonic()
                noting = asyncio.create_task(self._note(claim, f"{done} of {total} tokens computed."))
                self._notes.add(noting)
                noting.add_done_callback(self._notes.discard)

        return note

    async def _note(self, claim: _Claim, message: str) -> None:
        try:
            await run_whole(self.queue.note, claim, message)
        except SQLAlchemyError as error:  # The job itself is none the worse.
            logger.warning("%s while progress is noted", type(error).__name__)
