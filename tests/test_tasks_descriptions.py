import json
import logging
from pathlib import Path

import pytest

from manyicl.errors import TaskError
from manyicl.tasks.descriptions import fill_template
from manyicl.tasks.readers import load_task
from manyicl.tasks.tables import TableRow

ROWS = [{"text": f"t{number}", "label": ("a", "b")[number % 2]} for number in range(4)]
DESCRIPTION = {"input": "{text}", "answer": "label", "labels": ["a", "b"]}


@pytest.mark.parametrize(
    ("labels", "raw", "answers"),
    [
        ([0, 1], [0, 1], ["0", "1"]),
        (["0", "1"], [0, 1], ["0", "1"]),
        ({0: "bad", 1: "good"}, [0, 1], ["bad", "good"]),
        ({"0": "bad", "1": "good"}, ["0", "1"], ["bad", "good"]),
        ({True: "right", False: "wrong"}, [True, False], ["right", "wrong"]),
        (["true", "false"], [True, False], ["true", "false"]),
        ([" a ", "b"], ["a", " b"], ["a", "b"]),
        ({1: 10, 2: 20}, [1, 2], ["10", "20"]),
    ],
)
def test_numbers_and_truth_values_as_labels(task_folder, labels, raw, answers) -> None:
    rows = [{"text": f"t{number}", "label": value} for number, value in enumerate(raw * 2)]
    task = load_task(task_folder(rows, description=DESCRIPTION | {"labels": labels}))
    assert [example.answer for example in task.train] == answers * 2
    assert sorted(task.labels) == sorted(answers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inptu": "{text}"}, "unknown key 'inptu'; the nearest valid one is 'input'"),
        ({"hub": {"pth": "x", "path": "y"}}, "unknown key 'hub.pth'; the nearest valid one is 'path'"),
        ({"input": "text"}, "input = 'text': names no field, so that every input would be the same."),
        ({"input": "{text"}, "input = '{text': is no valid template (expected '}' before end of string)."),
        ({"input": "{}"}, "input = '{}': has a place that is not just the name of a field."),
        ({"input": "{text!r}"}, "input = '{text!r}': has a place that is not just the name of a field."),
        (
            {"input": '{"a": {text}}'},
            "has a place that is not just the name of a field. Write {input}, and braces of the text twice.",
        ),
        (
            {"labels": [True, False]},
            "holds the truth value True, which YAML reads from yes, no, on, off, true and false. Quote it.",
        ),
        ({"labels": {0: False, 1: "x"}}, "holds the truth value False, which YAML reads from yes, no,"),
        ({"labels": ["a", " "]}, "holds an empty label. Name every label."),
        ({"labels": ["a", "b", "a "]}, "label 'a' is listed twice. List each label once."),
        ({"metric": "acuracy"}, "metric = 'acuracy': Input should be 'accuracy', "),
        ({"max_answer_tokens": 0}, "max_answer_tokens = 0: Input should be greater than or equal to 1."),
    ],
)
def test_a_wrong_task_yaml_is_explained(task_folder, change, message) -> None:
    folder = task_folder(ROWS, description=DESCRIPTION | change)
    with pytest.raises(TaskError) as raised:
        load_task(folder)
    assert str(raised.value).startswith(f"{folder}/task.yaml: ")
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"input: [", "no valid YAML"),
        (b"input: '{x}'\nname: 2001-99-99", "no valid YAML: month must be in 1..12"),
        (b"- input", "holds a list; a task is a mapping of keys to values."),
        (b"", "holds a NoneType"),
        (b"answer: label", "input is missing. Add it."),
        (b"input: '{x}'\nanswer: \xff", ":2: byte 9 of the line, 0xff, is not UTF-8"),
    ],
)
def test_a_task_yaml_that_is_none(task_folder, content, message) -> None:
    folder = task_folder(ROWS)
    (folder / "task.yaml").write_bytes(content)
    with pytest.raises(TaskError) as raised:
        load_task(folder)
    assert str(raised.value).startswith(f"{folder}/task.yaml")
    assert message in str(raised.value)


def test_braces_in_values_are_kept_as_they_are() -> None:
    row = TableRow({"a": "{b} {{c}} {0}", "b": "x"}, "f:1")
    assert fill_template("{{{a}}} {b}", row) == "{{b} {{c}} {0}} x"


def test_a_template_reads_field_names_literally() -> None:
    row = TableRow({"a.b": "dotted", "c[0]": "indexed", "my field": "spaced"}, "f:1")
    assert fill_template("{a.b} {c[0]} {my field}", row) == "dotted indexed spaced"


@pytest.mark.parametrize(
    ("row", "input", "group"),
    [
        ({"premise": "P", "hypothesis": "H", "label": "x"}, "Premise: P\nHypothesis: H", "P"),
        ({"passage": "P", "question": "Q", "answer": "x"}, "Passage: P\nQuestion: Q", "P"),
        ({"question": "Q", "choices": ["x", "y"], "answer": "x"}, "Question: Q\nChoices: x; y", ""),
        ({"question": "Q", "answer": "x", "rationale": "R"}, "Q", ""),
        ({"input": "I", "output": "x"}, "I", ""),
        ({"dialogue": "D", "summary": "x"}, "D", ""),
        ({"document": "D", "summary": "x"}, "D", ""),
        ({"text": "T", "label": "x"}, "T", ""),
        ({"prompt": "T", "completion": "x"}, "T", ""),
    ],
)
def test_fields_are_inferred(task_folder, row, input, group) -> None:
    task = load_task(task_folder([row, row]))
    assert (task.train[0].input, task.train[0].answer, task.train[0].group) == (input, "x", group)
    assert task.name == "task"


def test_the_guess_is_logged(task_folder, caplog) -> None:
    folder = task_folder(ROWS)
    with caplog.at_level(logging.INFO):
        task = load_task(folder)
    assert task.labels == ("a", "b")
    assert caplog.messages == [
        f"{folder}: no task.yaml; read as family classification, input '{{text}}', answer 'label' (2 labels), metric accuracy"
    ]


def test_answers_that_do_not_recur_are_free_text(task_folder) -> None:
    rows = [{"question": f"q{number}", "answer": f"a{number}", "answers": [f"a{number}", "b"]} for number in range(3)]
    task = load_task(task_folder(rows))
    assert (task.labels, task.metric) == ((), "token_f1")
    assert task.train[1].accepted == ("b",)


def test_accepted_answers_may_be_one_text(task_folder) -> None:
    rows = [{"question": f"q{number}", "answer": f"a{number}", "answers": "Paris"} for number in range(3)]
    assert load_task(task_folder(rows)).train[0].accepted == ("Paris",)


def test_unknown_fields_ask_for_a_task_yaml(task_folder) -> None:
    folder = task_folder([{"foo": "x", "bar": "y"}] * 2)
    with pytest.raises(TaskError) as raised:
        load_task(folder)
    assert str(raised.value) == (
        f"{folder}/train.jsonl:1: cannot tell input and answer among the fields foo, bar. Write a task.yaml with `input` "
        "(a template) and `answer` (a field)."
    )


def test_numbers_as_inferred_labels(task_folder) -> None:
    rows = [{"text": f"t{number}", "label": number % 2} for number in range(4)]
    assert load_task(task_folder(rows)).labels == ("0", "1")


def test_a_manifest_gives_family_labels_and_metric(task_folder, tmp_path: Path) -> None:
    folder = task_folder([{"input": "x", "label": "a"}, {"input": "y", "label": "b"}], name="mine")
    entry = {"name": "mine", "family": "nli", "labels": ["a", "b", "c"], "metric": "macro-F1"}
    manifest = tmp_path / "MANIFEST.json"
    manifest.write_text(json.dumps([{"name": "other", "family": "qa"}, entry]))
    task = load_task(folder)
    assert (task.family, task.labels, task.metric) == ("nli", ("a", "b", "c"), "macro_f1")
    manifest.write_text(json.dumps([entry | {"family": "poetry"}]))
    with pytest.raises(TaskError, match=r"MANIFEST\.json: family = 'poetry'"):
        load_task(folder)
    manifest.write_text("{")
    with pytest.raises(TaskError, match=r"MANIFEST\.json: broken JSON"):
        load_task(folder)
    manifest.write_text('{"name": "somebody else\'s"}')
    assert load_task(folder).family == "classification"
