"""Compiling a library once, keeping it, and what is said where that fails."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from manyicl.kernels import build


@pytest.fixture(autouse=True)
def _small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library of one function, in place of the kernel's sources."""
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "one.cpp").write_text('#include "one.h"\nextern "C" long one() { return ONE; }\n')
    (tmp_path / "sources" / "one.h").write_text("#define ONE 1\n")
    monkeypatch.setattr(build, "FOLDER", tmp_path / "sources")
    monkeypatch.setenv("MANYICL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    if build._find_compiler() is None:
        pytest.skip("there is no C++ compiler")


def test_compiles_once_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert build.load_library("small", ("one.cpp",), ("one.h",)).one() == 1
    assert [record.message.split(" in ")[0] for record in caplog.records] == ["Compiled the attention kernel"]
    assert sorted(path.suffix for path in (tmp_path / "cache" / "kernels").iterdir()) == [".lock", ".so"]


def test_a_changed_header_is_compiled_again(tmp_path: Path) -> None:
    assert build.load_library("small", ("one.cpp",), ("one.h",)).one() == 1
    (tmp_path / "sources" / "one.h").write_text("#define ONE 2\n")
    assert build.load_library("small", ("one.cpp",), ("one.h",)).one() == 2


def test_a_ready_library_needs_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    build.load_library("small", ("one.cpp",), ("one.h",))
    monkeypatch.setenv("PATH", "")
    assert build.load_library("small", ("one.cpp",), ("one.h",)).one() == 1


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    build.load_library("small", ("one.cpp",), ("one.h",))
    library = next((tmp_path / "cache" / "kernels").glob("*.so"))
    library.rename(library.with_name(f".{library.stem}-killed.so"))
    build.load_library("small", ("one.cpp",), ("one.h",))
    assert [path.name for path in library.parent.glob("*.so")] == [library.name]
    assert list(library.parent.glob(".*.so")) == []


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler. Install g\+\+"):
        build.load_library("small", ("one.cpp",), ("one.h",))


def test_a_failing_compiler_is_quoted_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "sources" / "one.cpp").write_text("#error no such luck\n")
    with pytest.raises(build.BuildError, match=r"failed with code 1: .*no such luck"):
        build.load_library("small", ("one.cpp",), ("one.h",))
    assert [path.suffix for path in (tmp_path / "cache" / "kernels").iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MANYICL_CACHE", str(tmp_path / "file"))
    with pytest.raises(build.BuildError, match=r"cannot be used .*Name another in MANYICL_CACHE"):
        build.load_library("small", ("one.cpp",), ("one.h",))


def test_a_library_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.load_library("small", ("one.cpp",), ("one.h",))
    library = next((tmp_path / "cache" / "kernels").glob("*.so"))
    # In another folder, because a library that is loaded already is not read again.
    (tmp_path / "other" / "kernels").mkdir(parents=True)
    (tmp_path / "other" / "kernels" / library.name).write_bytes(library.read_bytes()[:64])
    monkeypatch.setenv("MANYICL_CACHE", str(tmp_path / "other"))
    with pytest.raises(build.BuildError, match="cannot read file data"):
        build.load_library("small", ("one.cpp",), ("one.h",))


def test_two_processes_at_once(tmp_path: Path) -> None:
    code = (
        "import logging, pathlib, sys; logging.basicConfig(level=logging.INFO)\n"
        "import manyicl.attention; from manyicl.kernels import build; build.FOLDER = pathlib.Path(sys.argv[1])\n"
        "print(build.load_library('small', ('one.cpp',), ('one.h',)).one())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "sources")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    results = [process.communicate(timeout=60) for process in running]
    assert [output for output, _ in results] == ["1\n", "1\n"]
    # The other one waited; and importing alone compiled nothing.
    assert [messages.count("Compiled") for _, messages in results] in ([0, 1], [1, 0])
    assert len(list((tmp_path / "cache" / "kernels").glob("*.so"))) == 1
