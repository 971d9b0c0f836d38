"""What a study will take is forecast, a fifth of dedicated examples is kept back, and a task too long is named."""

import json
from pathlib import Path

import pytest

from manyicl.study import dedicated
from manyicl.study.cells import list_cells
from manyicl.study.dedicated import split_fifth
from manyicl.study.forecast import Forecaster, forecast_study
from manyicl.study.runner import work
from manyicl.tasks.readers import load_suite
from manyicl.tasks.task import Example
from study_fixtures import FAST, open_folder, statuses, study_maker


@pytest.fixture
def make(tiny_model_folder, suite_folder, tmp_path):
    """A study recipe over the small suite."""
    return study_maker(tiny_model_folder("llama", max_position_embeddings=2048), suite_folder(), tmp_path)


@pytest.mark.parametrize(("count", "kept"), [(2, 1), (9, 1), (10, 2), (100, 20)])
def test_a_fifth_is_kept_back_and_trained_on_by_nobody(count, kept):
    examples = [Example(f"input {number}", "yes") for number in range(count)]
    back, trained = split_fifth(examples, "mood", 3)
    assert len(back) == kept
    assert sorted(back + trained, key=lambda each: each.input) == sorted(examples, key=lambda each: each.input)
    assert split_fifth(examples, "mood", 3) == (back, trained)


def test_a_fifth_differs_from_seed_to_seed_and_from_task_to_task():
    examples = [Example(f"input {number}", "yes") for number in range(100)]
    fifths = [split_fifth(examples, *of)[0] for of in (("mood", 0), ("mood", 1), ("speed", 0))]
    assert len({frozenset(each.input for each in fifth) for fifth in fifths}) == 3


def test_a_forecast_adds_up_its_cells_and_grows_with_what_is_asked(make):
    recipe = make()
    suite = load_suite(recipe.tasks)
    cells = list_cells(recipe, suite)
    found = forecast_study(recipe, suite, cells)
    assert found.num_cells == {kind: sum(cell.kind == kind for cell in cells) for kind in dict.fromkeys(c.kind for c in cells)}
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert found.hours == pytest.approx(sum(found.seconds.values()) / 3600)
    assert found.peak_memory_bytes > 0
    forecaster = Forecaster(recipe, suite)
    forecaster._operations_seconds = lambda operations: operations  # The machine's rate is measured anew by each forecaster.
    by_name = {cell.name: cell for cell in cells}
    training, reading = by_name["train/all_answers/seed-0"], by_name["evaluate/all_answers/seed-0/speed"]
    before = forecaster._training("all_answers", recipe.budget_tokens), forecaster._evaluation("speed", [0, 2, "max"], 2)
    assert forecaster.seconds(training) == pytest.approx(before[0] + 4)
    assert forecaster.seconds(reading) == pytest.approx(before[1] + 4)
    assert forecaster._training("all_answers", 2 * recipe.budget_tokens) == pytest.approx(2 * before[0])
    assert forecaster._evaluation("speed", [0, 2], 2) < before[1]
    assert forecaster._evaluation("speed", [0, 2, "max"], 4) == pytest.approx(2 * before[1])


def test_dedicated_tuning_is_forecast_at_its_caps_or_at_eight_passes(make):
    recipe = make()
    suite = load_suite(recipe.tasks)
    forecaster = Forecaster(recipe, suite)
    cells = {cell.name: cell for cell in list_cells(recipe, suite)}
    length = forecaster._length(suite.tasks["speed"])
    assert forecaster._dedicated_tokens(cells["dedicated/speed/full"]) == pytest.approx(0.8 * 24 * length * 2)
    assert forecaster._dedicated_tokens(cells["dedicated/speed/4-0"]) == pytest.approx(0.8 * 4 * length * 2)
    assert forecaster._dedicated_tokens(cells["dedicated/speed/prefix-1"]) == pytest.approx(0.8 * 256 * 2)
    assert forecaster._dedicated_tokens(cells["dedicated-rate/mood/0.001"]) == 60
    limits = recipe.dedicated.model_copy(update={"max_epochs": 40, "max_tokens": 10**9, "num_rates": 2})
    forecaster.recipe = recipe.model_copy(update={"dedicated": limits})
    assert forecaster._dedicated_tokens(cells["dedicated/speed/4-0"]) == pytest.approx(2 * 0.8 * 4 * length * 8)


def test_the_fifth_kept_back_chooses_the_rate_of_each_dedicated_model(make, monkeypatch):
    """1e-9 is made the best on validation tasks and changes nothing: it is tuned at, and not taken."""
    options = {"rates": [1e-9, 1e-2, 3e-2], "num_rates": 2, "max_epochs": 4, "rate_tokens": 60, "overtaking_tasks": []}
    recipe = make(**FAST | {"methods": ["in_context", "dedicated"], "dedicated": options})
    work(recipe, only=["dedicated-rate"])
    folder = open_folder(recipe)
    for rate, score in (("1e-09", 0.9), ("0.01", 0.1), ("0.03", 0.5)):
        path = folder.folder(f"dedicated-rate/mood/{rate}") / "result.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        content["facts"]["score"] = score
        path.write_text(json.dumps(content), encoding="utf-8")
    work(recipe, only=["dedicated/speed/full"])
    found = folder.read("dedicated/speed/full")
    losses = found.facts["kept_back_losses"]
    assert set(losses) == {"1e-09", "0.03"}
    assert losses["0.03"] < losses["1e-09"]
    assert (found.facts["rate"], found.models[0].learning_rate) == (3e-2, 3e-2)
    runs = [folder.folder("dedicated/speed/full") / "run" / rate / "result.json" for rate in losses]
    taken = [json.loads(path.read_text(encoding="utf-8"))["seconds"] for path in runs]
    assert found.models[0].seconds == pytest.approx(sum(taken))
    (folder.folder("dedicated/speed/full") / "result.json").unlink()
    monkeypatch.setattr(dedicated, "tune_dedicated", None)  # A cell that goes on tunes nothing twice.
    work(recipe, only=["dedicated/speed/full"])
    assert open_folder(recipe).read("dedicated/speed/full").facts == found.facts


def test_a_task_too_long_for_the_budget_is_named_and_the_rest_goes_on(make):
    recipe = make(**FAST | {"methods": ["in_context", "all_answers", "classic"]})
    rows = Path(recipe.tasks) / "size" / "train.jsonl"
    long = [json.loads(line) | {"input": "word " * 200} for line in rows.read_text(encoding="utf-8").splitlines()]
    rows.write_text("".join(json.dumps(row) + "\n" for row in long), encoding="utf-8")
    work(recipe)
    found = statuses(open_folder(recipe))
    assert {name for name, status in found.items() if status == "failed"} == {"rate/all_answers/0.001"}
    error = next(cell.error for cell in open_folder(recipe).gather().cells if cell.status == "failed")
    assert "task 'size': 0 example(s) fit max_tokens=128" in error
    assert "Raise episodes.max_tokens or leave the task out." in error
    done = {name for name, status in found.items() if status == "done"}
    assert done == {name for name in found if "all_answers" not in name} != set()
