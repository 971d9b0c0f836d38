"""A whole study on a tiny model: which cells there are, what they leave, resuming, failures, and what is refused."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import yaml

from manyicl.errors import RecipeError
from manyicl.records import read_records
from manyicl.reporting.html import KINDS
from manyicl.results.files import read_results, write_results
from manyicl.study.cells import Cell, list_cells, select_cells
from manyicl.study.jobs import Study, count_examples, count_updates, extended_rate
from manyicl.study.recipe import METHODS, load_study_recipe
from manyicl.study.runner import run_study, work
from manyicl.tasks.readers import load_suite
from model_fixtures import count_calls
from study_fixtures import FAST, open_folder, statuses, study_maker

ROOT = Path(__file__).parents[1]


@pytest.fixture
def make(tiny_model_folder, suite_folder, tmp_path):
    """A study recipe over the small suite."""
    return study_maker(tiny_model_folder("llama", max_position_embeddings=2048), suite_folder(), tmp_path)


@pytest.mark.slow
def test_a_whole_study(make):
    recipe = make(calibrated=True)
    progress = run_study(recipe)
    results = read_results(Path(recipe.output) / "results")
    assert {cell.cell: cell.error for cell in results.cells if cell.status != "done"} == {}
    assert progress.done == progress.total == len(results.cells)
    assert set(results.claims["methods"]) == {*METHODS} - {"dedicated"}
    assert results.claims["waiting"] == []
    assert set(results.claims["second_reading"]["claims"]) == {
        name for name in results.claims["claims"] if name.startswith("beats")
    }
    suite = load_suite(recipe.tasks)
    again = {
        (each.model, each.task, each.shots)
        for each in results.records
        if each.condition == "calibrated" and "seed-1" in each.model
    }
    assert again == {("all_answers/seed-1", task, shots) for task in suite.held_out for shots in (0, "max")}
    by_model = {facts.model: facts for facts in results.models}
    ours, short = by_model["all_answers/seed-0"], by_model["zero_shot/seed-0"]
    for facts in (ours, short):
        run = yaml.safe_load((Path(recipe.output) / "cells/train" / facts.model / "run/recipe.yaml").read_text())
        summary = json.loads((Path(recipe.output) / "cells/train" / facts.model / "run/summary.json").read_text())
        assert (facts.tokens, facts.answers, facts.updates) == (summary["tokens"], summary["answers"], summary["updates"])
        assert recipe.budget_tokens <= facts.tokens < recipe.budget_tokens + 128
        assert run["training"]["schedule"] == "constant_with_warmup"
    assert short.target_answers == short.answers
    last = by_model["last_answer/seed-0"]
    assert last.target_answers == last.updates < last.answers  # One a row.
    assert by_model["all_answers/seed-0/1of2"].tokens < ours.tokens
    full = by_model["dedicated/speed/full"]
    assert by_model["dedicated-rate/mood/0.001"].updates == 1 < full.updates
    assert (full.num_examples, full.method) == (len(suite.tasks["speed"].train), "dedicated_full")
    dedicated = [record for record in results.records if record.method == "dedicated_prefix"]
    longest = [record for record in results.records if (record.model, record.task, record.shots) == ("base", "speed", "max")]
    held = {record.seed: record.num_demonstrations for record in longest if not record.condition}
    assert {record.seed: by_model[record.model].num_examples for record in dedicated if record.task == "speed"} == held
    assert {facts.method for facts in results.corpora} == {"in_context", *recipe.joint_methods()}
    chosen = Study(recipe, suite, open_folder(recipe).outcome).chosen_rate("all_answers")
    assert ours.learning_rate == chosen


def test_held_out_tasks_choose_nothing(make):
    """What is chosen before the first held-out evaluation is all that is chosen: cells of those tasks need no other of them."""
    recipe = make()
    suite = load_suite(recipe.tasks)
    for cell in list_cells(recipe, suite):
        for needed in cell.needs:
            assert not any(needed.endswith(f"/{task}") or f"/{task}/" in needed for task in suite.held_out), (cell.name, needed)


def test_a_stopped_study_goes_on_and_does_nothing_twice(make, monkeypatch):
    recipe = make(**FAST)
    calls = count_calls(monkeypatch, Study, "run")
    work(recipe, only=["rate"])
    done = [cell.name for _, cell in calls]
    assert done == [name for name, status in statuses(open_folder(recipe)).items() if status == "done"]
    assert {name.partition("/")[0] for name in done} == {"rate"}
    work(recipe)
    assert [cell.name for _, cell in calls] == [cell.name for cell in open_folder(recipe).cells]
    assert set(statuses(open_folder(recipe)).values()) == {"done"}
    work(recipe)
    assert len(calls) == len(open_folder(recipe).cells)


HARNESS = FAST | {"methods": ["in_context"], "forgetting": {"harness_tasks": ["odd"], "harness_limit": 7}}


def test_scores_of_the_harness_are_gathered(make, monkeypatch):
    asked = []

    def evaluate(model, tasks, **options):
        asked.append((tasks, options))
        return [HarnessScore("odd", "acc", 0.5, 0.25)]

    @dataclass(frozen=True)
    class HarnessScore:
        task: str
        metric: str
        value: float
        standard_error: float

    monkeypatch.setitem(sys.modules, "manyicl.lm_eval_adapter", SimpleNamespace(evaluate_harness_tasks=evaluate))
    recipe = make(**HARNESS)
    work(recipe, only=["harness"])
    write_results(open_folder(recipe).gather(), Path(recipe.output) / "results")
    found = read_results(Path(recipe.output) / "results").harness
    assert [facts.model_dump() for facts in found] == [
        {"model": "base", "method": "in_context", "task": "odd", "metric": "acc", "value": 0.5, "standard_error": 0.25}
    ]
    assert asked == [(["odd"], {"dtype": recipe.resolved().dtype, "include_path": None, "limit": 7})]


def test_a_harness_that_is_not_installed_fails_its_cells_alone(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "manyicl.lm_eval_adapter", raising=False)
    recipe = make(**HARNESS)
    work(recipe)
    folder = open_folder(recipe)
    failed = {name for name, status in statuses(folder).items() if status == "failed"}
    assert failed == {"harness/base"}
    assert "open" not in statuses(folder).values()
    assert "lm-eval is not installed" in (folder.folder("harness/base") / "failure.json").read_text(encoding="utf-8")


def test_after_the_deadline_no_cell_is_begun(make):
    recipe = make(**FAST)
    work(recipe, deadline=time.time() - 1)
    assert set(statuses(open_folder(recipe)).values()) == {"open"}


def test_a_failure_is_recorded_what_needs_it_waits_and_the_rest_goes_on(make, monkeypatch):
    recipe = make(**FAST)
    original = Study._search_rate

    def failing(self, cell):
        if cell.method == "zero_shot":
            raise MemoryError("64 GB")
        return original(self, cell)

    monkeypatch.setattr(Study, "_search_rate", failing)
    work(recipe)
    folder = open_folder(recipe)
    found = statuses(folder)
    assert {name for name, status in found.items() if status == "failed"} == {"rate/zero_shot/0.001"}
    waiting = {name for name, status in found.items() if status == "open"}
    assert waiting == {name for name in found if "zero_shot" in name} - {"rate/zero_shot/0.001"}
    cells = {cell.cell: cell for cell in folder.gather().cells}
    assert cells["rate/zero_shot/0.001"].error == "MemoryError: 64 GB"
    assert cells["train/all_answers/seed-0"].status == "done"


def test_two_processes_share_a_folder_and_do_no_cell_twice(make, monkeypatch):
    recipe = make(**FAST)
    folder = open_folder(recipe)
    taken = "rate/zero_shot/0.001"
    calls = count_calls(monkeypatch, Study, "run")
    with folder.lock(taken) as is_ours:
        assert is_ours
        with folder.lock(taken) as is_ours_too:
            assert not is_ours_too
    code = (
        "import filelock, sys, time; lock = filelock.FileLock(sys.argv[1], timeout=0); lock.acquire(); "
        "print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(folder.folder(taken) / "lock")], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    try:
        work(recipe, only=["rate"], deadline=time.time() + 3)
        assert taken not in [cell.name for _, cell in calls]
        assert "rate/all_answers/0.001" in [cell.name for _, cell in calls]
    finally:
        holder.kill()
        holder.communicate()
    work(recipe, only=["rate"])
    assert [cell.name for _, cell in calls].count(taken) == 1


def test_results_of_another_recipe_and_changed_examples_are_refused(make, suite_folder):
    recipe = make(**FAST)
    open_folder(recipe.model_copy(update={"seed": 7}))  # No cell was begun: the folder is still anyone's.
    folder = open_folder(recipe)
    folder.folder("train").mkdir(parents=True)
    with pytest.raises(RecipeError, match=r"holds the results of another recipe \(budget_tokens, seed differ\)"):
        open_folder(recipe.model_copy(update={"budget_tokens": 700, "seed": 3}))
    rows = Path(recipe.tasks) / "speed" / "test.jsonl"
    rows.write_text(rows.read_text().replace("speed 25", "speed 2500"), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"the examples of speed have changed"):
        open_folder(recipe)
    (Path(recipe.output) / "study.yaml").write_text("colour: blue\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"(?s)study\.yaml: is no study recipe of this version \(.*colour"):
        open_folder(recipe)


def test_a_record_that_was_torn_is_made_again_and_nothing_else(make):
    recipe = make(**FAST)
    work(recipe, only=["rate"])
    folder = open_folder(recipe).folder("rate/all_answers/0.001")
    path = folder / "records.jsonl"
    whole = [record.model_copy(update={"seconds": 0.0, "prefill_seconds": 0.0}) for record in read_records(path)]
    path.write_bytes(path.read_bytes()[:-40])
    (folder / "result.json").unlink()
    stamp = (folder / "run" / "summary.json").stat().st_mtime_ns
    work(recipe, only=["rate"])
    again = [record.model_copy(update={"seconds": 0.0, "prefill_seconds": 0.0}) for record in read_records(path)]
    assert again == whole
    assert (folder / "run" / "summary.json").stat().st_mtime_ns == stamp


def test_a_finished_cell_whose_records_were_cut_is_done_again(make, caplog):
    recipe = make(**FAST)
    work(recipe, only=["rate"])
    folder = open_folder(recipe)
    cell = "rate/all_answers/0.001"
    path = folder.folder(cell) / "records.jsonl"
    num_records = len(folder.records(cell))
    path.write_bytes(path.read_bytes()[:-40])
    folder.reopen_damaged()
    assert f"{cell}: {num_records - 1} of {num_records} records are left; the cell is done again" in caplog.text
    assert {name for name, status in statuses(folder).items() if status == "done"} == {
        name for name in statuses(folder) if name.startswith("rate/") and name != cell
    }
    work(recipe, only=["rate"])
    assert len(folder.records(cell)) == folder.read(cell).num_records == num_records


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"methods": ["all_anwsers"]}, r"methods names an unknown method 'all_anwsers'; the nearest is 'all_answers'"),
        ({"robustness": {"methods": ["classic"]}}, r"robustness.methods names an unknown method 'classic'"),
        ({"variants": {"x": {"method": "in_context", "change": {}}}}, r"variants.x.method names an unknown method 'in_context'"),
        ({"budget": 3}, r"unknown key 'budget'; the nearest valid one is 'budget_tokens'"),
        ({"training": {"episodes": {"max_token": 3}}}, r"training recipe of zero_shot: unknown key 'episodes.max_token'"),
        ({"shots": []}, r"shots = \[\]"),
        ({"dedicated": {"rates": [1e-3], "num_rates": 2}}, r"dedicated.num_rates is 2, and rates holds 1\. Name more"),
    ],
)
def test_a_wrong_recipe_says_what_is_wrong(tmp_path, sections, message):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    with pytest.raises(RecipeError, match=message):
        load_study_recipe(path)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": {"meta_training": ["speed"]}}, r"method 'zero_shot' would train on speed, which is no meta-training task"),
        ({"training": {"meta_training": ["colour", "mood"]}}, r"would train on mood"),
        ({"robustness": {"tasks": ["mood"]}}, r"'mood' is a validation task"),
        ({"dedicated": {"overtaking_tasks": ["quickness"]}}, r"names task 'quickness', which suite .* does not have"),
        (
            {"held_out_family": {"family": "nli", "meta_training_without": ["colour"], "held_out": ["size"]}},
            r"held_out_family evaluates size, which is trained on",
        ),
    ],
)
def test_a_study_that_would_train_on_what_it_reads_is_refused(make, sections, message):
    recipe = make(**sections)
    with pytest.raises(RecipeError, match=message):
        list_cells(recipe, load_suite(recipe.tasks))


def test_the_budget_is_counted_in_tokens_that_are_fed(make):
    recipe = make()
    suite = load_suite(recipe.tasks)
    for method, in_a_row in (("all_answers", None), ("zero_shot", None), ("last_answer", 1)):
        training = recipe.training_recipe(method)
        updates = count_updates(training, suite, 600)
        before, after = count_examples(training, suite, [updates - 1, updates])
        assert before["tokens"] < 600 <= after["tokens"]
        if in_a_row:
            assert after["target_answers"] == updates
        else:
            assert after["target_answers"] == after["answers"] > updates


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({1e-4: 3.0, 1e-3: 5.0, 1e-2: 4.0}, None),
        ({1e-4: 6.0, 1e-3: 5.0, 1e-2: 4.0}, 1e-4 / 3),
        ({1e-4: 3.0, 1e-3: 5.0, 1e-2: 8.0}, 3e-2),
        ({1e-4: 5.0, 1e-3: 5.0, 1e-2: 5.0}, 1e-4 / 3),
        ({1e-3: 5.0}, None),
    ],
)
def test_a_winning_edge_is_extended(scores, expected):
    assert extended_rate(scores, 3.0) == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        ([], [0, 1, 2, 3, 4]),
        (["train"], [0, 1]),
        (["train/*/seed-1", "classic"], [1, 4]),
        (["evaluate/ours/seed-0"], [2, 3]),
        (["evaluate/ours/seed"], []),
        (["evaluate/*/*of3/*"], [3]),
    ],
)
def test_cells_are_chosen_by_pattern(only, expected):
    names = [
        "train/ours/seed-0",
        "train/ours/seed-1",
        "evaluate/ours/seed-0/sick",
        "evaluate/ours/seed-0/1of3/sick",
        "classic/sick",
    ]
    assert [names.index(cell.name) for cell in select_cells([Cell(name) for name in names], only)] == expected


def test_the_command_under_a_figure_does_all_that_its_cells_need(make):
    cells = list_cells(recipe := make(calibrated=True), load_suite(recipe.tasks))
    known = {cell.kind for cell in cells}
    for section, kinds in KINDS.items():
        chosen = select_cells(cells, [kind for kind in kinds if kind in known])
        assert {name for cell in chosen for name in cell.needs} <= {cell.name for cell in chosen}, section
    assert known - {kind for kinds in KINDS.values() for kind in kinds} == set()


def test_the_command_shows_the_plan_and_then_does_it(make, tmp_path, run_cli):
    recipe = make(**FAST | {"methods": ["in_context", "classic"]})
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")), encoding="utf-8")
    code, output, _ = run_cli("study", path, "--plan")
    assert code == 0
    assert "evaluate             2" in output
    assert "4 cells left, 0 done" in output
    code, output, errors = run_cli("study", path, "--only", "evaluate,evaluat")
    assert code == 2
    assert "--only names 'evaluat', which is no cell of this study. Names begin with one of: evaluate, classic;" in errors
    code, output, _ = run_cli("study", path, "--plan", "--only", "*/base/*")
    assert "2 cells left, 0 done" in output
    code, output, _ = run_cli("study", path)
    assert code == 0
    assert "4 of 4 cells done, 0 failed" in output
    shutil.rmtree(Path(recipe.output) / "cells")
    code, output, _ = run_cli("study", path, "--plan", "--output", tmp_path / "other")
    assert "4 cells left, 0 done" in output
    code, output, _ = run_cli(
        "study", path, "--plan", "--output", tmp_path / "third", "--restore", Path(recipe.output) / "results"
    )
    assert (code, "0 cells left, 4 done" in output) == (0, True)
    assert (tmp_path / "third" / "results" / "claims.json").is_file()
    assert f"results so far: {tmp_path / 'third' / 'results'}" in output
    assert not (tmp_path / "other" / "results").exists()  # Of a study in which nothing is done.


@pytest.mark.slow
def test_the_command_writes_a_card_into_each_training(make, tmp_path, run_cli):
    recipe = make(**FAST | {"methods": ["all_answers"], "dedicated": {}, "calibrated": False})
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")), encoding="utf-8")
    card = Path(recipe.output) / "cells/train/all_answers/seed-0/run/README.md"
    code, _, _ = run_cli("study", path, "--only", "rate,train")
    assert (code, "## Results" in card.read_text(encoding="utf-8")) == (0, False)
    code, _, _ = run_cli("study", path)
    records = read_results(Path(recipe.output) / "results").records
    own = [record for record in records if record.model == "all_answers/seed-0" and record.role == "held_out"]
    loaded = huggingface_hub.ModelCard.load(card)
    assert loaded.data.model_name == "all_answers/seed-0"
    assert {result.dataset_name for result in loaded.data.eval_results} == {record.task for record in own} == {"speed"}
    card.write_text("my own words", encoding="utf-8")
    code, output, _ = run_cli("study", path)
    assert (code, card.read_text(encoding="utf-8")) == (0, "my own words")
    assert "a model card was not written:" in output
    assert "was not written by this command" in output
