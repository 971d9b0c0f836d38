"""The same layer on SQLite and on a real PostgreSQL, and tables that are what the code says they are."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect, text

from manyicl.errors import UserInputError
from manyicl.serving.database import Base, open_database, writing
from manyicl.serving.settings import Settings
from manyicl.serving.store import JobRequest, Store
from serving_fixtures import CAPITALS, TICKETS, FakeBackend, chat_file, plain_file, serving, wait_for
from test_serving_guard import Caller, error_of
from test_serving_store import PREPARED, make_task

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin")) if Path("/usr/lib/postgresql").is_dir() else []


def as_server(command: list[str]) -> None:
    """Run a program of PostgreSQL, which refuses to be root."""
    user = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
    subprocess.run(command, check=True, capture_output=True, **user, cwd="/")  # type: ignore[call-overload]


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server on loopback, up to the name of a database."""
    if not PROGRAMS:
        pytest.skip("needs Debian's package postgresql")
    folder = Path(tmp_path_factory.mktemp("postgres")) / "data"
    folder.mkdir()
    if os.geteuid() == 0:
        for each in (folder, *folder.parents):
            if "pytest-of-" in str(each):  # pytest's folders are their owner's alone.
                each.chmod(0o755)
        shutil.chown(folder, "postgres", "postgres")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    programs = PROGRAMS[-1]
    as_server([str(programs / "initdb"), "-D", str(folder), "-U", "postgres", "--auth=trust", "-E", "UTF8", "--no-sync"])
    options = f"-c listen_addresses=127.0.0.1 -p {port} -k {folder} -c fsync=off"
    control = [str(programs / "pg_ctl"), "-D", str(folder), "-w"]
    as_server([*control, "-o", options, "-l", str(folder / "log"), "start"])
    try:
        yield f"postgresql+psycopg://postgres@127.0.0.1:{port}"
    finally:
        as_server([*control, "-m", "immediate", "stop"])


@pytest.fixture
def database_url(postgres: str, request: pytest.FixtureRequest) -> str:
    """A database of this test's own."""
    name = f"test_{abs(hash(request.node.name))}"
    engine = open_database(f"{postgres}/postgres", Path("/"))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return f"{postgres}/{name}"


def test_migrations_make_the_tables_of_the_code(tmp_path: Path) -> None:
    engine = open_database(None, tmp_path)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
        assert set(inspect(connection).get_table_names()) == {*Base.metadata.tables, "alembic_version"}
    engine.dispose()


def test_a_database_is_brought_up_to_date_once(tmp_path: Path) -> None:
    for _ in range(2):
        engine = open_database(None, tmp_path)
        with writing(engine) as connection:
            assert connection.scalar(text("SELECT version_num FROM alembic_version")) == "0003"
        engine.dispose()


def test_a_url_that_cannot_be_used_is_told_without_its_password(tmp_path: Path) -> None:
    for url in ("nonsense", "mongodb://host/name"):
        with pytest.raises(UserInputError, match="Write postgresql://USER:PASSWORD@HOST/NAME"):
            open_database(url, tmp_path)
    pytest.importorskip("psycopg")
    with pytest.raises(UserInputError, match="the database cannot be opened") as raised:
        open_database("postgresql+psycopg://me:secret@127.0.0.1:1/name", tmp_path)
    assert "secret" not in str(raised.value)


def test_postgresql_has_the_tables_of_the_code(database_url: str, tmp_path: Path) -> None:
    engine = open_database(database_url, tmp_path)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    engine.dispose()


def test_postgresql_keeps_what_tenants_own(database_url: str, tmp_path: Path) -> None:
    store = Store(Settings(tmp_path, database_url=database_url))
    owned = store.of("acme")
    row = make_task(owned)
    spec = store.read_spec(row)
    with pytest.raises(UserInputError, match="another service is using this database"):
        Store(Settings(tmp_path / "elsewhere", database_url=database_url))
    store.close()
    again = Store(Settings(tmp_path, database_url=database_url))
    assert again.read_spec(again.of("acme").task("tickets")) == spec
    assert again.of("acme").append_examples(row, spec.examples[:2], PREPARED, planned_with="fake").num_examples == 8
    file = again.of("acme").add_file("t", chat_file(TICKETS))
    with pytest.raises(Exception, match="A model named 'tickets' exists"):
        again.of("acme").add_job(JobRequest(file.id, "tickets", 0))
    assert again.check() == []
    again.close()


def test_the_service_runs_on_postgresql(database_url: str, tmp_path: Path) -> None:
    backend = FakeBackend(tmp_path / "fake")
    with serving(Settings(tmp_path / "data", database_url=database_url), backend) as address:
        call = Caller(address)
        call.make_model()
        file_id = call.upload(plain_file(CAPITALS), name="caf\u00e9.jsonl")[1]["id"]
        job = call("POST", "/v1/fine_tuning/jobs", {"training_file": file_id, "suffix": "capitals", "metadata": {"k": "v"}})[1]
        done = wait_for(lambda: (found := call("GET", f"/v1/fine_tuning/jobs/{job['id']}")[1])["finished_at"] and found)
        assert (done["status"], done["metadata"]) == ("succeeded", {"k": "v"})
        classified = call("POST", "/v1/classify", {"model": "tickets", "input": "my invoice"})[1]
        assert classified["data"][0]["label"] == "billing"
        assert call("POST", "/v1/tasks/tickets/examples", {"examples": [{"input": "x", "answer": "bug"}]})[0] == 200
        assert call("DELETE", "/v1/models/capitals")[0] == 200
        assert error_of(call("GET", "/v1/models/capitals"))["code"] == "model_not_found"
        wait_for(lambda: len(backend.kept) == 1)
        for path in ("/v1/models/x%00y", "/v1/files/%00", "/v1/fine_tuning/jobs?after=%00", "/v1/tasks/%ed%a0%80"):
            assert call("GET", path)[0] in (400, 404), path
        assert call("POST", "/v1/classify", {"model": "x\x00y", "input": "x"})[0] == 400
