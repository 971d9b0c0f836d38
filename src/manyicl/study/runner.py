"""Does the cells of a study that are not done, and gathers what was found.

    runs/study-small/
      study.yaml  tasks.json             the recipe and hashes of the examples: a folder belongs to one study
      cells/train/all_answers/seed-0/
        result.json                      written last: the cell is done
        failure.json                     why it is not; it is tried again by the next start
        records.jsonl  run/              what it found; goes on where it was stopped
        lock                             held by the process that is at it, and released with it
      results/                           what reports read (see `results.files`), written anew after each stretch of work

A cell is done by one process at a time; any number of processes or machines that share the folder (and its file locks) take
different cells. A kill loses at most the cell in flight, and of that no more than since its last checkpoint or record. A cell
that fails says so in its folder, those that need it wait, and the rest goes on. Cells are done by a worker process of their own:
one that the system kills, for want of memory say, is told from its exit, and another goes on.
"""

import contextlib
import ctypes
import gc
import logging
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import filelock
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from manyicl.errors import ManyICLError, RecipeError, RecordsError
from manyicl.files import storage_errors, write_json_atomic, write_text_atomic
from manyicl.records import EvaluationRecord, read_records
from manyicl.results.claims import make_claims
from manyicl.results.files import CellFacts, CorpusFacts, HarnessFacts, ModelFacts, StudyResults, write_results
from manyicl.study.cells import Cell, list_cells, select_cells
from manyicl.study.jobs import Outcome, Study
from manyicl.study.recipe import StudyRecipe
from manyicl.tasks.readers import load_suite
from manyicl.tasks.task import TaskSuite
from manyicl.versions import library_versions

logger = logging.getLogger(__name__)

Status = Literal["done", "failed", "open"]
PUBLISHED_FILE = "published.json"
_POLL_SECONDS = 5.0
_STOPPED = {signal.SIGKILL: "killed by the system, which does so when memory runs out", signal.SIGSEGV: "crashed"}


class CellResult(BaseModel):
    """result.json: what a cell found, and what it took."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seconds: float
    peak_memory_bytes: int
    finished: str
    versions: dict[str, str]
    num_records: int = 0
    models: list[ModelFacts] = []
    corpora: list[CorpusFacts] = []
    harness: list[HarnessFacts] = []
    facts: dict[str, Any] = {}


@dataclass(frozen=True)
class Progress:
    """How far a study is."""

    done: int
    failed: int
    total: int


class StudyFolder:
    """The folder of a study: which cells are done, and their results.

    Raises:
        RecipeError: the folder belongs to another study, or to other examples.
        StorageError: it cannot be written.
    """

    def __init__(self, recipe: StudyRecipe, suite: TaskSuite) -> None:
        self.output = Path(recipe.output)
        self.recipe = recipe.resolved()
        self.cells = list_cells(recipe, suite)
        self.examples = {name: task.fingerprint() for name, task in suite.tasks.items()}
        self._num_queries = {name: min(recipe.num_queries, len(task.test)) for name, task in suite.tasks.items()}
        self._text = yaml.safe_dump(self.recipe.model_dump(mode="json", exclude={"output"}), sort_keys=False, allow_unicode=True)
        self._short: set[str] = set()  # Cells with fewer queries than this recipe asks for, until it is the folder's.
        self._claim()

    def _claim(self) -> None:
        """Make the folder this study's, or see that it is; one in which no cell was begun, as after `--plan`, is anyone's."""
        path, hashes = self.output / "study.yaml", self.output / "tasks.json"
        if not (self.output / "cells").exists():
            write_json_atomic(hashes, self.examples)
            write_text_atomic(path, self._text)
            return
        if not (path.is_file() and hashes.is_file()):
            raise RecipeError(f"{self.output}: holds cells without a study.yaml and tasks.json. Choose another output.")
        try:
            differing = compare_recipes(self.recipe, yaml.safe_load(path.read_text(encoding="utf-8")))
        except (ValidationError, yaml.YAMLError) as error:
            raise RecipeError(f"{path}: is no study recipe of this version ({error}). Choose another output.") from error
        if differing:
            raise RecipeError(f"{self.output}: holds the results of another recipe ({differing} differ). Choose another output.")
        changed = compare_mappings(self.examples, yaml.safe_load(hashes.read_text(encoding="utf-8")))
        if changed:
            raise RecipeError(f"{self.output}: the examples of {changed} have changed. Choose another output.")
        if not self.is_current():
            self._short = {cell.name for cell in self.cells if self.is_short(self.records(cell.name))}

    def is_current(self) -> bool:
        """Whether the folder's recipe is the one that this process was given."""
        return (self.output / "study.yaml").read_text(encoding="utf-8") == self._text

    def take_over(self) -> None:
        """Make this recipe the folder's, where it asks for more than the one there: cells with fewer queries are emptied.

        Raises:
            RecipeError: another process is at a cell; nothing was changed.
        """
        if self.is_current():
            return
        with contextlib.ExitStack() as stack:
            for cell in self.cells:
                if not stack.enter_context(self.lock(cell.name)):
                    raise RecipeError(f"{self.output}: a process is at {cell.name} with the recipe before. Stop it first.")
            for cell in self.cells:
                if self.is_short(self.records(cell.name)):
                    self.empty(cell.name)
            write_text_atomic(self.output / "study.yaml", self._text)
        self._short = set()

    def empty(self, cell: str) -> None:
        """Make a cell one that was not begun; after a kill in between it can be told that this is to be done again."""
        with storage_errors(self.folder(cell)):
            shutil.rmtree(self.folder(cell) / "run", ignore_errors=True)
            for name in ("result.json", "records.jsonl"):  # The records last: they tell.
                (self.folder(cell) / name).unlink(missing_ok=True)

    def warn_of_other_versions(self, training: str) -> None:
        """Before a training is repeated, say which versions are not those that it was published with."""
        if not (self.folder(training) / PUBLISHED_FILE).is_file():
            return
        before, now = self.read(training, PUBLISHED_FILE).versions, library_versions()
        changed = [name for name in sorted(before | now) if before.get(name) != now.get(name)]
        differing = [f"{name} {before.get(name, 'not recorded')} -> {now.get(name, 'none')}" for name in changed]
        if differing:
            logger.warning(
                "%s: is repeated with other versions than were published (%s). Should it end in other weights, what was found "
                "with the published ones is done again",
                training,
                ", ".join(differing),
            )

    def empty_cells_of_other_weights(self, training: str, facts: dict[str, Any]) -> None:
        """Where a repeated training has not ended in the published weights, empty what was found with those."""
        if not (self.folder(training) / PUBLISHED_FILE).is_file():
            return
        if self.read(training, PUBLISHED_FILE).facts.get("weights") == facts["weights"]:
            return
        users = [cell.name for cell in self.cells if training in cell.needs and self.status(cell.name) == "done"]
        logger.warning("%s: not the published weights; done again with these: %s", training, ", ".join(users) or "nothing")
        for name in users:
            self.empty(name)

    def is_short(self, records: Sequence[EvaluationRecord]) -> bool:
        """Whether records of tasks that choose nothing have fewer queries than the recipe asks for."""
        read = [record for record in records if record.role not in ("validation", "builtin")]
        return any(record.num_queries < self._num_queries[record.task] for record in read)

    def folder(self, cell: str) -> Path:
        """The folder of a cell."""
        return self.output / "cells" / cell

    def status(self, cell: str) -> Status:
        """Whether a cell is done."""
        if cell in self._short:
            return "open"
        if (self.folder(cell) / "result.json").is_file():
            return "done"
        return "failed" if (self.folder(cell) / "failure.json").is_file() else "open"

    def is_ready(self, cell: Cell) -> bool:
        """Whether a cell is open and what it needs is done."""
        return self.status(cell.name) == "open" and all(self.status(needed) == "done" for needed in cell.needs)

    def read(self, cell: str, name: str = "result.json") -> CellResult:
        """The result of a finished cell.

        Raises:
            RecordsError: it is broken.
        """
        path = self.folder(cell) / name
        try:
            return CellResult.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise RecordsError(
                f"{path}: is no result of a cell ({error}). Remove the file; the cell is then done again."
            ) from error

    def _published(self, cell: str) -> list[ModelFacts]:
        """The models of a training that is to be repeated, as published (see `restore`)."""
        return self.read(cell, PUBLISHED_FILE).models if (self.folder(cell) / PUBLISHED_FILE).is_file() else []

    def outcome(self, cell: str) -> Outcome:
        """What a finished cell found."""
        result = self.read(cell)
        return Outcome(result.models, result.corpora, result.harness, result.facts)

    @contextlib.contextmanager
    def lock(self, cell: str) -> Iterator[bool]:
        """Whether this process may do a cell; it holds it inside the block."""
        folder = self.folder(cell)
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / "lock", timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def write_failure(self, cell: str, reason: str) -> None:
        """Record why a cell is not done."""
        write_json_atomic(self.folder(cell) / "failure.json", {"error": reason, "finished": _now()})

    def reopen_damaged(self) -> None:
        """Open cells again whose records are fewer than they were when the cell was done, or have too few queries.

        What is whole of the former is kept.
        """
        for cell in self.cells:
            if self.status(cell.name) == "done":
                records = self.records(cell.name)
                if self.is_short(records):
                    self.empty(cell.name)
                    continue
                expected, found = self.read(cell.name).num_records, len(records)
                if found != expected:
                    logger.warning("%s: %d of %d records are left; the cell is done again", cell.name, found, expected)
                    (self.folder(cell.name) / "result.json").unlink()

    def records(self, cell: str) -> list[EvaluationRecord]:
        """The records of a cell; none where there is no file."""
        path = self.folder(cell) / "records.jsonl"
        return read_records(path) if path.is_file() else []

    def progress(self) -> Progress:
        """How many cells are done and have failed."""
        found = [self.status(cell.name) for cell in self.cells]
        return Progress(found.count("done"), found.count("failed"), len(found))

    def gather(self) -> StudyResults:
        """Everything that finished cells have found, with the claims that follow."""
        records, models, corpora, harness, facts = [], [], [], [], []
        for cell in self.cells:
            status = self.status(cell.name)
            result = self.read(cell.name) if status == "done" else None
            models += self._published(cell.name) if result is None else []
            if result is not None:
                records += self.records(cell.name)
                models += result.models
                corpora += result.corpora
                harness += result.harness
            facts.append(self._cell_facts(cell, status, result))
        results = StudyResults(
            recipe=self.recipe.model_dump(mode="json"),
            examples=self.examples,
            records=records,
            models=models,
            corpora=corpora,
            harness=harness,
            cells=facts,
        )
        return results.model_copy(update={"claims": make_claims(results)})

    def _cell_facts(self, cell: Cell, status: Status, result: CellResult | None) -> CellFacts:
        if result is not None:
            taken = result.model_dump(include={"seconds", "peak_memory_bytes", "finished", "versions", "num_records", "facts"})
            return CellFacts(cell=cell.name, kind=cell.kind, status=status, **taken)
        error = ""
        if status == "failed":
            error = str(yaml.safe_load((self.folder(cell.name) / "failure.json").read_text(encoding="utf-8"))["error"])
        return CellFacts(cell=cell.name, kind=cell.kind, status=status, error=error)


def work(recipe: StudyRecipe, *, only: Sequence[str] = (), deadline: float | None = None) -> None:
    """Do cells until none is left that this process can do; what a worker process runs.

    Args:
        only: Patterns of the names of cells, as in `cells.select_cells`; all cells unless given.
        deadline: No cell is begun after this `time.time()`.
    """
    suite = load_suite(recipe.tasks)
    folder = StudyFolder(recipe, suite)
    folder.take_over()
    study = Study(folder.recipe, suite, folder.outcome)
    wanted = select_cells(folder.cells, only)
    parent = os.getppid()
    while (deadline is None or time.time() < deadline) and os.getppid() == parent:  # An orphan takes no further cell.
        ready = [cell for cell in wanted if folder.is_ready(cell)]
        if not ready:
            return
        if not any(_do(folder, study, cell) for cell in ready):
            time.sleep(_POLL_SECONDS)  # Others are at all of them.
        _release_memory()


def _release_memory() -> None:
    """Give back what the cell before took: models in reference cycles, and freed pages that the C library has kept."""
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # glibc's own.
        trim(0)


def _do(folder: StudyFolder, study: Study, cell: Cell) -> bool:
    """Whether this process has done the cell, or failed to."""
    with folder.lock(cell.name) as is_ours:
        if not folder.is_current():
            raise RecipeError(
                f"{folder.output}: another process has given this folder a recipe that asks for more. Start with that."
            )
        if not is_ours or folder.status(cell.name) != "open":
            return False
        write_text_atomic(_worker_file(folder, os.getpid()), cell.name)
        logger.info("[%s]", cell.name)
        folder.warn_of_other_versions(cell.name)
        start = time.perf_counter()
        try:
            outcome = study.run(cell)
        except Exception as error:  # Whatever a cell dies of is recorded, and the rest goes on.
            logger.exception("%s failed", cell.name)
            folder.write_failure(cell.name, str(error) if isinstance(error, ManyICLError) else f"{type(error).__name__}: {error}")
            return True
        result = CellResult(
            seconds=round(time.perf_counter() - start, 2),
            peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            finished=_now(),
            versions=library_versions(),
            num_records=len(folder.records(cell.name)),
            models=outcome.models,
            corpora=outcome.corpora,
            harness=outcome.harness,
            facts=outcome.facts,
        )
        folder.empty_cells_of_other_weights(cell.name, outcome.facts)
        write_text_atomic(folder.folder(cell.name) / "result.json", result.model_dump_json(indent=1) + "\n")
    return True


def run_study(recipe: StudyRecipe, *, only: Sequence[str] = (), minutes: float | None = None) -> Progress:
    """Do what is left of a study in worker processes, one after the other, and write its results.

    Args:
        only: Patterns of the names of cells, as in `cells.select_cells`; all cells unless given.
        minutes: No cell is begun after so many.

    Raises:
        RecipeError: the folder belongs to another study.
    """
    folder = StudyFolder(recipe, load_suite(recipe.tasks))
    folder.take_over()
    folder.reopen_damaged()
    for cell in folder.cells:  # What failed is tried again, once a start.
        (folder.folder(cell.name) / "failure.json").unlink(missing_ok=True)
    deadline = None if minutes is None else time.time() + 60 * minutes
    try:
        with _ended_by_sigterm():
            while _run_worker(folder, only, deadline):
                pass
    finally:
        if folder.is_current():
            write_results(folder.gather(), folder.output / "results")
    return folder.progress()


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as an exception does, so that the worker ends with this process."""
    if threading.current_thread() is not threading.main_thread():  # Signals are the main thread's.
        yield
        return

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run_worker(folder: StudyFolder, only: Sequence[str], deadline: float | None) -> bool:
    """Whether a worker died at a cell, so that another must go on."""
    command = [sys.executable, "-m", "manyicl.study.worker", str(folder.output), ",".join(only), str(deadline or "")]
    with subprocess.Popen(command) as worker:
        try:
            code = worker.wait()
        except BaseException:
            worker.terminate()
            raise
    path = _worker_file(folder, worker.pid)
    cell = path.read_text(encoding="utf-8") if path.is_file() else ""
    path.unlink(missing_ok=True)
    if code == 0:
        return False
    if not cell or folder.status(cell) != "open":
        raise ManyICLError(f"the worker of {folder.output} ended with code {code} outside a cell. Look at what it said above.")
    reason = _STOPPED.get(signal.Signals(-code), f"ended by signal {-code}") if code < 0 else f"ended with code {code}"
    logger.error("%s: its process was %s", cell, reason)
    folder.write_failure(cell, f"its process was {reason}")
    return True


def _worker_file(folder: StudyFolder, process: int) -> Path:
    """Where a worker process says which cell it is at."""
    return folder.output / "workers" / f"{platform.node()}-{process}"


def compare_recipes(recipe: StudyRecipe, content: Any) -> str:
    """The keys in which a recipe differs from one on file so that its cells are not kept; empty for none.

    Raises:
        ValidationError: what is on file is no study recipe.
    """
    known = StudyRecipe.model_validate(content).resolved()  # With the defaults of keys that came to recipes since.
    unchecked = {"output", "notes"} | _grown_keys(recipe, known)
    wanted, found = (each.model_dump(mode="json", exclude=unchecked) for each in (recipe, known))
    return compare_mappings(wanted, found)


def _grown_keys(recipe: StudyRecipe, known: StudyRecipe) -> set[str]:
    """Keys by which a recipe asks for what the one on file does, or for more of it."""
    seeds, known_seeds = recipe.training_seeds, known.training_seeds
    has_grown = {
        "calibrated": recipe.calibrated >= known.calibrated,
        "num_queries": recipe.num_queries >= known.num_queries,
        "training_seeds": known_seeds is None
        or (
            seeds is not None and set(seeds.values) >= set(known_seeds.values) and set(seeds.methods) >= set(known_seeds.methods)
        ),
    }
    return {key for key, grown in has_grown.items() if grown}


def compare_mappings(wanted: dict[str, Any], known: dict[str, Any]) -> str:
    """The keys whose values differ, comma-separated; empty for none."""
    return ", ".join(sorted(key for key in wanted.keys() | known.keys() if wanted.get(key) != known.get(key)))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
