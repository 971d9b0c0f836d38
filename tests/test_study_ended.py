"""A study that is ended, killed, out of disk, or worked on by two at once: what was done stays, and nothing is done twice."""

import errno
import gc
import os
import re
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import yaml

from manyicl.errors import StorageError
from manyicl.files import storage_errors
from manyicl.results.files import read_results
from manyicl.study import runner as study_runner
from manyicl.study.jobs import Outcome, Study
from manyicl.study.runner import run_study, work
from model_fixtures import count_calls
from study_fixtures import FAST, SMALL, open_folder, start_training, statuses, study_maker, untimed


@pytest.fixture
def make(tiny_model_folder, suite_folder, tmp_path):
    """A study recipe over the small suite."""
    return study_maker(tiny_model_folder("llama", max_position_embeddings=2048), suite_folder(), tmp_path)


@pytest.mark.slow
def test_a_terminated_study_ends_its_worker_and_writes_what_is_known(make):
    recipe = make(**FAST, training=SMALL["training"] | {"episodes": {"max_tokens": 400}}, budget_tokens=4000)
    runner, worker, cell = start_training(recipe)
    runner.terminate()
    assert runner.wait(timeout=60) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)
    results = read_results(Path(recipe.output) / "results")
    assert {each.cell: each.status for each in results.cells}[cell] == "open"
    assert any(each.status == "done" for each in results.cells)


@pytest.mark.slow
def test_a_killed_worker_is_told_from_its_exit_and_another_goes_on(make):
    """The worker is killed in its first training; that cell is recorded as failed, and the next start does it."""
    recipe = make(**FAST, training=SMALL["training"] | {"episodes": {"max_tokens": 400}}, budget_tokens=4000)
    output = Path(recipe.output)
    runner, victim, cell = start_training(recipe)
    os.kill(victim, signal.SIGKILL)
    assert runner.wait(timeout=240) == 0
    results = read_results(output / "results")
    errors = {each.cell: each.error for each in results.cells if each.status == "failed"}
    assert errors == {cell: "its process was killed by the system, which does so when memory runs out"}
    assert run_study(recipe).failed == 0
    assert set(statuses(open_folder(recipe)).values()) == {"done"}


@pytest.mark.slow
def test_a_study_killed_with_its_worker_loses_the_cell_in_flight_alone(make, monkeypatch):
    study = FAST | {"training": SMALL["training"] | {"episodes": {"max_tokens": 400}}, "budget_tokens": 4000}
    recipe, whole = make(**study), make("whole", **study)
    runner, worker, cell = start_training(recipe)
    for process in (runner.pid, worker):
        os.kill(process, signal.SIGKILL)
    runner.wait()
    done = {name for name, status in statuses(open_folder(recipe)).items() if status == "done"}
    assert done
    assert open_folder(recipe).status(cell) == "open"
    calls = count_calls(monkeypatch, Study, "run")
    work(recipe)
    assert {each.name for _, each in calls} == {each.name for each in open_folder(recipe).cells} - done
    work(whole)
    assert untimed(open_folder(recipe).gather()) == untimed(open_folder(whole).gather())


def test_a_full_disk_ends_the_study_and_keeps_what_was_done(make, monkeypatch):
    recipe = make(**FAST)
    real = study_runner.write_text_atomic
    kept = []

    def write(path: Path, text: str) -> None:
        if path.name == "result.json" and len(kept) == 2:
            with storage_errors(path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, text)
        kept.extend([path] if path.name == "result.json" else [])

    monkeypatch.setattr(study_runner, "write_text_atomic", write)
    with pytest.raises(StorageError, match=r"result\.json: cannot be written \(No space left on device\)\. Free some space"):
        work(recipe)
    monkeypatch.undo()
    done = {name for name, status in statuses(open_folder(recipe)).items() if status == "done"}
    assert len(done) == 2
    calls = count_calls(monkeypatch, Study, "run")
    work(recipe)
    assert {cell.name for _, cell in calls} == {cell.name for cell in open_folder(recipe).cells} - done
    assert set(statuses(open_folder(recipe)).values()) == {"done"}


@pytest.mark.slow
def test_two_studies_in_one_folder_end_as_one(make, tmp_path):
    recipe, alone = make(**FAST), make("alone", **FAST)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")), encoding="utf-8")
    command = [sys.executable, "-m", "manyicl", "study", str(path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    said = [process.communicate(timeout=400)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    done = [cell for text in said for cell in re.findall(r"^\[(\S+)\]$", text, re.MULTILINE)]
    assert sorted(done) == sorted(cell.name for cell in open_folder(recipe).cells)
    work(alone)
    assert untimed(open_folder(recipe).gather()) == untimed(open_folder(alone).gather())


def test_what_a_cell_leaves_in_memory_is_gone_before_the_next(make, monkeypatch):
    """Models are left in reference cycles, which wait for a collection of all generations."""
    left: list[weakref.ref[type]] = []
    alive = []

    def run(study: Study, cell: object) -> Outcome:
        alive.append(sum(each() is not None for each in left))
        left.append(weakref.ref(type("Model", (), {})))  # A class refers to itself.
        return Outcome()

    monkeypatch.setattr(Study, "run", run)
    gc.disable()
    try:
        work(make(**FAST), only=["classic"])
    finally:
        gc.enable()
    assert alive == [0] * len(alive)
    assert len(alive) > 1
