"""Models put to use: evaluated on tasks, by one process or several, and measured on corpora."""

import json

import pytest
import torch

from manyicl import runs
from manyicl.errors import UserInputError
from manyicl.modeling import load_model, save_model
from manyicl.runs import EvaluationRequest, evaluate_models, measure_corpora
from model_fixtures import count_calls


def request_for(suite, *models, **fields):
    fields = {"shots": (0, 2), "num_seeds": 1, "num_queries": 3} | fields
    return EvaluationRequest(models=tuple(map(str, models)), tasks=str(suite), **fields)


def test_models_are_evaluated_one_after_the_other(suite_folder, tiny_model_folder, tmp_path):
    suite, models = suite_folder(), (tiny_model_folder("llama"), tiny_model_folder("qwen2"))
    records = evaluate_models(request_for(suite, *models, models[0]), tmp_path / "r.jsonl")
    assert [(record.model, record.task, record.shots) for record in records] == [
        (str(model), "speed", shots) for model in models for shots in (0, 2)
    ]
    assert {record.role for record in records} == {"held_out"}
    assert records[0].versions["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("fields", "tasks"),
    [
        ({"role": "all"}, ["colour", "size", "mood", "speed"]),
        ({"role": "validation"}, ["mood"]),
        ({"only": ("size", "speed")}, ["size", "speed"]),
        ({"only": ("size",), "role": "meta_training"}, ["size"]),
    ],
)
def test_tasks_are_chosen_by_role_or_name(suite_folder, tiny_model_folder, tmp_path, fields, tasks):
    records = evaluate_models(request_for(suite_folder(), tiny_model_folder("llama"), shots=(0,), **fields), tmp_path / "r.jsonl")
    assert [record.task for record in records] == tasks


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"role": "held-out"}, "role 'held-out' is none of meta_training, validation, held_out and all"),
        ({"only": ("taste",)}, r"suite 'suite' has no task 'taste' \(colour, size, mood, speed\)"),
        ({"only": ("size",), "role": "held_out"}, "task 'size' of suite 'suite' has the role meta_training, not held_out"),
        ({"format": "markdown"}, "format 'markdown' is neither plain nor chat"),
        ({"context_tokens": 5000}, "a context of 5000 tokens was asked of .*, which has 4096 positions"),
        ({"context_tokens": 10}, "the longest query and its answer take 22 tokens, more than the context of 10"),
        ({"models": ("no/such/model",)}, "no/such/model: there is no such folder"),
    ],
)
def test_wrong_requests_are_errors_and_leave_no_records(suite_folder, tiny_model_folder, tmp_path, fields, message):
    request = request_for(suite_folder(), tiny_model_folder("llama"))
    with pytest.raises(UserInputError, match=message):
        evaluate_models(EvaluationRequest(**(vars(request) | fields)), tmp_path / "r.jsonl")
    assert not (tmp_path / "r.jsonl").exists() or (tmp_path / "r.jsonl").read_bytes() == b""


def test_the_context_limits_demonstrations(suite_folder, tiny_model_folder, tmp_path):
    request = request_for(suite_folder(), tiny_model_folder("llama"), shots=(1, 8, "max"), context_tokens=100)
    records = evaluate_models(request, tmp_path / "r.jsonl")
    assert [record.shots for record in records] == ["max", 1]
    assert 1 < records[0].num_demonstrations < 8
    assert records[0].prefix_tokens < 100


def test_a_run_is_read_in_the_format_that_it_was_tuned_in(suite_folder, tiny_model, byte_tokenizer, tmp_path):
    save_model(tiny_model("llama"), byte_tokenizer, tmp_path / "model", base="", note="", format="chat")
    assert load_model(tmp_path / "model").format == "chat"
    found = {}
    for format in (None, "chat", "plain"):
        request = EvaluationRequest((str(tmp_path / "model"),), str(suite_folder()), "all", ("speed",), (2,), 1, 2, None, format)
        found[format] = [record.prefix_tokens for record in evaluate_models(request, tmp_path / f"{format}.jsonl")]
    assert found[None] == found["chat"] != found["plain"]
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "model").glob("*.safetensors")] == [0o644]


def test_corpora_of_one_name_are_told_apart(tiny_model_folder, tmp_path):
    paths = [tmp_path / folder / "text.txt" for folder in ("a", "b")] + [tmp_path / "other.txt"]
    for number, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        path.write_text("some text " * (3 + number))
    model = str(tiny_model_folder("llama"))
    rows = measure_corpora([model, model], paths, tmp_path / "out.json", max_bytes=35, window_tokens=16)
    assert [(row["model"], row["corpus"], row["num_bytes"]) for row in rows] == [
        (model, str(paths[0]), 30),
        (model, str(paths[1]), 35),
        (model, "other.txt", 35),
    ]
    assert json.loads((tmp_path / "out.json").read_text())["results"] == json.loads(json.dumps(rows))


@pytest.mark.parametrize("size", [2, 5])  # Four cells: shares of two, and one process without any.
def test_processes_share_the_cells_of_an_evaluation(suite_folder, tiny_model_folder, tmp_path, monkeypatch, size):
    request = request_for(suite_folder(), tiny_model_folder("llama"), only=("speed", "mood"), num_seeds=2)
    alone = evaluate_models(request, tmp_path / "alone.jsonl")
    loads = count_calls(monkeypatch, runs, "load_model")
    monkeypatch.setenv("WORLD_SIZE", str(size))
    given = []
    for rank in range(size):
        monkeypatch.setenv("RANK", str(rank))
        given.append(evaluate_models(request, tmp_path / "shared.jsonl"))
    assert given[:-1] == [None] * (size - 1)
    assert len(loads) == min(size, 4)
    untimed = {"seconds", "prefill_seconds"}
    assert sorted(str(each.model_dump(exclude=untimed)) for each in given[-1]) == sorted(
        str(each.model_dump(exclude=untimed)) for each in alone
    )
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    computed = count_calls(monkeypatch, runs, "open_engine")
    assert len(evaluate_models(request, tmp_path / "shared.jsonl")) == 8
    assert len(computed) == 1  # The model is opened, and no cell is done again.
    assert len((tmp_path / "shared.jsonl").read_text().splitlines()) == 8


def test_a_last_process_gives_the_cells_asked_for_and_no_others(suite_folder, tiny_model_folder, tmp_path, monkeypatch):
    suite, model = suite_folder(), tiny_model_folder("llama")
    evaluate_models(request_for(suite, model, only=("speed", "mood"), num_seeds=2), tmp_path / "r.jsonl")
    monkeypatch.setenv("WORLD_SIZE", "2")
    request = request_for(suite, model, only=("mood",), shots=(2, 3))
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        given = evaluate_models(request, tmp_path / "r.jsonl")
    assert [(record.task, record.seed, record.shots) for record in given] == [("mood", 0, 2), ("mood", 0, 3)]
