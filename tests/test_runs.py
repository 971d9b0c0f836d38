"""Run folders: what stands in them, what starts and resumes them, and what is refused before anything is written."""

import json
import shutil

import pytest
import torch
import yaml

from manyicl import runs
from manyicl.checkpoints import list_checkpoints
from manyicl.errors import ManyICLError, ModelError, RecipeError, TaskError, UserInputError
from manyicl.files import hash_file
from manyicl.modeling import load_model
from manyicl.runs import open_row
from manyicl.tasks.readers import load_suite
from manyicl.training import ManyShotTrainer
from model_fixtures import count_calls, make_recipe


@pytest.fixture
def make(tiny_model_folder, suite_folder, tmp_path):
    """A recipe over the small suite, written once; `output` is relative to the test's folder."""
    suites = []

    def build(output="run", **sections):
        if not suites:
            suites.append(suite_folder())
        sections = {"model": str(tiny_model_folder("llama")), "tasks": str(suites[0])} | sections
        return make_recipe(sections.pop("model"), sections.pop("tasks"), tmp_path / output, **sections)

    return build


def test_a_run_folder_holds_what_made_it_and_is_a_model(make, tmp_path, tiny_model_folder):
    recipe = make(training={"num_steps": 4})
    result = runs.train(recipe)
    folder = tmp_path / "run"
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "recipe.yaml",
        "run.json",
        "summary.json",
        "manyicl.json",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert names >= {"tokenizer.json", "tokenizer_config.json", "checkpoints"}
    assert yaml.safe_load((folder / "recipe.yaml").read_text()) == recipe.model_dump(mode="json")
    facts = json.loads((folder / "run.json").read_text())
    suite = load_suite(recipe.tasks)
    assert facts["data"] == {name: suite.tasks[name].fingerprint() for name in ("colour", "size")}
    assert facts["model"]["fingerprint"] == load_model(recipe.model).fingerprint
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["updates"] == result.updates == summary["best_step"] == 4
    assert summary["tokens"] == result.tokens == sum(open_row(recipe, index)[0].num_tokens for index in range(4))
    assert summary["answers"] == result.answers
    assert summary["peak_memory_bytes"] > 100 * 2**20
    assert summary["tokens_per_second"] == pytest.approx(result.tokens_per_second)
    about = json.loads((folder / "manyicl.json").read_text())
    assert about == {"base": str(tiny_model_folder("llama")), "note": "", "format": "plain"}
    tuned, base = (load_model(name, dtype="float32").model for name in (folder, recipe.model))
    assert any(not torch.equal(a, b) for a, b in zip(tuned.parameters(), base.parameters(), strict=True))


def test_a_run_learns(make):
    result = runs.train(make(training={"num_steps": 30, "save_every": 30, "learning_rate": 0.02}))
    losses = [loss for _, loss in result.losses]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_full_tuning_writes_a_whole_model(make, tmp_path):
    runs.train(make(training={"tune": "full", "num_steps": 2}))
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert not (tmp_path / "run" / "adapter_config.json").exists()
    assert hash_file(tmp_path / "run" / "model.safetensors") == hash_file(
        tmp_path / "run" / "checkpoints" / "checkpoint-2" / "model.safetensors"
    )
    assert load_model(tmp_path / "run").name == str(tmp_path / "run")


def test_a_run_over_a_run_goes_on_from_it(make, tmp_path):
    runs.train(make(training={"num_steps": 2}))
    runs.train(make("second", model=str(tmp_path / "run"), training={"num_steps": 2}))
    assert json.loads((tmp_path / "second" / "manyicl.json").read_text())["base"] == str(tmp_path / "run")
    assert load_model(tmp_path / "second").fingerprint != load_model(tmp_path / "run").fingerprint


def test_the_same_recipe_gives_the_same_weights_and_another_seed_others(make, tmp_path):
    for output, seed in (("a", 0), ("b", 0), ("c", 1)):
        runs.train(make(output, seed=seed, training={"num_steps": 2}))
    hashes = [hash_file(tmp_path / output / "adapter_model.safetensors") for output in "abc"]
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_best_validated_checkpoint_is_what_the_folder_holds(make, tmp_path, monkeypatch):
    losses = iter([2.0, 1.0, 3.0])

    def evaluate(trainer, *arguments, **options):
        metrics = {"eval_loss": next(losses)}
        trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
        return metrics

    monkeypatch.setattr(ManyShotTrainer, "evaluate", evaluate)
    result = runs.train(make(training={"num_steps": 6, "save_every": 2, "validate_checkpoints": True}))
    hashes = {
        path.name: hash_file(path / "adapter_model.safetensors") for path in list_checkpoints(tmp_path / "run" / "checkpoints")
    }
    assert sorted(hashes) == ["checkpoint-4", "checkpoint-6"]
    assert result.best_step == 4
    assert hash_file(tmp_path / "run" / "adapter_model.safetensors") == hashes["checkpoint-4"] != hashes["checkpoint-6"]


def test_validation_rows_are_many_shot_rows_of_the_validation_tasks(make, monkeypatch):
    calls = []

    def stop(*arguments, **options):
        calls.append(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "train_model", stop)
    training = {"validate_checkpoints": True, "validation_rows": 3, "num_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        runs.train(make(training=training, episodes={"num_shots": 1}))
    rows = calls[0]["validation"].rows
    assert [row.sequences[0].episode.task for row in rows] == ["mood"] * 3
    assert all(row.num_answers > 2 for row in rows)


def test_an_interrupted_run_is_refused_without_resume_and_finished_with_it(make, tmp_path, monkeypatch):
    runs.train(make("whole"))
    step = ManyShotTrainer.training_step

    def interrupted(trainer, *arguments, **options):
        if trainer.state.global_step == 5:
            raise KeyboardInterrupt
        return step(trainer, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ManyShotTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runs.train(make())
    assert not (tmp_path / "run" / "summary.json").exists()
    with pytest.raises(ModelError, match="run: holds no model"):
        load_model(tmp_path / "run")
    with pytest.raises(
        RecipeError, match=r"run: holds a run already\. Go on with it \(--resume, or resume=True\), or choose another output"
    ):
        runs.train(make())
    result = runs.train(make(), resume=True)
    assert result.updates == 6
    assert hash_file(tmp_path / "run" / "adapter_model.safetensors") == hash_file(
        tmp_path / "whole" / "adapter_model.safetensors"
    )


def test_resuming_what_was_never_started_starts_it(make, tmp_path):
    assert runs.train(make(training={"num_steps": 2}), resume=True).updates == 2
    assert (tmp_path / "run" / "summary.json").is_file()


def test_a_finished_run_is_left_as_it_is(make, tmp_path, monkeypatch):
    first = runs.train(make(training={"num_steps": 2}))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    loads = count_calls(monkeypatch, runs, "load_model")
    again = runs.train(make(training={"num_steps": 2}), resume=True)
    assert again == first
    assert loads == []
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": {"num_steps": 2, "learning_rate": 0.5}}, r"\(training\.learning_rate: 0\.01 -> 0\.5\)"),
        ({"training": {"num_steps": 4}, "seed": 3}, r"\(seed: 0 -> 3; training\.num_steps: 2 -> 4\)"),
        ({"training": {"num_steps": 2, "lora": {"rank": 8}}}, r"\(training\.lora\.rank: 16 -> 8\)"),
        ({"training": {"num_steps": 2}, "meta_training": ["size"]}, r"\(meta_training: None -> \['size'\]\)"),
    ],
)
def test_resuming_with_another_recipe_names_the_keys(make, tmp_path, sections, message):
    runs.train(make(training={"num_steps": 2}))
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(
        RecipeError, match=rf"run: was started with another recipe {message}\. Use that recipe, or another output"
    ):
        runs.train(make(**sections), resume=True)


def test_resuming_with_other_data_or_another_model_is_refused(make, tmp_path, tiny_model_folder):
    model = tmp_path / "model"
    shutil.copytree(tiny_model_folder("llama"), model)
    recipe = make(model=str(model), training={"num_steps": 2, "validate_checkpoints": True, "validation_rows": 1})
    runs.train(recipe)
    (tmp_path / "run" / "summary.json").unlink()
    shutil.copy(tiny_model_folder("llama", seed=1) / "model.safetensors", model)
    with pytest.raises(RecipeError, match=r"run: the files of model .*model have changed since the run was started"):
        runs.train(recipe, resume=True)
    shutil.copy(tiny_model_folder("llama") / "model.safetensors", model)
    for name in ("colour", "mood"):
        path = tmp_path / "suite" / name / "train.jsonl"
        content = path.read_text()
        path.write_text(content.replace("1", "7", 1))
        with pytest.raises(RecipeError, match=f"run: the examples of {name} have changed since the run was started"):
            runs.train(recipe, resume=True)
        path.write_text(content)
    assert runs.train(recipe, resume=True).updates == 2


def test_resuming_with_other_threads_is_said(make, tmp_path, caplog):
    runs.train(make(training={"num_steps": 2}))
    (tmp_path / "run" / "summary.json").unlink()
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(facts | {"threads": 99}))
    runs.train(make(training={"num_steps": 2}), resume=True)
    warnings = [
        record.getMessage() for record in caplog.records if record.levelname == "WARNING" and record.name == "manyicl.runs"
    ]
    assert len(warnings) == 1
    assert "was started with threads 99 and goes on with" in warnings[0]


def test_checkpoints_without_a_recipe_are_not_touched(make, tmp_path):
    (tmp_path / "run" / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    for resume in (False, True):
        with pytest.raises(RecipeError, match="run: holds checkpoints without a recipe"):
            runs.train(make(), resume=resume)
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-5").is_dir()


@pytest.mark.parametrize(
    ("sections", "error", "message"),
    [
        (
            {"meta_training": ["speed"]},
            RecipeError,
            "meta_training names 'speed', which is a held_out task. Training on it would void",
        ),
        ({"meta_training": ["mood"]}, RecipeError, "meta_training names 'mood', which is a validation task"),
        ({"meta_training": ["taste"]}, RecipeError, r"'taste', which suite 'suite' does not have \(colour, size, mood, speed\)"),
        ({"meta_training": []}, RecipeError, "suite 'suite' has no meta-training tasks"),
        ({"episodes": {"max_tokens": 5000}}, RecipeError, r"episodes\.max_tokens = 5000 is more than the 4096 positions of"),
        ({"episodes": {"max_tokens": 20}}, UserInputError, r"fit max_tokens=20 .* Raise episodes\.max_tokens"),
        ({"training": {"lora": {"targets": ["w"]}}}, ModelError, r"training\.lora\.targets = \['w'\]: use all-linear, or a list"),
        ({"training": {"trainer": {"optin": "sgd"}}}, RecipeError, "TrainingArguments has no 'optin'; the nearest is 'optim'"),
        ({"training": {"report_to": ["paper"]}}, RecipeError, "paper is not supported"),
        ({"training": {"rows_per_step": 3, "rows_per_device": 2}}, RecipeError, "rows_per_step = 3 is no multiple of 2"),
        ({"model": "no/such/model"}, ModelError, "no/such/model: there is no such folder"),
        ({"tasks": "no/such/suite"}, TaskError, "no/such/suite: no such folder"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(make, tmp_path, sections, error, message):
    with pytest.raises(error, match=message):
        runs.train(make(**sections))
    assert not (tmp_path / "run").exists()


def test_validation_without_validation_tasks_is_an_error(make, tmp_path):
    recipe = make(training={"validate_checkpoints": True})
    (tmp_path / "suite" / "suite.yaml").write_text("meta_training: [colour, size]\n")
    with pytest.raises(RecipeError, match=r"training\.validate_checkpoints: suite 'suite' has no validation tasks"):
        runs.train(recipe)
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverges_leaves_its_checkpoints_and_no_model(make, tmp_path, monkeypatch):
    step = ManyShotTrainer.compute_loss

    def diverging(trainer, *arguments, **options):
        loss = step(trainer, *arguments, **options)
        return loss * float("nan") if trainer.state.global_step == 4 else loss

    monkeypatch.setattr(ManyShotTrainer, "compute_loss", diverging)
    with pytest.raises(ManyICLError, match="the loss is nan at update 5"):
        runs.train(make())
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["checkpoint-2", "checkpoint-4"]
    assert not (tmp_path / "run" / "adapter_config.json").exists()


def test_a_row_is_opened_without_the_models_weights(make, monkeypatch):
    monkeypatch.setattr(runs, "load_model", lambda *arguments, **options: pytest.fail("the weights were loaded"))
    row, tokenizer = open_row(make(), 3)
    assert row.sequences[0].episode.index == 3
    assert tokenizer.eos_token_id == 256


def test_shots_that_do_not_fit_are_said_before_the_first_update(tiny_model_folder, suite_folder, tmp_path, caplog):
    made = make_recipe(
        tiny_model_folder("llama"), suite_folder(), tmp_path / "run", training={"num_steps": 1}, episodes={"num_shots": 500}
    )
    runs.train(made)
    said = [record.getMessage() for record in caplog.records if "episodes.num_shots=500" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("1 of the first 1 episodes hold fewer than episodes.num_shots=500 demonstrations, the shortest ")


def test_resuming_with_another_number_of_processes_is_said(make, tmp_path, caplog):
    runs.train(make(training={"num_steps": 2}))
    (tmp_path / "run" / "summary.json").unlink()
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["processes"] == 1
    (tmp_path / "run" / "run.json").write_text(json.dumps(facts | {"processes": 4}))
    runs.train(make(training={"num_steps": 2}), resume=True)
    assert (
        len([record for record in caplog.records if "was started with processes 4 and goes on with 1" in record.getMessage()])
        == 1
    )


def test_what_processes_were_not_all_started_with_is_named(make, tmp_path, monkeypatch):
    def as_if_another_had(facts):
        return (
            [facts, facts | {"seed": 7, "training": facts["training"] | {"num_steps": 9}}] if "seed" in facts else [facts, facts]
        )

    monkeypatch.setattr(runs, "gather_from_processes", as_if_another_had)
    with pytest.raises(
        RecipeError, match=r"process 1 was not started with the same .*\(seed: 0 -> 7; training\.num_steps: 2 -> 9; on"
    ):
        runs.train(make(training={"num_steps": 2}))
    monkeypatch.setattr(
        runs, "gather_from_processes", lambda facts: [facts, dict.fromkeys(facts, "other")] if len(facts) == 1 else [facts]
    )
    with pytest.raises(RecipeError, match=r"\(files of the model: [0-9a-f]{64} -> other; on the left process 0\)"):
        runs.train(make(training={"num_steps": 2}))
    assert not (tmp_path / "run").exists()
