"""A whole study on a tiny model: which cells there are, what they leave, resuming, failures, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from manyicl.errors import RecipeError
from manyicl.records import read_records
from manyicl.results.files import read_results
from manyicl.study.cells import list_cells
from manyicl.study.jobs import Study, count_examples, count_updates, extended_rate
from manyicl.study.recipe import METHODS, StudyRecipe, load_study_recipe
from manyicl.study.runner import StudyFolder, run_study, work
from manyicl.tasks.readers import load_suite
from model_fixtures import count_calls

ROOT = Path(__file__).parents[1]
SMALL = {
    "budget_tokens": 600,
    "num_snapshots": 2,
    "training": {"episodes": {"max_tokens": 128}, "training": {"dtype": "float32", "lora": {"rank": 2, "alpha": 4}}},
    "rates": {"values": [1e-3, 1e-2], "shots": [0, 2], "num_seeds": 1, "budget_share": 0.5},
    "context_tokens": 256,
    "shots": [0, 2, "max"],
    "num_seeds": 2,
    "num_queries": 4,
    "dedicated": {"learning_rate_values": [1e-3], "max_epochs": 2, "overtaking_tasks": ["speed"], "overtaking_examples": [4]},
    "robustness": {"tasks": ["speed"], "num_shots": 2, "flipped": [0.5], "contexts": [128]},
    "training_seeds": {"values": [1], "methods": ["all_answers"]},
}


@pytest.fixture
def make(tiny_model_folder, suite_folder, tmp_path):
    """A study recipe over the small suite."""
    suites = []

    def build(output="study", **sections):
        if not suites:
            suites.append(suite_folder())
        corpus = tmp_path / "corpus.txt"
        corpus.write_text("The quick brown fox jumps over the lazy dog. " * 40, encoding="utf-8")
        content = {"model": str(tiny_model_folder("llama", max_position_embeddings=2048)), "tasks": str(suites[0])}
        content |= {"output": str(tmp_path / output)} | SMALL
        content |= {"forgetting": {"corpora": [str(corpus)], "max_bytes": 1000, "window_tokens": 64, "num_queries": 1}}
        return StudyRecipe.model_validate(content | sections)

    return build


@pytest.mark.slow
def test_a_whole_study(make):
    recipe = make()
    progress = run_study(recipe)
    results = read_results(Path(recipe.output) / "results")
    failed = {cell.cell: cell.error for cell in results.cells if cell.status == "failed"}
    assert failed == {}
    assert progress.done == progress.total == len(results.cells)
    assert set(results.claims["methods"]) == {*METHODS} - {"dedicated"}
