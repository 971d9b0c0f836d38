"""A small study: its recipe over the small suite, its folder, and its results without times."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from manyicl.results.files import StudyResults
from manyicl.study.recipe import StudyRecipe
from manyicl.study.runner import StudyFolder
from manyicl.tasks.readers import load_suite

SMALL = {
    "budget_tokens": 600,
    "num_snapshots": 2,
    "training": {"episodes": {"max_tokens": 128}, "training": {"dtype": "float32", "lora": {"rank": 2, "alpha": 4}}},
    "rates": {"values": [1e-3, 1e-2], "shots": [0, 2], "num_seeds": 1, "budget_share": 0.5},
    "context_tokens": 256,
    "shots": [0, 2, "max"],
    "num_seeds": 2,
    "num_queries": 4,
    "num_validation_queries": 3,
    "dedicated": {"rates": [1e-3], "max_epochs": 2, "rate_tokens": 60, "overtaking_tasks": ["speed"], "overtaking_examples": [4]},
    "robustness": {"tasks": ["speed"], "num_shots": 2, "flipped": [0.5], "contexts": [128]},
    "training_seeds": {"values": [1], "methods": ["all_answers"]},
}
TINY = {"methods": ["in_context", "zero_shot", "all_answers", "classic"], "training_seeds": None, "num_snapshots": 2}
FAST = TINY | {"forgetting": {}, "robustness": {}, "rates": SMALL["rates"] | {"values": [1e-3]}}


def study_maker(model: Path, suite: Path, folder: Path) -> Callable[..., StudyRecipe]:
    """Builds study recipes over a suite, with their outputs and a corpus in a folder."""

    def build(output: str = "study", **sections: Any) -> StudyRecipe:
        corpus = folder / "corpus.txt"
        corpus.write_text("The quick brown fox jumps over the lazy dog. " * 40, encoding="utf-8")
        content = {"model": str(model), "tasks": str(suite), "output": str(folder / output)} | SMALL
        content |= {"forgetting": {"corpora": [str(corpus)], "max_bytes": 1000, "window_tokens": 64, "num_queries": 1}}
        return StudyRecipe.model_validate(content | sections)

    return build


def statuses(folder: StudyFolder) -> dict[str, str]:
    return {cell.name: folder.status(cell.name) for cell in folder.cells}


def open_folder(recipe: StudyRecipe) -> StudyFolder:
    return StudyFolder(recipe, load_suite(recipe.tasks))


def untimed(results: StudyResults) -> tuple[Any, ...]:
    """Results without what differs from one time to the next."""
    blank = {"seconds": 0.0, "prefill_seconds": 0.0}
    records = [record.model_copy(update=blank) for record in results.records]
    models = [facts.model_copy(update={"seconds": 0.0, "peak_memory_bytes": 0}) for facts in results.models]
    return records, models, results.corpora, results.claims["methods"], [(cell.cell, cell.status) for cell in results.cells]


def start_training(recipe: StudyRecipe) -> tuple[subprocess.Popen[bytes], int, str]:
    """A process that runs the study, its worker's id and the cell that this trains at the moment."""
    code = "import sys; from manyicl.study.runner import run_study; from manyicl.study.recipe import StudyRecipe; "
    code += "run_study(StudyRecipe.model_validate_json(sys.stdin.read()))"
    runner = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert runner.stdin is not None
    runner.stdin.write(recipe.model_dump_json().encode())
    runner.stdin.close()
    deadline = time.time() + 240
    while not (found := [path for path in Path(recipe.output).glob("workers/[!.]*") if path.read_text().startswith("train/")]):
        if time.time() > deadline or runner.poll() is not None:
            runner.terminate()
            pytest.fail(f"the study has begun no training; it ended with {runner.wait()}")
        time.sleep(0.02)
    return runner, int(found[0].name.rpartition("-")[2]), found[0].read_text()
