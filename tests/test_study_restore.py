"""A study that is given more to do under way, and one that goes on from published results."""

import re
from pathlib import Path

import pytest

from manyicl.errors import RecipeError, RecordsError
from manyicl.results.files import write_results
from manyicl.study import restore, runner
from manyicl.study.jobs import Study
from manyicl.study.restore import restore_folder
from manyicl.study.runner import work
from manyicl.tasks.readers import load_suite
from manyicl.versions import library_versions
from model_fixtures import count_calls
from study_fixtures import FAST, open_folder, statuses, study_maker, untimed


@pytest.fixture
def make(tiny_model_folder, suite_folder, tmp_path):
    """A study recipe over the small suite."""
    return study_maker(tiny_model_folder("llama", max_position_embeddings=2048), suite_folder(), tmp_path)


def test_a_second_reading_may_be_added_to_a_study_under_way(make, monkeypatch):
    recipe = make(**FAST)
    work(recipe)
    before = untimed(open_folder(recipe).gather())
    grown = make(**FAST, calibrated=True, notes=["read again"])
    added = [cell.name for cell in open_folder(grown).cells if open_folder(grown).status(cell.name) == "open"]
    suite = load_suite(grown.tasks)
    tasks = [name for name in (*suite.validation, *suite.held_out) if suite.tasks[name].labels]
    models = ("base", "zero_shot/seed-0", "all_answers/seed-0")
    assert added == [f"calibrated/{model}/{task}" for task in tasks for model in models]
    work(grown)
    results = open_folder(grown).gather()
    assert untimed(results)[3] == before[3]
    own = [record for record in results.records if record.condition == "calibrated"]
    assert {(record.model, record.task) for record in own} == {(model, task) for model in models for task in tasks}
    assert [record for record in untimed(results)[0] if record.condition != "calibrated"] == before[0]
    assert set(results.claims["second_reading"]["methods"]) == {"in_context", "zero_shot", "all_answers", "classic"}
    assert "calibrated: true" in (Path(recipe.output) / "study.yaml").read_text()


def test_more_queries_may_be_asked_of_a_study_under_way(make, tmp_path):
    recipe = make(**FAST)
    work(recipe)
    first = open_folder(recipe).gather()
    suite = load_suite(recipe.tasks)
    grown = make(**FAST, num_queries=recipe.num_queries + 1)
    folder = open_folder(grown)
    left = [cell.name for cell in folder.cells if folder.status(cell.name) == "open"]
    read = [cell.name for cell in folder.cells if cell.kind in ("evaluate", "classic") and cell.task in suite.held_out]
    assert left == read
    assert set(statuses(open_folder(recipe)).values()) == {"done"}  # Looking changes nothing.
    work(grown)
    again = open_folder(grown).gather()
    kept = [record for record in first.records if record.role != "held_out"]
    assert [record for record in again.records if record.role != "held_out"] == kept
    assert again.models == first.models
    longer = [record for record in again.records if record.role == "held_out"]
    assert {record.num_queries for record in longer} == {grown.num_queries}
    with pytest.raises(RecipeError, match="num_queries differ"):
        open_folder(recipe)
    fresh = make("fresh", **FAST, num_queries=grown.num_queries)
    work(fresh)
    assert untimed(again)[0] == untimed(open_folder(fresh).gather())[0]
    restored = open_folder(make("restored", **FAST, num_queries=grown.num_queries))
    write_results(first, tmp_path / "first")
    restore_folder(restored, tmp_path / "first")
    trainings = [cell.name for cell in restored.cells if cell.kind == "train"]  # Their weights are needed.
    assert [cell.name for cell in restored.cells if restored.status(cell.name) == "open"] == [*trainings, *read]


def test_a_study_in_use_is_not_given_more_queries(make):
    recipe = make(**FAST | {"methods": ["in_context", "classic"]})
    work(recipe, only=["classic"])
    before = open_folder(recipe)
    grown = open_folder(make(**FAST | {"methods": ["in_context", "classic"]}, num_queries=recipe.num_queries + 1))
    with before.lock("evaluate/base/speed"), pytest.raises(RecipeError, match="a process is at evaluate/base/speed with the rec"):
        grown.take_over()
    assert before.is_current()
    assert before.status("classic/speed") == "done"
    assert before.records("classic/speed") != []
    grown.take_over()
    assert before.status("classic/speed") == "open"
    cell = next(cell for cell in before.cells if cell.name == "classic/speed")
    with pytest.raises(RecipeError, match="another process has given this folder a recipe that asks for more"):
        runner._do(before, Study(recipe, load_suite(recipe.tasks), before.outcome), cell)
    assert before.records("classic/speed") == []


def test_a_kill_while_cells_are_emptied_leaves_none_with_fewer_queries(make, monkeypatch):
    recipe = make(**FAST | {"methods": ["in_context", "classic"]})
    work(recipe, only=["classic"])
    grown = make(**FAST | {"methods": ["in_context", "classic"]}, num_queries=recipe.num_queries + 1)
    num_left, unlink = [1], Path.unlink

    def unlink_one(path, **options):
        if not num_left[0]:
            raise KeyboardInterrupt
        num_left[0] -= 1
        unlink(path, **options)

    folder = open_folder(grown)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink_one)
        with pytest.raises(KeyboardInterrupt):
            folder.take_over()
    work(grown, only=["classic"])
    held_out = [record for record in open_folder(grown).gather().records if record.role == "held_out"]
    assert {record.num_queries for record in held_out} == {grown.num_queries}


def test_a_study_under_way_may_be_given_training_seeds(make):
    study = FAST | {"methods": ["all_answers", "zero_shot", "classic"]}
    recipe = make(**study)
    work(recipe, only=["classic"])
    more = make(**study | {"training_seeds": {"values": [1], "methods": ["all_answers"]}})
    most = make(**study | {"training_seeds": {"values": [1, 2], "methods": ["zero_shot", "all_answers"]}})
    for grown, methods, seeds in ((more, ("all_answers",), (1,)), (most, ("zero_shot", "all_answers"), (1, 2))):
        folder = open_folder(grown)
        assert {name for name, status in statuses(folder).items() if status == "done"} == {"classic/mood", "classic/speed"}
        wanted = {f"train/{method}/seed-{seed}" for method in methods for seed in (0, *seeds)}
        assert {cell.name for cell in folder.cells if cell.kind == "train"} >= wanted
        folder.take_over()
    for fewer in (recipe, more):
        with pytest.raises(RecipeError, match="training_seeds differ"):
            open_folder(fewer)


def test_a_restored_study_ends_as_one_that_was_not_interrupted(make, monkeypatch):
    """Results alone suffice: a training is repeated where a cell that is left needs its weights."""
    study = FAST | {
        "methods": ["in_context", "all_answers", "classic", "dedicated"],
        "dedicated": {"rates": [1e-3], "max_epochs": 1},
    }
    corpus = {"forgetting": make().forgetting.model_dump()}
    recipe, other = make(**study | corpus), make("other", **study | corpus)
    work(recipe, only=["rate", "train", "forgetting", "classic", "dedicated-rate", "dedicated"])
    write_results(open_folder(recipe).gather(), Path(recipe.output) / "results")
    folder = open_folder(other)
    assert restore_folder(folder, Path(recipe.output) / "results") == open_folder(recipe).progress().done
    assert untimed(folder.gather())[:-1] == untimed(open_folder(recipe).gather())[:-1]
    differing = {cell for cell, status in statuses(open_folder(recipe)).items() if status != folder.status(cell)}
    assert differing == {"train/all_answers/seed-0"}  # A snapshot is not evaluated yet: its weights are needed.
    calls = count_calls(monkeypatch, Study, "run")
    work(other)
    assert [cell.name for _, cell in calls if cell.kind != "evaluate"] == ["train/all_answers/seed-0"]
    work(recipe)
    assert untimed(folder.gather()) == untimed(open_folder(recipe).gather())


def test_a_training_that_ends_in_other_weights_has_its_cells_done_again(make, monkeypatch, caplog):
    """As on another processor: here the published hash of the weights is another."""
    study = FAST | {"methods": ["all_answers", "classic"], "num_snapshots": 1}
    recipe = make(**study)
    work(recipe)
    results = Path(recipe.output) / "results"
    write_results(open_folder(recipe).gather(), results)
    more = make("more", **study, calibrated=True)
    folder = open_folder(more)
    restore_folder(folder, results)
    assert folder.status("train/all_answers/seed-0") == "open"
    cells = results / "cells.json"
    (weights,) = open_folder(recipe).read("train/all_answers/seed-0").facts["weights"].values()
    assert weights in cells.read_text()
    calls = count_calls(monkeypatch, Study, "run")
    work(more)
    done = [cell.name for _, cell in calls]
    assert {name.partition("/")[0] for name in done} == {"train", "calibrated"}
    assert "other versions" not in caplog.text
    torch_version = library_versions()["torch"]
    text = cells.read_text().replace(weights, "0" * 64)
    cells.write_text(text.replace(f'"torch":"{torch_version}"', '"torch":"1.0"'), encoding="utf-8")
    other = make("other", **study, calibrated=True)
    restore_folder(open_folder(other), results)
    calls.clear()
    work(other)
    assert re.search(rf"train/all_answers/seed-0: is repeated .* \(torch 1\.0 -> {re.escape(torch_version)}\)", caplog.text)
    again = {cell.name for _, cell in calls} - set(done)
    assert again == {cell.name for cell in open_folder(recipe).cells if "train/all_answers/seed-0" in cell.needs}
    assert untimed(open_folder(other).gather())[:-1] == untimed(open_folder(more).gather())[:-1]


def test_what_cannot_be_restored_is_refused(make, tmp_path):
    study = FAST | {"methods": ["in_context", "classic"]}
    recipe = make(**study, dtype="float32")
    work(recipe, only=["classic"])
    results = Path(recipe.output) / "results"
    write_results(open_folder(recipe).gather(), results)
    with pytest.raises(RecipeError, match=r"study: cells were begun here already\. Restore into another output"):
        restore_folder(open_folder(recipe), results)
    changed = make("other", **study | {"num_queries": 3, "dtype": "float32"})
    with pytest.raises(RecipeError, match=r"results: holds the results of another recipe \(num_queries differ\)"):
        restore_folder(open_folder(changed), results)
    cells = results / "cells.json"
    cells.write_text(cells.read_text().replace('"num_records":4', '"num_records":1'), encoding="utf-8")
    with pytest.raises(RecordsError, match=r"its cells account for 2 of 8 records: the files are not of one writing"):
        restore_folder(open_folder(make("other", **study, dtype="float32")), results)
    recipe_file = results / "study.yaml"
    text = recipe_file.read_text()
    recipe_file.write_text(text.replace("dtype: float32", "dtype: bfloat16", 1), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"holds the results of another recipe \(dtype differ\)"):
        restore_folder(open_folder(make("other", **study, dtype="float32")), results)
    recipe_file.write_text(text, encoding="utf-8")
    hashes = results / "tasks.json"
    hashes.write_text(hashes.read_text().replace('"speed": "', '"speed": "0'), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"results: was made from other examples of speed\. Give the examples"):
        restore_folder(open_folder(make("other", **study, dtype="float32")), results)
    assert not (tmp_path / "other" / "cells").exists()


def test_an_interrupted_restore_leaves_nothing(make, monkeypatch):
    study = FAST | {"methods": ["in_context", "classic"]}
    recipe, other = make(**study), make("other", **study)
    work(recipe, only=["classic"])
    results = Path(recipe.output) / "results"
    write_results(open_folder(recipe).gather(), results)
    folder = open_folder(other)
    with monkeypatch.context() as patch:
        patch.setattr(restore, "_write_cell", lambda *arguments, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            restore_folder(folder, results)
    assert folder.progress().done == 0
    assert not (folder.output / "cells").exists()
    assert restore_folder(folder, results) == folder.progress().done == open_folder(recipe).progress().done
    assert not (folder.output / "cells.restoring").exists()
