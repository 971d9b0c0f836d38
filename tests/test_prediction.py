"""Labelled examples and queries become answers: labels scored, plainly or calibrated, and text written."""

import json

import pytest

from manyicl.engines.native import open_engine
from manyicl.episodes import order_examples
from manyicl.errors import UserInputError
from manyicl.methods import CalibratedInContext
from manyicl.prediction import predict, predict_file
from manyicl.tasks.readers import load_task
from manyicl.tasks.task import Example
from plain_fixtures import write_rows

EXAMPLES = [Example(f"number {number}", ("odd", "even")[number % 2 == 0]) for number in range(8)]


def test_predicting_scores_labels_that_recur(tiny_loaded):
    answers, num_used = predict(tiny_loaded("llama"), EXAMPLES, ["number 11", "number 12"], seed=1)
    assert num_used == 8
    assert {answer.text for answer in answers} <= {"odd", "even"}
    assert all(answer.log_probability < 0 for answer in answers)
    assert predict(tiny_loaded("llama"), EXAMPLES, ["number 11", "number 12"], seed=1) == (answers, num_used)
    assert predict(tiny_loaded("llama"), EXAMPLES, ["number 11"], seed=2)[0] != answers[:1]


def test_predicting_writes_free_text(tiny_loaded):
    free = [Example(f"number {number}", f"answer {number}") for number in range(4)]
    (answer,), num_used = predict(tiny_loaded("llama"), free, ["number 9"])
    assert (answer.choice, num_used) == (-1, 4)


def test_predicting_nothing_is_nothing(tiny_loaded):
    assert predict(tiny_loaded("llama"), EXAMPLES, []) == ([], 0)


def test_options_of_demonstrations_are_not_asked_of_queries(tiny_loaded):
    with_options = [Example(each.input, each.answer, options=("even", "odd", "none")) for each in EXAMPLES]
    answers, _ = predict(tiny_loaded("llama"), with_options, ["number 11"])
    assert answers == predict(tiny_loaded("llama"), EXAMPLES, ["number 11"])[0]


def test_a_query_that_does_not_fit_is_an_error(tiny_loaded):
    with pytest.raises(UserInputError, match="queries are never cut"):
        predict(tiny_loaded("llama", max_position_embeddings=64), EXAMPLES, ["x" * 60])


def test_a_file_of_queries_becomes_a_file_of_answers(tiny_model_folder, tmp_path):
    examples = write_rows(tmp_path / "d.jsonl", [{"input": each.input, "answer": each.answer} for each in EXAMPLES])
    queries = write_rows(tmp_path / "q.jsonl", [{"input": "number 11"}, {"input": "é ☃"}])
    model = str(tiny_model_folder("llama"))
    assert predict_file(model, examples, queries, tmp_path / "out" / "a.jsonl", seed=1) == (8, 8, 2)
    rows = [json.loads(line) for line in (tmp_path / "out" / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    expected, _ = predict(model, EXAMPLES, ["number 11", "é ☃"], seed=1)
    assert rows == [
        {"input": text, "answer": answer.text, "log_probability": answer.log_probability}
        for text, answer in zip(("number 11", "é ☃"), expected, strict=True)
    ]


def test_predicting_from_a_tasks_folder_reads_its_task_yaml(tiny_model_folder, tmp_path):
    folder = tmp_path / "colours"
    folder.mkdir()
    (folder / "task.yaml").write_text('input: "colour of {thing}?"\nanswer: colour\nlabels: [red, green, blue]\n')
    write_rows(folder / "train.jsonl", [{"thing": f"t{n}", "colour": ("red", "green")[n % 2]} for n in range(6)])
    queries = write_rows(tmp_path / "q.jsonl", [{"thing": "t9"}])
    model = str(tiny_model_folder("llama"))
    assert predict_file(model, folder, queries, tmp_path / "a.jsonl", context_tokens=200) == (5, 6, 1)
    (row,) = map(json.loads, (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines())
    assert (row["input"], row["answer"] in ("red", "green", "blue")) == ("colour of t9?", True)
    (answer,), _ = predict(model, load_task(folder), ["colour of t9?"], context_tokens=200)
    assert (row["answer"], row["log_probability"]) == (answer.text, answer.log_probability)


def test_a_query_without_the_options_that_its_task_has_is_an_error(tiny_loaded, small_task):
    rows = [Example(f"n{number}", "x", options=("x", "y" * number)) for number in range(1, 4)]
    task = small_task((), train=rows, test=())
    assert len(predict(tiny_loaded("llama"), task, [Example("n9", "", options=("x", "z"))])[0]) == 1
    with pytest.raises(UserInputError, match=r"query 0 \('n9'\) has no options, as the examples of task .* have\. Give it"):
        predict(tiny_loaded("llama"), task, ["n9"])


def test_nothing_is_half_written_when_predicting_fails(tiny_model_folder, tmp_path, monkeypatch):
    examples = write_rows(tmp_path / "d.jsonl", [{"input": each.input, "answer": each.answer} for each in EXAMPLES])
    queries = write_rows(tmp_path / "q.jsonl", [{"input": "short"}, {"input": "x" * 5000}])
    (tmp_path / "a.jsonl").write_text("earlier answers")
    with pytest.raises(UserInputError, match="queries are never cut"):
        predict_file(str(tiny_model_folder("llama")), examples, queries, tmp_path / "a.jsonl")
    assert (tmp_path / "a.jsonl").read_text() == "earlier answers"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "d.jsonl", "q.jsonl"]


def test_calibrated_answers_are_those_of_the_calibrated_method(tiny_loaded, small_task):
    loaded, queries = tiny_loaded("llama"), [f"number {number}" for number in range(20, 60)]
    task = small_task(("odd", "even"), train=EXAMPLES, test=())
    answers, num_used = predict(loaded, task, queries, seed=3, calibrate=True)
    order = order_examples(task.train, seed=3, purpose="demonstrations", index=0)
    asked = [Example(query, "") for query in queries]
    opened = CalibratedInContext(open_engine(loaded, None, None), seed=3).open(task, order, asked)
    assert [answer.text for answer in answers] == [answer.text for answer in opened.answer(asked, num_used)]
    assert [answer.text for answer in answers] != [answer.text for answer in predict(loaded, task, queries, seed=3)[0]]


def test_a_calibrated_answer_is_written_without_a_log_probability(tiny_model_folder, tmp_path):
    examples = write_rows(tmp_path / "d.jsonl", [{"input": each.input, "answer": each.answer} for each in EXAMPLES])
    queries = write_rows(tmp_path / "q.jsonl", [{"input": "number 11"}])
    predict_file(str(tiny_model_folder("llama")), examples, queries, tmp_path / "a.jsonl", calibrate=True)
    (row,) = map(json.loads, (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines())
    assert set(row) == {"input", "answer"}


def test_there_must_be_labels_to_calibrate(tiny_loaded, small_task):
    free = [Example(f"number {number}", f"answer {number}") for number in range(4)]
    with pytest.raises(UserInputError, match="has free text and no labels, whose scores alone are calibrated"):
        predict(tiny_loaded("llama"), free, ["number 9"], calibrate=True)
    rows = [Example(f"n{number}", "x", options=("x", "y" * number)) for number in range(1, 4)]
    with pytest.raises(UserInputError, match="has options of its own for each query and no labels"):
        predict(tiny_loaded("llama"), small_task((), train=rows, test=()), ["n9"], calibrate=True)
