"""Jobs wait for a backend that is away, hold up nothing else, and end with the reason; what is stopped writes nothing after."""

import asyncio
import errno
import json
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from manyicl.errors import BudgetError, ManyICLError, OverloadedError, StorageError
from manyicl.serving import jobs
from manyicl.serving.app import run_service
from manyicl.serving.backends import Prepared, ShortMemoryError, TaskSpec
from manyicl.serving.jobs import JobQueue, JobRunner
from manyicl.serving.measuring import Split, measure
from manyicl.serving.observing import JsonFormatter
from manyicl.serving.service import Served
from manyicl.serving.settings import Limits, Settings
from manyicl.serving.store import JobRequest, Owned, Page, Store
from manyicl.tasks.task import Example
from serving_fixtures import TICKETS, FakeBackend, chat_file, overloaded, serving, wait_for
from test_serving_guard import Caller, error_of

SPEC = TaskSpec("a" * 32, tuple(Example(given, answer) for given, answer in TICKETS), ("billing", "bug"))
WAITING = "The model does not answer; it is asked again."


class Gate:
    """Holds a function back in its thread until it is let go."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.began, self.go_on = threading.Event(), threading.Event()

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.began.set()
        assert self.go_on.wait(10)
        return self.function(*arguments, **options)

    async def until_begun(self) -> None:
        assert await asyncio.to_thread(self.began.wait, 10)


async def stop_while_held(runner: JobRunner, gate: Gate) -> None:
    """Stop a runner, which has to wait for what a gate holds back."""
    stopping = asyncio.create_task(runner.stop())
    await asyncio.sleep(0.05)
    assert not stopping.done()
    gate.go_on.set()
    await stopping


def add_job(store: Store, name: str = "tickets") -> str:
    owned = store.of("local")
    return owned.add_job(JobRequest(owned.add_file("t.jsonl", chat_file(TICKETS)).id, name, 0)).id


def ask_for_model(call: Caller, name: str = "tickets") -> str:
    file_id = call.upload(chat_file(TICKETS))[1]["id"]
    return str(call("POST", "/v1/fine_tuning/jobs", {"training_file": file_id, "suffix": name})[1]["id"])


def wait_for_end(call: Caller, job_id: str) -> dict[str, Any]:
    return dict(wait_for(lambda: (job := call("GET", f"/v1/fine_tuning/jobs/{job_id}")[1])["finished_at"] and job))


def messages(call: Caller, job_id: str) -> list[str]:
    return [event["message"] for event in call("GET", f"/v1/fine_tuning/jobs/{job_id}/events?limit=100")[1]["data"]]


def in_service(tmp_path: Path, backend: FakeBackend, scenario: Callable[[Any], Awaitable[None]]) -> None:
    async def whole() -> None:
        async with run_service(Settings(tmp_path / "data"), backend) as service:
            await asyncio.wait_for(scenario(service), 20)

    asyncio.run(whole())


def test_a_job_waits_for_a_backend_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_FIRST_WAIT_SECONDS", 0.01)
    backend = FakeBackend(tmp_path / "fake")
    backend.failure = ManyICLError("http://inside:9000 cannot be reached")
    with serving(Settings(tmp_path / "data"), backend) as address:
        call = Caller(address)
        job_ids = [ask_for_model(call, name) for name in ("one", "two")]
        wait_for(lambda: backend.calls.count("prepare") >= 4)
        assert [call("GET", f"/v1/fine_tuning/jobs/{job_id}")[1]["status"] for job_id in job_ids] == ["running", "queued"]
        backend.failure = None
        assert [wait_for_end(call, job_id)["status"] for job_id in job_ids] == ["succeeded", "succeeded"]
        assert [messages(call, job_id).count(WAITING) for job_id in job_ids] == [1, 0]


@pytest.mark.parametrize(
    ("error", "waits"),
    [
        (ManyICLError("away"), [1, 2, 4, 8, 16, 32, 60, 60]),
        (overloaded(0), [1, 2, 4, 8, 16, 32, 60, 60]),
        (overloaded(20), [20, 20, 20, 20, 20, 32, 60, 60]),
        (overloaded(10_000), [60] * 8),
    ],
)
def test_the_backend_is_asked_less_and_less_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, waits: list[float]
) -> None:
    slept: list[float] = []

    class Away(FakeBackend):
        async def prepare(self, spec: TaskSpec, **options: Any) -> Prepared:
            if len(slept) == len(waits):
                return Prepared(6, 30, 30, (), 0.5)
            raise error

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async def scenario() -> Prepared:
        store = Store(Settings(tmp_path / "data"))
        runner = JobRunner(store, Away(tmp_path))
        add_job(store)
        claim = runner.queue.claim()
        assert claim is not None
        monkeypatch.setattr(asyncio, "sleep", sleep)
        try:
            return await runner._prepare(claim, SPEC)
        finally:
            store.close()

    assert asyncio.run(scenario()).num_used == 6
    assert slept == waits


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (ManyICLError("http://inside:9000"), "model_unavailable", "The model did not answer for too long. Try again later."),
        (OverloadedError("inside", retry_after_seconds=0), "model_unavailable", "The model did not answer for too long."),
        (ShortMemoryError("inside"), "out_of_memory", "The service has too little memory for this model."),
        (StorageError("inside"), "storage_full", "The service has no space left for this model."),
        (PermissionError(errno.EACCES, "inside"), "internal_error", "The service failed at this job. It was logged"),
        (BudgetError("none fits."), "invalid_training_file", "none fits."),
        (ValueError("inside"), "internal_error", "The service failed at this job. It was logged"),
    ],
)
def test_a_job_that_fails_says_why(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    code: str,
    shown: str,
) -> None:
    monkeypatch.setattr(jobs, "_PATIENCE_SECONDS", -1.0)
    backend = FakeBackend(tmp_path / "fake")
    backend.failure = error
    with serving(Settings(tmp_path / "data"), backend) as address:
        call = Caller(address)
        found = wait_for_end(call, ask_for_model(call))["error"]
    assert (found["code"], found["message"].startswith(shown), "inside" in found["message"]) == (code, True, False)
    logged = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert logged == ([] if code == "invalid_training_file" else [f"{type(error).__name__} in a job"])


def test_a_folder_that_cannot_be_written_is_not_taken_for_a_full_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backend = FakeBackend(tmp_path / "fake")
    backend.failure = StorageError("/data/private: cannot be written.")
    backend.failure.__cause__ = OSError(errno.EROFS, os.strerror(errno.EROFS))
    with serving(Settings(tmp_path / "data"), backend) as address:
        call = Caller(address)
        assert wait_for_end(call, ask_for_model(call))["error"]["code"] == "internal_error"
    [line] = [json.loads(JsonFormatter().format(record)) for record in caplog.records if record.levelno == logging.ERROR]
    assert (line["event"], line["errno"]) == ("StorageError in a job", errno.EROFS)
    assert "private" not in json.dumps(line)


def test_what_is_deleted_does_not_wait_for_a_long_job(tmp_path: Path) -> None:
    backend = FakeBackend(tmp_path / "fake")
    with serving(Settings(tmp_path / "data", limits=Limits(max_tasks=2)), backend) as address:
        call = Caller(address)
        call.make_model("one")
        backend.delay = 60
        ask_for_model(call, "long")
        wait_for(lambda: backend.calls.count("prepare") == 2)
        assert call("DELETE", "/v1/models/one")[0] == 200
        wait_for(lambda: backend.kept == {}, seconds=5)
        assert call("DELETE", "/v1/models/long")[0] == 404
        assert ask_for_model(call, "another")


def test_tasks_that_are_being_removed_count_no_longer(tmp_path: Path) -> None:
    store = Store(Settings(tmp_path, limits=Limits(max_tasks=1)))
    for place in range(3):
        store.of("local").add_scratch(f"{place}" * 32)
    assert store.of("local").job(add_job(store)).status == "queued"
    store.close()


def test_a_job_that_was_cancelled_before_it_began_computes_nothing(tmp_path: Path) -> None:
    backend = FakeBackend(tmp_path / "fake")

    async def scenario(service: Any) -> None:
        queue, owned = service.runner.queue, service.store.of("local")
        claim, claimed = queue.claim, []

        def claim_and_cancel() -> Any:
            found = claim()
            if found is not None:
                owned.cancel_job(found.id)  # Before the runner knows that it runs.
                claimed.append(found)
            return found

        queue.claim = claim_and_cancel
        job_id = await asyncio.to_thread(add_job, service.store)
        service.runner.wake()
        while not claimed or await asyncio.to_thread(service.store.doomed_keys):
            await asyncio.sleep(0.01)
        assert await asyncio.to_thread(queue.read, claimed[0]) is None
        assert (await asyncio.to_thread(owned.job, job_id)).status == "cancelled"

    in_service(tmp_path, backend, scenario)
    assert backend.calls == ["forget"]


def test_stopping_waits_for_what_is_being_written(tmp_path: Path) -> None:
    store = Store(Settings(tmp_path / "data"))
    job_id = add_job(store)

    async def scenario() -> None:
        runner = JobRunner(store, FakeBackend(tmp_path / "fake"))
        gate = Gate(runner.queue.claim)
        runner.queue.claim = gate  # type: ignore[method-assign]
        runner.start()
        await gate.until_begun()
        await stop_while_held(runner, gate)

    asyncio.run(scenario())
    job = store.of("local").job(job_id)
    assert (job.status, job.attempts) == ("queued", 0)
    store.close()


def test_progress_that_is_being_noted_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_PROGRESS_SECONDS", 0.0)
    store = Store(Settings(tmp_path / "data"))
    job_id = add_job(store)

    async def scenario() -> None:
        runner = JobRunner(store, FakeBackend(tmp_path / "fake"))
        claim = runner.queue.claim()
        assert claim is not None
        gate = Gate(runner.queue.note)
        runner.queue.note = gate  # type: ignore[method-assign]
        runner._progress(claim)(5, 10)
        await gate.until_begun()
        await stop_while_held(runner, gate)

    asyncio.run(scenario())
    found = [event.message for event in store.of("local").job_events(job_id, Page())[0]]
    assert found[:2] == ["The service was stopped; the job will go on.", "5 of 10 tokens computed."]
    store.close()


def test_every_part_is_stopped_where_one_fails(tmp_path: Path) -> None:
    backend = FakeBackend(tmp_path / "fake")

    def fail(*, is_orderly: bool = False) -> None:
        raise OSError("the database is away")

    async def scenario(service: Any) -> None:
        assert backend.is_started
        service.runner.queue.requeue = fail

    with pytest.raises(OSError, match="the database is away"):
        in_service(tmp_path, backend, scenario)
    assert not backend.is_started
    Store(Settings(tmp_path / "data")).close()  # Not locked any more.


def test_a_measurement_that_is_cancelled_at_its_start_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = FakeBackend(tmp_path / "fake")
    gate = Gate(Owned.add_scratch)
    monkeypatch.setattr(Owned, "add_scratch", lambda owned, key: gate(owned, key))

    async def scenario(service: Any) -> None:
        owned, served = service.store.of("local"), Served("tickets", SPEC, None)
        measuring = asyncio.create_task(measure(service, owned, served, Split(0.5, 0), deadline=time.monotonic() + 60))
        await gate.until_begun()
        assert len(service.store.scratch_keys) == 1
        measuring.cancel()
        await asyncio.sleep(0.05)
        gate.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await measuring
        assert service.store.scratch_keys == set()
        while backend.calls != ["forget"] or await asyncio.to_thread(service.store.doomed_keys):
            await asyncio.sleep(0.01)

    in_service(tmp_path, backend, scenario)


def test_old_finished_jobs_go_and_their_models_stay(tmp_path: Path) -> None:
    store = Store(Settings(tmp_path, limits=Limits(max_finished_jobs=2)))
    queue = JobQueue(store)
    other = store.of("other")
    other.cancel_job(other.add_job(JobRequest(other.add_file("t", b"x").id, "theirs", 0)).id)
    job_ids = []
    for number in range(4):
        job_ids.append(add_job(store, f"m{number}"))
        claim = queue.claim()
        assert claim is not None
        queue.read(claim)
        queue.finish(claim, Prepared(6, 30, 30, (), 0.5), planned_with="fake")
    job_ids.append(add_job(store, "last"))
    owned = store.of("local")
    assert [job.id for job in owned.jobs(Page())[0]] == [job_ids[4], job_ids[3], job_ids[2]]
    assert [row.name for row in owned.tasks()] == ["m0", "m1", "m2", "m3"]
    assert len(other.jobs(Page())[0]) == 1
    with store.reading() as session:
        assert session.scalar(text("SELECT count(DISTINCT job) FROM job_events")) == 4
    assert store.check() == []
    store.close()


def test_readiness_costs_no_count_and_tells_of_a_model_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(store: Store) -> dict[str, int]:
        raise AssertionError("counted")

    monkeypatch.setattr(Store, "count_jobs", fail)
    backend = FakeBackend(tmp_path / "fake")
    with serving(Settings(tmp_path / "data"), backend) as address:
        call = Caller(address)
        assert call("GET", "/readyz")[:2] == (200, {"status": "ok"})
        backend.is_alive = False
        answer = call("GET", "/readyz")
        assert (answer[0], error_of(answer)["code"]) == (503, "not_ready")
        assert call("GET", "/healthz")[0] == 200


def test_the_backends_load_is_read_on_its_own_event_loop(tmp_path: Path) -> None:
    class Noting(FakeBackend):
        async def start(self) -> None:
            await super().start()
            self.home, self.threads = threading.get_ident(), set[int]()

        def load(self) -> Any:
            self.threads.add(threading.get_ident())
            return super().load()

    backend = Noting(tmp_path / "fake")
    with serving(Settings(tmp_path / "data"), backend) as address:
        assert Caller(address)("GET", "/metrics")[0] == 200
    assert backend.threads == {backend.home}


def test_an_answer_that_stands_once_among_labels_is_told(tmp_path: Path) -> None:
    store = Store(Settings(tmp_path))
    try:
        queue, owned = JobQueue(store), store.of("local")
        file_id = owned.add_file("t.jsonl", chat_file([*TICKETS, ("charged again", "biling")])).id
        job_id = owned.add_job(JobRequest(file_id, "tickets", 0)).id
        claim = queue.claim()
        assert claim is not None
        spec = queue.read(claim)
        assert spec is not None
        assert spec.labels == ()
        message = store.of("local").job_events(job_id, Page())[0][0].message
        assert message == (
            "t.jsonl: line 7: the answer 'biling' stands once only, as 1 of 3 answers do, so that all are read as free text. If "
            "they are labels, correct it, add an example of it, or list the labels in the job's `labels`."
        )
    finally:
        store.close()
