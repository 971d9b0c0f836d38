"""What a user gets wrong ends with exit code 2, a message that says what to do, no traceback and nothing half-written."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from plain_fixtures import write_rows

ROWS = [{"text": f"text {number}", "label": ("yes", "no")[number % 2]} for number in range(8)]
DESCRIPTION = {"input": "{text}", "answer": "label", "labels": ["yes", "no"]}


@pytest.fixture
def suite(tmp_path: Path) -> Callable[..., Path]:
    """A suite of one meta-training task, of which files are replaced."""

    def build(**files: object) -> Path:
        folder = tmp_path / "suite"
        contents = {"task": DESCRIPTION, "train": ROWS, "test": ROWS[:2], "roles": {"meta_training": ["t"]}} | files
        (folder / "t").mkdir(parents=True)
        (folder / "suite.yaml").write_text(yaml.safe_dump(contents["roles"]))
        if contents["task"] is not None:
            (folder / "t" / "task.yaml").write_text(yaml.safe_dump(contents["task"]))
        for split in ("train", "test"):
            content = contents[split]
            if isinstance(content, bytes):
                (folder / "t" / f"{split}.jsonl").write_bytes(content)
            else:
                write_rows(folder / "t" / f"{split}.jsonl", content)
        return folder

    return build


def lines(*rows: object) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


LONG = [{"text": "x" * 500, "label": ("yes", "no")[number % 2]} for number in range(8)]
ONE_LONG = [*ROWS[:2], *LONG[:6]]
OPTIONS = {"input": "{text}", "answer": "label", "options": "options"}


@pytest.mark.parametrize(
    ("files", "overrides", "message"),
    [
        ({"train": [*ROWS, {"label": "yes"}]}, [], "t/train.jsonl:9: field 'text' is missing (there: label). Correct the row or"),
        ({"task": DESCRIPTION | {"input": "{txet}"}}, [], "t/train.jsonl:1: field 'txet' is missing (there: text, label)."),
        ({"train": []}, [], "t/train.jsonl: holds no rows. Give at least two examples."),
        ({"train": ROWS[:1]}, [], "suite/t: 1 train example(s); a task needs at least 2. Add labelled examples."),
        (
            {"train": LONG},
            ["episodes.max_tokens=128"],
            "task 't': 0 example(s) fit max_tokens=128 and 8 were left out; its examples",
        ),
        ({"train": ONE_LONG}, ["episodes.max_tokens=128"], "task 't': 2 example(s) fit max_tokens=128 and 6 were left out;"),
        (
            {},
            ["episodes.max_tokens=30"],
            "task 't': 1 example(s) fit max_tokens=30 and 1 were left out; its examples take 20 to 21",
        ),
        ({"task": DESCRIPTION | {"labels": ["yes", ""]}}, [], "t/task.yaml: labels = ['yes', '']: holds an empty label."),
        ({"task": DESCRIPTION | {"labels": ["yes", "no", "no"]}}, [], "label 'no' is listed twice. List each label once."),
        ({"test": [{"text": "x", "label": "maybe"}]}, [], "t/test.jsonl:1: label 'maybe' is not among the 2 labels (yes, no)."),
        (
            {"train": ROWS[::2]},
            [],
            "t/test.jsonl:2: test label 'no' never occurs in train. Add an example of it, or drop the row.",
        ),
        ({"train": lines(*ROWS, b'{"text": ')}, [], "t/train.jsonl:9: broken JSON at column 10: Expecting value. Mend or remove"),
        (
            {"train": lines(*ROWS, b'{"text": "\xe9"}')},
            [],
            "t/train.jsonl:9: byte 11 of the line, 0xe9, is not UTF-8. Save the file",
        ),
        ({"train": [*ROWS, {"text": "x", "label": " "}]}, [], "t/train.jsonl:9: the answer field 'label' is empty. Fill it in"),
        ({"task": DESCRIPTION | {"instructoin": "x"}}, [], "unknown key 'instructoin'; the nearest valid one is 'instruction'"),
        ({"roles": {"meta_training": ["t"], "held_out": ["t"]}}, [], "'t' is both meta_training and held_out."),
        ({"roles": {"held_out": ["t"]}}, ["meta_training=[t]"], "meta_training names 't', which is a held_out task."),
        ({}, ["meta_training=[u]"], "meta_training names 'u', which suite 'suite' does not have (t)."),
        ({}, ["training.learnin_rate=1"], "unknown key 'training.learnin_rate'; the nearest valid one is 'learning_rate'"),
        ({}, ["episodes.max_tokens=lots"], "episodes.max_tokens = 'lots': Input should be a valid integer"),
        ({}, ["model=nowhere/at/all"], "nowhere/at/all: there is no such folder in "),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "train"])
def test_wrong_tasks_recipes_and_budgets(run_cli, suite, tmp_path, tiny_model_folder, command, files, overrides, message) -> None:
    folder = suite(**files)
    recipe = tmp_path / "recipe.yaml"
    content = {"model": str(tiny_model_folder()), "tasks": str(folder), "output": str(tmp_path / "run")}
    recipe.write_text(yaml.safe_dump(content | {"training": {"num_steps": 1, "dtype": "float32"}}))
    code, output, errors = run_cli(command, recipe, "episodes.max_tokens=256", *overrides)
    assert (code, output) == (2, "")
    assert errors.startswith("error: ")
    assert message in errors
    assert "Traceback" not in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml", "suite"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["x", "x"], "labels 'x' and 'x' have the same 3 token ids and cannot be told apart. Rename one."),
        (["x", ""], "the answer '' is empty. Every example needs an answer; remove it or fill it in."),
    ],
)
def test_options_that_cannot_be_told_apart(run_cli, suite, tmp_path, tiny_model_folder, options, message) -> None:
    train = [{"text": f"t{number}", "label": "x", "options": ["x", f"y{number}"]} for number in range(4)]
    folder = suite(task=OPTIONS, train=train, test=[{"text": "q", "label": "x", "options": options}])
    records = tmp_path / "records.jsonl"
    code, output, errors = run_cli(
        "evaluate", "--model", tiny_model_folder(), "--tasks", folder, "--role", "all", "--shots", "1", "--output", records
    )
    assert (code, output) == (2, "")
    assert f"error: {message}" in errors
    assert not records.exists() or records.read_bytes() == b""


@pytest.mark.parametrize(
    ("tokenizer", "overrides", "message"),
    [
        ({"end": None}, [], "its tokenizer has no end token (eos_token), which ends every answer."),
        (
            {"chat_template": None},
            ["episodes.format=chat"],
            "the tokenizer has no chat template. Use the plain format: episodes.",
        ),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "train"])
def test_tokenizers_without_end_token_or_template(
    run_cli, suite, tmp_path, tiny_model_folder, make_tokenizer, command, tokenizer, overrides, message
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model_folder(), model)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (model / name).unlink(missing_ok=True)
    make_tokenizer(**tokenizer).save_pretrained(model)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"model": str(model), "tasks": str(suite()), "output": str(tmp_path / "run")}))
    code, output, errors = run_cli(command, recipe, "episodes.max_tokens=256", *overrides)
    assert (code, output) == (2, "")
    assert message in errors
    assert not (tmp_path / "run").exists()


def test_a_model_folder_without_weights(run_cli, suite, tmp_path, tiny_model_folder) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model_folder(), model)
    (model / "model.safetensors").unlink()
    code, _, errors = run_cli("evaluate", "--model", model, "--tasks", suite(), "--role", "all", "--output", tmp_path / "r.jsonl")
    assert code == 2
    assert f"error: {model}: holds no model (config.json and *.safetensors)." in errors
    assert not (tmp_path / "r.jsonl").exists()


def test_a_full_disk_leaves_the_old_answers(run_cli, tmp_path, tiny_model_folder, monkeypatch) -> None:
    demonstrations = write_rows(tmp_path / "demonstrations.jsonl", ROWS)
    queries = write_rows(tmp_path / "queries.jsonl", [{"text": "text"}])
    answers = tmp_path / "answers.jsonl"
    answers.write_text("old")

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    files = ("--demonstrations", demonstrations, "--queries", queries, "--output", answers)
    code, output, errors = run_cli("predict", "--model", tiny_model_folder(), *files)
    assert (code, output) == (2, "")
    assert f"error: {answers}: cannot be written (No space left on device). Free some space or choose a folder" in errors
    assert answers.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "demonstrations.jsonl", "queries.jsonl"]


def test_a_cache_folder_that_cannot_be_written(run_cli, suite, tmp_path, monkeypatch) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "cache").write_text("in the way")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("MANYICL_CACHE", str(tmp_path / "cache"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"model": str(tmp_path / "model.gguf"), "tasks": str(suite())}))
    code, _, errors = run_cli("inspect", recipe)
    assert code == 2
    assert f"error: {tmp_path / 'cache'}: cannot be written (" in errors
    assert (tmp_path / "cache").read_text() == "in the way"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["evaluate", "--model", "default", "--output", "r", "--shots", "1,many"],
            "--shots '1,many': 'many' is neither a number",
        ),
        (["tasks", "show", "nothing"], "suite 'builtin' has no task 'nothing'"),
        (["tasks", "check", "nowhere"], "nowhere: no such folder. Give `builtin` or the folder of a suite."),
        (["train", "absent.yaml"], "absent.yaml: cannot be read (No such file or directory). Give the path of a recipe in YAML."),
        (["predict", "--model", "m", "--demonstrations", "d.jsonl", "--queries", "q", "--output", "o"], "d.jsonl: no such file."),
    ],
)
def test_wrong_arguments(run_cli, tmp_path, monkeypatch, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    code, output, errors = run_cli(*arguments)
    assert (code, output) == (2, "")
    assert f"error: {message}" in errors
    assert list(tmp_path.iterdir()) == []


def test_check_prints_every_finding_and_ends_with_1(run_cli, suite) -> None:
    folder = suite(train=lines(*ROWS, b"{", {"text": "x", "label": "maybe"}), test=[{"text": "Text 0", "label": "yes"}])
    code, output, _ = run_cli("tasks", "check", folder)
    assert code == 1
    assert output.splitlines() == [
        f"error: {folder}/t/train.jsonl:9: broken JSON: broken JSON at column 2: "
        "Expecting property name enclosed in double quotes. Mend or remove the line.",
        f"error: {folder}/t/train.jsonl:10: unknown label: label 'maybe' is not among the 2 labels (yes, no). "
        "Correct it or list it.",
        f"error: {folder}/t/test.jsonl:1: test in train: the input stands in train at {folder}/t/train.jsonl:1",
        "3 error(s), 0 warning(s)",
    ]


def test_check_against_a_second_suite(run_cli, suite, tmp_path) -> None:
    words = "one two three four five six seven eight nine ten"
    rows = [{"text": f"{words} {number}", "label": ("yes", "no")[number % 2]} for number in range(6)]
    other = tmp_path / "other"
    write_rows(
        other / "train.jsonl", [{"text": f"{words} again {number}", "label": row["label"]} for number, row in enumerate(rows)]
    )
    folder = suite(train=rows, test=[])
    (folder / "t" / "test.jsonl").unlink()
    assert run_cli("tasks", "check", folder)[:2] == (0, "0 error(s), 0 warning(s)\n")
    code, output, _ = run_cli("tasks", "check", folder, "--against", other)
    assert code == 0
    assert output.splitlines() == [
        f"warning: {folder}/t/train.jsonl:1: shared between suites: 6 examples share text with other "
        f"(suite suite and suite other), first with {other}/train.jsonl:1",
        "0 error(s), 1 warning(s)",
    ]
