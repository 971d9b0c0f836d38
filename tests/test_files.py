import errno
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors import SafetensorError

from manyicl.errors import StorageError
from manyicl.files import hash_file, storage_errors, write_bytes_atomic, write_json_atomic, write_text_atomic


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Let no file grow beyond `num_bytes`: writes fail in the middle, as on a disk that fills."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_is_written_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "folder" / "fil\u00e9 \u732b.json"
    write_json_atomic(path, {"text": "caf\u00e9"})
    assert path.read_bytes() == '{\n  "text": "café"\n}\n'.encode()
    write_text_atomic(path, "second")
    assert path.read_text(encoding="utf-8") == "second"
    assert [child.name for child in path.parent.iterdir()] == [path.name]


def test_a_file_that_is_replaced_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    write_text_atomic(path, "first")
    assert path.stat().st_mode & 0o777 == 0o644
    path.chmod(0o640)
    write_text_atomic(path, "second")
    assert (path.stat().st_mode & 0o777, path.read_text(encoding="utf-8")) == (0o640, "second")


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_no_temporary_one(tmp_path: Path, monkeypatch, name: str) -> None:
    path = tmp_path / "summary.json"
    path.write_text("old")

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((os, "fsync", fail) if name == "fsync" else (Path, "replace", fail)))
    with pytest.raises(StorageError) as raised:
        write_bytes_atomic(path, b"new")
    assert str(raised.value) == (
        f"{path}: cannot be written (No space left on device). Free some space or choose a folder that you may write."
    )
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"old")
    with largest_file(4096), pytest.raises(StorageError, match=r"weights\.bin: cannot be written \(File too large\)"):
        write_bytes_atomic(path, b"x" * 100_000)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_leaves_no_temporary_file(tmp_path: Path, monkeypatch) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_bytes_atomic(tmp_path / "a", b"new")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(StorageError, match="cannot be written"):
        write_text_atomic(blocked / "below" / "a.txt", "text")
    assert blocked.read_text() == "in the way"


@pytest.mark.parametrize("error", [ValueError("mine"), RuntimeError("shapes do not fit"), KeyError("mine")])
def test_storage_errors_pass_other_errors_on(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, storage_errors(Path("x")):
        raise error
    assert raised.value is error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (OSError("no number"), "no number"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "I/O error: No space left on device (os error 28)"),
        (
            RuntimeError("[enforce fail at inline_container.cc:626] . unexpected pos"),
            "[enforce fail at inline_container.cc:626] .",
        ),
    ],
)
def test_what_libraries_raise_for_a_full_disk_is_a_storage_error(error: Exception, reason: str) -> None:
    with pytest.raises(StorageError) as raised, storage_errors(Path("run/model.safetensors")):
        raise error
    assert str(raised.value).startswith(f"run/model.safetensors: cannot be written ({reason}")
    assert raised.value.__cause__ is error


def test_hash_is_the_sha256_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    assert hash_file(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json_atomic(path, [1])
    with pytest.raises(TypeError):
        write_json_atomic(path, {1, 2})
    assert json.loads(path.read_text()) == [1]
