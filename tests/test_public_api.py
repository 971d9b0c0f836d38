"""The public surface: these names and no others, each documented, and an import that stays light."""

import importlib.metadata
import os
import re
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import manyicl

PUBLIC = [
    "Encoder",
    "EvaluationRequest",
    "Example",
    "LoadedModel",
    "ManyShotClassifier",
    "ManyShotGenerator",
    "Prefix",
    "PrefixFacts",
    "PrefixStore",
    "Recipe",
    "Task",
    "TaskSuite",
    "check_suite",
    "check_task",
    "evaluate_models",
    "export_model",
    "extend",
    "find_best_labels",
    "generate_answers",
    "identify_prefix",
    "load_model",
    "load_prefix",
    "load_recipe",
    "load_suite",
    "load_task",
    "predict",
    "prefill",
    "push_to_hub",
    "quantise",
    "read_examples",
    "save_prefix",
    "score_labels",
    "train",
]
COMMANDS = [
    "train",
    "evaluate",
    "predict",
    "corpus",
    "inspect",
    "plan",
    "study",
    "export",
    "report",
    "card",
    "serve",
    "tasks",
    "keys",
    "client",
]
MAX_CPU_SECONDS = 0.5

_THEN_HEAVY = "import sys; print([name for name in ('torch', 'transformers') if name in sys.modules])"


def run_python(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout


def cpu_seconds(arguments: list[str]) -> float:
    """Processor time of a child process, which unlike the time on the clock does not count other processes' load."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(arguments, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_the_public_names_are_these() -> None:
    assert sorted(manyicl.__all__) == PUBLIC
    assert dir(manyicl) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_is_importable_and_documented(name: str) -> None:
    # A first line of two words at least: a dataclass without a docstring gets its signature, "Name(field: …", which is none.
    first_line = (getattr(manyicl, name).__doc__ or "").strip().splitlines()[:1]
    assert first_line, f"{name} has no docstring"
    assert not first_line[0].startswith(f"{name}("), f"{name} has no docstring of its own"
    assert re.match(r"\S+ .*[.,:;]", first_line[0]), first_line[0]


def test_public_names_are_the_objects_of_their_modules() -> None:
    from manyicl.config import load_recipe
    from manyicl.tasks.task import Task

    assert manyicl.load_recipe is load_recipe
    assert manyicl.Task is Task


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'manyicl' has no attribute 'trian'"):
        manyicl.trian  # noqa: B018


def test_version_is_that_of_the_distribution() -> None:
    assert manyicl.__version__ == importlib.metadata.version("manyicl")


def test_import_loads_neither_torch_nor_transformers() -> None:
    assert run_python(f"import manyicl; {_THEN_HEAVY}") == "[]\n"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["tasks", "check", "--help"]])
def test_help_loads_neither_torch_nor_transformers(arguments: list[str]) -> None:
    script = (
        f"import sys; sys.argv = ['manyicl', *{arguments!r}]\n"
        "from manyicl.cli import main\n"
        "try:\n    main()\nexcept SystemExit as error:\n    assert not error.code\n"
        f"{_THEN_HEAVY}"
    )
    printed = run_python(script)
    assert "Usage:" in printed
    assert printed.splitlines()[-1] == "[]"


def test_help_names_every_command() -> None:
    manyicl_command = str(Path(sys.executable).with_name("manyicl"))
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1"}
    text = subprocess.run([manyicl_command, "--help"], capture_output=True, text=True, check=True, env=environment).stdout
    listed = text[text.index("Commands") :]
    assert re.findall(r"^\W*([a-z]+)  ", listed, flags=re.MULTILINE) == COMMANDS


@pytest.mark.parametrize("arguments", [["-c", "import manyicl"], ["-m", "manyicl", "--help"]])
def test_answers_in_under_half_a_second(arguments: list[str]) -> None:
    seconds = statistics.median(cpu_seconds([sys.executable, *arguments]) for _ in range(3))
    assert seconds < MAX_CPU_SECONDS
