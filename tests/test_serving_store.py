import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from manyicl.errors import StorageError, UserInputError
from manyicl.serving.backends import Prepared
from manyicl.serving.database import TaskRow
from manyicl.serving.errors import ApiError
from manyicl.serving.jobs import JobQueue
from manyicl.serving.settings import Limits, Settings
from manyicl.serving.store import JobRequest, Owned, Page, Store
from manyicl.tasks.task import Example
from serving_fixtures import TICKETS, chat_file
from test_files import largest_file

PREPARED = Prepared(6, 30, 30, (), 0.5)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(Settings(tmp_path, limits=Limits(max_files=3, max_tasks=3, max_unfinished_jobs=2)))
    yield store
    store.close()


@pytest.fixture
def owned(store: Store) -> Owned:
    return store.of("acme")


def make_task(owned: Owned, name: str = "tickets", *, prepared: Prepared = PREPARED) -> TaskRow:
    file = owned.add_file("t.jsonl", chat_file(TICKETS))
    owned.add_job(JobRequest(file.id, name, 0))
    queue = JobQueue(owned.store)
    claim = queue.claim()
    assert claim is not None
    queue.read(claim)
    assert queue.finish(claim, prepared, planned_with="fake")
    return owned.task(name)


def test_what_was_stored_is_there_when_it_is_opened_again(tmp_path: Path) -> None:
    store = Store(Settings(tmp_path))
    owned = store.of("acme")
    file = owned.add_file("t.jsonl", b"bytes")
    spec = store.read_spec(make_task(owned))
    store.close()
    again = Store(Settings(tmp_path))
    try:
        assert again.of("acme").file_content(file.id) == b"bytes"
        found = again.read_spec(again.of("acme").task("tickets"))
        assert (found, len(found.examples), found.labels) == (spec, 6, ("billing", "bug"))
        assert {(example.input, example.answer) for example in found.examples} == set(TICKETS)
        assert again.check() == []
    finally:
        again.close()


def test_sqlite_syncs_each_commit_to_a_write_ahead_log(store: Store) -> None:
    with store.reading() as session:
        assert session.scalar(text("PRAGMA journal_mode")) == "wal"
        assert session.scalar(text("PRAGMA synchronous")) == 2
        assert session.scalar(text("PRAGMA foreign_keys")) == 1


def test_a_disk_that_fills_keeps_nothing_of_a_file(store: Store, owned: Owned) -> None:
    owned.add_file("small.jsonl", b"x")
    with largest_file(10_000_000), pytest.raises(StorageError, match="File too large"):
        owned.add_file("large.jsonl", b"x" * 20_000_000)
    assert [file.name for file in owned.files(Page())[0]] == ["small.jsonl"]
    assert len(list(store.folder.iterdir())) == 1
    assert store.check() == []


def test_bytes_that_no_row_speaks_of_are_removed_at_the_next_start(tmp_path: Path) -> None:
    store = Store(Settings(tmp_path))
    file = store.of("acme").add_file("t.jsonl", b"bytes")
    (store.folder / "file-0123.jsonl").write_bytes(b"not acknowledged")
    (store.folder / ".file-0123.jsonl.abc.tmp").write_bytes(b"half")
    store.close()
    again = Store(Settings(tmp_path))
    again.close()
    assert [path.name for path in again.folder.iterdir()] == [f"{file.id}.jsonl"]


def test_check_finds_bytes_that_are_gone_or_changed(store: Store, owned: Owned) -> None:
    gone, changed = owned.add_file("a", b"one"), owned.add_file("b", b"two")
    store.path_of(gone.id).unlink()
    store.path_of(changed.id).write_bytes(b"twO")
    assert store.check() == [
        f"file {gone.id}: its bytes are gone",
        f"file {changed.id}: its bytes are not those that were uploaded",
    ]


@pytest.mark.parametrize(
    ("statement", "problem"),
    [
        ("DELETE FROM examples WHERE position = 5", "5 examples up to place 4; 6 were acknowledged"),
        ("DELETE FROM examples WHERE position = 2", "5 examples up to place 5; 6 were acknowledged"),
        ("UPDATE tasks SET state = 'preparing'", "in preparation, and no job prepares it"),
        ("UPDATE tasks SET name = NULL", "ready without a name"),
    ],
)
def test_check_finds_tasks_that_are_not_whole(store: Store, owned: Owned, statement: str, problem: str) -> None:
    row = make_task(owned)
    with store.writing() as session:
        session.execute(text(statement))
    assert store.check() == [f"task {row.key}: {problem}"]


def test_a_task_is_offered_by_the_commit_that_makes_it_ready(store: Store, owned: Owned) -> None:
    file = owned.add_file("t.jsonl", chat_file(TICKETS))
    job = owned.add_job(JobRequest(file.id, "tickets", 0))
    queue = JobQueue(store)
    claim = queue.claim()
    assert claim is not None
    assert owned.job(job.id).status == "running"
    queue.read(claim)
    assert owned.tasks() == []
    with pytest.raises(ApiError, match="'tickets' does not exist"):
        owned.task("tickets")
    queue.finish(claim, PREPARED, planned_with="fake")
    assert [row.name for row in owned.tasks()] == ["tickets"]
    assert owned.job(job.id).status == "succeeded"


def test_a_job_found_running_goes_on_and_keeps_its_examples(store: Store, owned: Owned) -> None:
    file = owned.add_file("t.jsonl", chat_file(TICKETS))
    job = owned.add_job(JobRequest(file.id, "tickets", 5))
    queue = JobQueue(store)
    claim = queue.claim()
    assert claim is not None
    spec = queue.read(claim)
    owned.delete_file(file.id)  # Of no use any more: the examples are kept.
    queue.requeue()
    again = queue.claim()
    assert again == claim
    assert queue.read(again) == spec
    for _ in range(20):
        queue.requeue()
        queue.claim()
    failed = owned.job(job.id)
    assert (failed.status, failed.error and failed.error["code"]) == ("failed", "interrupted")
    assert store.doomed_keys() == [spec.key]


def test_an_orderly_stop_is_no_fault_of_a_job(store: Store, owned: Owned) -> None:
    job = owned.add_job(JobRequest(owned.add_file("t", chat_file(TICKETS)).id, "tickets", 0))
    queue = JobQueue(store)
    for _ in range(30):
        assert queue.claim() is not None
        queue.requeue(is_orderly=True)
    assert owned.job(job.id).status == "queued"


def test_a_job_whose_file_was_deleted_says_so(store: Store, owned: Owned) -> None:
    file = owned.add_file("t.jsonl", chat_file(TICKETS))
    owned.add_job(JobRequest(file.id, "tickets", 0))
    owned.delete_file(file.id)
    queue = JobQueue(store)
    claim = queue.claim()
    assert claim is not None
    with pytest.raises(UserInputError, match=f"the training file {file.id} was deleted before it was read"):
        queue.read(claim)


def test_tenants_take_turns(store: Store) -> None:
    for tenant, num_jobs in (("a", 2), ("b", 2), ("c", 1)):
        owned = store.of(tenant)
        file = owned.add_file("t", chat_file(TICKETS))
        for number in range(num_jobs):
            owned.add_job(JobRequest(file.id, f"m{number}", 0))
    queue = JobQueue(store)
    assert [claim.tenant for _ in range(5) if (claim := queue.claim())] == ["a", "b", "c", "a", "b"]
    assert queue.claim() is None


def test_a_job_cancelled_at_the_last_moment_makes_no_model(store: Store, owned: Owned) -> None:
    job = owned.add_job(JobRequest(owned.add_file("t", chat_file(TICKETS)).id, "tickets", 0))
    queue = JobQueue(store)
    claim = queue.claim()
    assert claim is not None
    queue.read(claim)
    owned.cancel_job(job.id)
    assert queue.finish(claim, PREPARED, planned_with="fake") is False
    queue.fail(claim, "no", code="no")
    queue.note(claim, "no")
    assert (owned.job(job.id).status, owned.tasks()) == ("cancelled", [])
    assert owned.job_events(job.id, Page())[0][0].message == "The job was cancelled."
    assert store.doomed_keys() == [claim.task_key]
    store.remove_task(claim.task_key)
    assert store.check() == []
    with store.reading() as session:
        assert session.scalar(text("SELECT count(*) FROM examples")) == 0


def test_appended_examples_stand_behind_the_others(store: Store, owned: Owned) -> None:
    before = make_task(owned)
    old = store.read_spec(before)
    more = (Example("new", "bug"), Example("newer", "billing"))
    after = owned.append_examples(before, more, Prepared(7, 40, 10, ((7, "too long"),), 0.25), planned_with="fake")
    assert (after.num_examples, after.num_used, after.prefix_tokens, after.left_out) == (8, 7, 40, [[7, "too long", None]])
    assert (after.computed_tokens, after.prefill_seconds) == (40, 0.75)
    assert store.read_spec(after).examples == old.examples + more
    assert store.read_spec(before).examples == old.examples
    with pytest.raises(ApiError, match="was changed in the meantime") as raised:
        owned.append_examples(before, more, PREPARED, planned_with="fake")
    assert raised.value.status == 409
    assert store.check() == []


def test_appending_at_the_same_time_loses_nothing(store: Store, owned: Owned) -> None:
    row = make_task(owned)
    done: list[int] = []

    def append(number: int) -> None:
        while True:
            try:
                owned.append_examples(owned.task("tickets"), [Example(f"n{number}", "bug")], PREPARED, planned_with="fake")
            except ApiError:
                continue
            done.append(number)
            return

    threads = [threading.Thread(target=append, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spec = store.read_spec(owned.task("tickets"))
    assert sorted(example.input for example in spec.examples[6:]) == [f"n{number}" for number in range(8)]
    assert (len(done), row.key, store.check()) == (8, spec.key, [])


def test_limits_of_a_tenant_are_its_own(store: Store, owned: Owned) -> None:
    file = owned.add_file("t", chat_file(TICKETS))
    owned.add_job(JobRequest(file.id, "one", 0))
    owned.add_job(JobRequest(file.id, "two", 0))
    with pytest.raises(ApiError, match="2 jobs are unfinished") as raised:
        owned.add_job(JobRequest(file.id, "three", 0))
    assert (raised.value.status, raised.value.headers) == (429, {"Retry-After": "10"})
    for _ in range(2):
        owned.add_file("t", b"x")
    with pytest.raises(ApiError, match="You have 3 files, which is the most"):
        owned.add_file("t", b"x")
    assert len(list(store.folder.iterdir())) == 3
    other = store.of("other")
    other.add_job(JobRequest(other.add_file("t", b"x").id, "one", 0))


def test_a_measurement_that_was_cut_short_leaves_nothing(tmp_path: Path) -> None:
    store = Store(Settings(tmp_path))
    key = "0" * 32
    store.of("acme").add_scratch(key)
    store.close()
    again = Store(Settings(tmp_path))
    assert (again.doomed_keys(), again.scratch_keys, again.check()) == ([key], set(), [])
    again.close()


def test_a_folder_is_used_by_one_service(tmp_path: Path, store: Store) -> None:
    with pytest.raises(UserInputError, match="another service is using this folder"):
        Store(Settings(tmp_path))


def test_a_file_that_is_no_database_is_told(tmp_path: Path) -> None:
    (tmp_path / "service.sqlite").write_bytes(b"x" * 5000)
    with pytest.raises(UserInputError, match="the database cannot be opened"):
        Store(Settings(tmp_path))
    (tmp_path / "service.sqlite").unlink()
    Store(Settings(tmp_path)).close()


def test_a_transaction_that_was_not_committed_is_nowhere(tmp_path: Path) -> None:
    store = Store(Settings(tmp_path))
    owned = store.of("acme")
    with store.writing() as session:
        session.add(TaskRow(key="0" * 32, tenant="acme", name="x", state="ready", created_at=0))
        session.flush()
        session.rollback()
    assert owned.tasks() == []
    store.close()
    with sqlite3.connect(tmp_path / "service.sqlite") as connection:
        assert connection.execute("SELECT count(*) FROM tasks").fetchone() == (0,)
    connection.close()
