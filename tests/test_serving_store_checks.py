"""A folder and a database that do not belong together are refused and keep everything; a look at a folder changes nothing."""

import shutil
import sqlite3
from pathlib import Path

import pytest

from manyicl.errors import StorageError, UserInputError
from manyicl.serving.settings import Settings
from manyicl.serving.store import Store


def fill(folder: Path, content: bytes = b"bytes") -> Path:
    """A stopped service's folder with one upload; where that stands."""
    store = Store(Settings(folder))
    file = store.of("acme").add_file("t.jsonl", content)
    store.close()
    return store.path_of(file.id)


def change(folder: Path, *statements: str) -> None:
    connection = sqlite3.connect(folder / "service.sqlite")
    with connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()


def read(folder: Path, query: str) -> list[tuple[object, ...]]:
    connection = sqlite3.connect(folder / "service.sqlite")
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def test_a_new_database_beside_uploads_is_refused_again_and_again(tmp_path: Path) -> None:
    upload = fill(tmp_path)
    (tmp_path / "service.sqlite").unlink()
    for _ in range(2):
        with pytest.raises(UserInputError, match="1 uploaded files are in the folder, and 0 of them among the 0 of the database"):
            Store(Settings(tmp_path))
        assert upload.read_bytes() == b"bytes"


def test_another_services_database_is_refused(tmp_path: Path) -> None:
    upload = fill(tmp_path / "own")
    fill(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "service.sqlite", tmp_path / "own" / "service.sqlite")
    with pytest.raises(UserInputError, match="1 uploaded files are in the folder, and 0 of them among the 1 of the database"):
        Store(Settings(tmp_path / "own"))
    (tmp_path / "own" / "identity").unlink()
    with pytest.raises(UserInputError, match="Give the --data-dir and the --database-url that were used together"):
        Store(Settings(tmp_path / "own"))
    assert upload.read_bytes() == b"bytes"


def test_ids_that_differ_are_refused_and_can_be_made_anew(tmp_path: Path) -> None:
    upload = fill(tmp_path)
    (tmp_path / "identity").write_text(f"{'0' * 32}\n")
    with pytest.raises(UserInputError, match=f"and 1 of them among the 1 of the database.*; if these were, remove {tmp_path}/id"):
        Store(Settings(tmp_path))
    (tmp_path / "identity").unlink()
    Store(Settings(tmp_path)).close()
    assert upload.read_bytes() == b"bytes"


def test_a_database_without_its_folder_is_refused(tmp_path: Path) -> None:
    fill(tmp_path / "own")
    (tmp_path / "new").mkdir()
    shutil.copy(tmp_path / "own" / "service.sqlite", tmp_path / "new" / "service.sqlite")
    with pytest.raises(UserInputError, match="0 uploaded files are in the folder, and 0 of them among the 1 of the database"):
        Store(Settings(tmp_path / "new"))


@pytest.mark.parametrize("lost", ["folder", "database", "both"])
def test_an_id_that_is_missing_is_made_again_where_files_and_rows_meet(tmp_path: Path, lost: str) -> None:
    upload = fill(tmp_path)
    before = (tmp_path / "identity").read_text().strip()
    assert read(tmp_path, "SELECT id FROM identity") == [(before,)]
    if lost != "database":
        (tmp_path / "identity").unlink()
    if lost != "folder":
        change(tmp_path, "DELETE FROM identity")
    Store(Settings(tmp_path)).close()
    after = (tmp_path / "identity").read_text().strip()
    assert read(tmp_path, "SELECT id FROM identity") == [(after,)]
    assert (after == before) is (lost != "both")
    assert upload.read_bytes() == b"bytes"


def test_what_the_service_has_not_made_is_left_alone(tmp_path: Path) -> None:
    upload = fill(tmp_path)
    (upload.parent / "lost+found").mkdir()
    (upload.parent / "file-0123.jsonl").mkdir()
    (upload.parent / "notes.txt").write_text("mine")
    (upload.parent / "file-4567.jsonl").write_text("not acknowledged")
    Store(Settings(tmp_path)).close()
    assert {path.name for path in upload.parent.iterdir()} == {upload.name, "lost+found", "file-0123.jsonl", "notes.txt"}


def test_a_look_makes_and_removes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=r"none: no data folder of a service. Give the --data-dir of one that has run"):
        Store(Settings(tmp_path / "none"), is_checked=True)
    assert not (tmp_path / "none").exists()
    upload = fill(tmp_path / "data")
    left = upload.with_name("file-0123.jsonl")
    left.write_bytes(b"not acknowledged")
    store = Store(Settings(tmp_path / "data"), is_checked=True)
    assert store.check() == []
    store.close()
    assert left.exists()
    (tmp_path / "data" / "service.sqlite").unlink()
    with pytest.raises(UserInputError, match=r"service\.sqlite: there is no database. Give the --database-url"):
        Store(Settings(tmp_path / "data"), is_checked=True)
    assert (upload.exists(), (tmp_path / "data" / "service.sqlite").exists()) == (True, False)


def test_a_look_updates_no_tables(tmp_path: Path) -> None:
    fill(tmp_path)
    added = ("ALTER TABLE examples DROP COLUMN line", "ALTER TABLE tasks DROP COLUMN planned_with")
    change(tmp_path, *added, "DROP TABLE identity", "UPDATE alembic_version SET version_num = '0001'")
    with pytest.raises(UserInputError, match=r"tables are those of version 0001, not 0003\. Start the service once"):
        Store(Settings(tmp_path), is_checked=True)
    assert read(tmp_path, "SELECT version_num FROM alembic_version") == [("0001",)]
    Store(Settings(tmp_path)).close()
    assert read(tmp_path, "SELECT version_num FROM alembic_version") == [("0003",)]


def test_a_folder_is_its_owners_alone(tmp_path: Path) -> None:
    Store(Settings(tmp_path / "new")).close()
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    (tmp_path / "shared").mkdir(mode=0o750)
    Store(Settings(tmp_path / "shared")).close()
    assert (tmp_path / "shared").stat().st_mode & 0o777 == 0o750


def test_a_folder_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("in the way")
    with pytest.raises(StorageError, match="data: cannot be written"):
        Store(Settings(tmp_path / "data"))
