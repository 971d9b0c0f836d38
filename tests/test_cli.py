"""The commands from end to end on tiny models, in this process; what users get wrong is in test_cli_errors.py."""

import json
import os
import signal
import subprocess
import sys

import pytest

from manyicl import cli, runs
from manyicl.errors import CheckpointError, UserInputError
from manyicl.modeling import load_model
from manyicl.records import read_records
from model_fixtures import make_recipe, write_recipe
from plain_fixtures import write_rows


@pytest.fixture
def recipe(tiny_model_folder, suite_folder, tmp_path):
    made = make_recipe(tiny_model_folder("llama"), suite_folder(), tmp_path / "run", training={"num_steps": 2})
    return write_recipe(tmp_path / "recipe.yaml", made)


def test_train_then_use_the_run_everywhere(run_cli, recipe, tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")  # Wide enough for a table without broken lines.
    code, output, _ = run_cli("train", recipe)
    assert code == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert output.startswith(f"2 updates, {summary['tokens']} tokens, {summary['answers']} answers in ")
    assert output.endswith(f"; written to {tmp_path / 'run'}\n")

    base, tuned, suite = tiny_model_folder("llama"), tmp_path / "run", tmp_path / "suite"
    records = tmp_path / "records.jsonl"
    options = ("--tasks", suite, "--shots", "0,2,max", "--seeds", 2, "--queries", 3, "--context", 200)
    code, output, _ = run_cli("evaluate", "--model", base, "--model", tuned, *options, "--output", records)
    assert code == 0
    found = read_records(records)
    assert sorted((record.model, record.shots, record.seed) for record in found if record.shots != "max") == sorted(
        (str(model), shots, seed) for model in (base, tuned) for shots in (0, 2) for seed in (0, 1)
    )
    assert len(found) == 12
    assert {record.num_queries for record in found} == {3}
    assert output.splitlines()[-1] == f"records: {records}"
    for shown in (" 0 ┃", " 2 ┃", " max ┃", "mean over tasks", "2 orders of demonstrations"):
        assert shown in output

    code, output, _ = run_cli("export", tuned, tmp_path / "plain")
    assert (code, output) == (0, f"written to {tmp_path / 'plain'}\n")
    assert load_model(tmp_path / "plain").fingerprint != load_model(base).fingerprint

    demonstrations = write_rows(tmp_path / "d.jsonl", [{"input": f"n {n}", "label": "ab"[n % 2]} for n in range(6)])
    queries = write_rows(tmp_path / "q.jsonl", [{"input": "n 9"}, {"input": "n 10"}])
    files = ("--demonstrations", demonstrations, "--queries", queries, "--output", tmp_path / "a.jsonl")
    code, output, _ = run_cli("predict", "--model", tuned, *files)
    assert (code, output) == (0, f"2 answers from 6 of 6 demonstrations; written to {tmp_path / 'a.jsonl'}\n")
    assert [json.loads(line)["answer"] in "ab" for line in (tmp_path / "a.jsonl").read_text().splitlines()] == [True, True]

    (tmp_path / "text.txt").write_text("plain text " * 20)
    models = ("--model", base, "--model", tuned)
    code, output, _ = run_cli("corpus", *models, "--text", tmp_path / "text.txt", "--window", 32, "--output", tmp_path / "c.json")
    results = json.loads((tmp_path / "c.json").read_text())["results"]
    assert code == 0
    assert output.splitlines() == [
        *(f"{row['model']} text.txt: {row['bits_per_byte']:.4f} bits per byte (220 bytes)" for row in results),
        f"written to {tmp_path / 'c.json'}",
    ]
    assert results[0]["bits_per_byte"] != results[1]["bits_per_byte"]


def test_overrides_and_resume(run_cli, recipe, tmp_path):
    output = tmp_path / "other"
    assert run_cli("train", recipe, f"output={output}", "training.num_steps=3")[0] == 0
    assert json.loads((output / "summary.json").read_text())["updates"] == 3
    code, _, errors = run_cli("train", recipe, f"output={output}", "training.num_steps=3")
    assert code == 2
    assert (
        errors == f"error: {output}: holds a run already. Go on with it (--resume, or resume=True), or choose another output.\n"
    )
    code, shown, _ = run_cli("train", recipe, f"output={output}", "training.num_steps=3", "--resume")
    assert code == 0
    assert shown.startswith("3 updates, ")
    code, _, errors = run_cli("train", recipe, f"output={output}", "training.num_steps=4", "--resume")
    assert code == 2
    assert "was started with another recipe (training.num_steps: 3 -> 4)" in errors


def test_inspect_shows_a_row_as_it_is_fed(run_cli, recipe):
    code, output, _ = run_cli("inspect", recipe, "--row", 1, "--json")
    assert code == 0
    shown = json.loads(output)
    assert shown != json.loads(run_cli("inspect", recipe, "--row", 0, "--json")[1])
    code, output, _ = run_cli("inspect", recipe)
    assert code == 0
    assert "Answer:" in output


@pytest.mark.parametrize(("error", "code"), [(UserInputError("the message"), 2), (CheckpointError("the message"), 1)])
def test_errors_end_with_their_code_and_message_and_no_traceback(run_cli, recipe, monkeypatch, error, code):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(runs, "train", fail)
    assert run_cli("train", recipe) == (code, "", "error: the message\n")


@pytest.mark.parametrize(
    ("text", "expected"), [("0", (0,)), ("0,1,max", (0, 1, "max")), ("4, 16 ,max", (4, 16, "max")), ("1,1,2", (1, 2))]
)
def test_shots_are_read_from_a_list(text, expected):
    assert cli._parse_shots(text) == expected


@pytest.mark.parametrize("text", ["", "1,", "-1", "1.5", "all", "1;2", "²"])
def test_other_shots_are_refused(text):
    with pytest.raises(UserInputError, match=r"--shots .* is neither a number nor max\. Write for instance 0,4,16,max"):
        cli._parse_shots(text)


# As threads of torch's process groups now and then do, something aborts the process while the interpreter ends.
ABORTING = """
import atexit, os
from manyicl import cli
from manyicl.errors import UserInputError

class Aborting:
    def __del__(self, abort=os.abort):
        abort()

held = Aborting()
atexit.register(print, "what was registered is done")

def fail():
    raise UserInputError("not like this")

cli.app = fail
cli.main()
"""


@pytest.mark.parametrize(("size", "code"), [("1", -signal.SIGABRT), ("2", 2)])
def test_a_process_among_several_ends_with_its_own_code(size, code):
    environment = os.environ | {"WORLD_SIZE": size, "RANK": "0"}
    ended = subprocess.run([sys.executable, "-c", ABORTING], env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == code, ended.stderr
    assert "error: not like this" in ended.stderr
    assert ended.stdout == "what was registered is done\n"
