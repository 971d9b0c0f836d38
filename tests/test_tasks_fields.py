"""Nested fields, choices in several fields or named by keys, and which rows of a hub data set are read."""

import json
from pathlib import Path

import pytest

from manyicl.errors import TaskError
from manyicl.tasks.descriptions import TaskFile
from manyicl.tasks.readers import load_task, make_example, read_queries
from manyicl.tasks.tables import RowError, TableRow
from plain_fixtures import write_rows

NESTED = {
    "q": "x",
    "choices": {"text": ["up", "down"], "label": ["A", "B"]},
    "spans": [{"text": "s0"}, {"text": "s1"}],
    "key": "B",
}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("choices.text", "up; down"),
        ("choices.text.1", "down"),
        ("spans.text", "s0; s1"),
        ("spans.1.text", "s1"),
        ("q", "x"),
    ],
)
def test_a_dotted_name_reaches_into_a_field(name: str, text: str) -> None:
    example = make_example(TableRow(NESTED, "f:1"), TaskFile(input=f"<{{{name}}}>", answer=name))
    assert (example.input, example.answer) == (f"<{text}>", text)


def test_a_column_whose_name_has_a_dot_comes_first() -> None:
    example = make_example(TableRow({"a.b": "whole", "a": {"b": "part"}, "c": "y"}, "f:1"), TaskFile(input="{a.b}", answer="c"))
    assert example.input == "whole"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("choices.text.2", "field 'choices.text.2' has no value (there: q, choices, spans, key)."),
        ("choices.words", "field 'choices.words' has no value (there: q, choices, spans, key)."),
        ("q.text", "field 'q.text' has no value (there: q, choices, spans, key)."),
        ("chioces.text", "field 'chioces.text' is missing (there: q, choices, spans, key)."),
        ("spans.start", "field 'spans.start' holds nothing where a text is wanted."),
        ("choices", "field 'choices' holds dict where a text is wanted."),
    ],
)
def test_a_dotted_name_that_leads_nowhere_is_named(name: str, problem: str) -> None:
    with pytest.raises(RowError) as raised:
        make_example(TableRow(NESTED, "f:1"), TaskFile(input=f"{{{name}}}", answer="q"))
    assert str(raised.value).startswith(f"f:1: {problem}")


@pytest.mark.parametrize(
    ("fields", "description", "answer", "options"),
    [
        (NESTED, {"answer": "key", "options": "choices.text", "option_keys": "choices.label"}, "down", ("up", "down")),
        ({"q": "x", "a": 1, "s0": "up", "s1": "down"}, {"options": ["s0", "s1"], "option_keys": [0, 1]}, "down", ("up", "down")),
        ({"q": "x", "a": "up", "s0": "up", "s1": "down"}, {"options": ["s0", "s1"]}, "up", ("up", "down")),
        ({"q": "x", "a": "C", "o": ["up", "up", "down"]}, {"options": "o", "option_keys": list("ABCD")}, "down", ("up", "down")),
    ],
)
def test_choices_of_several_fields_and_answers_by_key(fields, description, answer, options) -> None:
    example = make_example(TableRow(fields, "f:1"), TaskFile.model_validate({"input": "{q}", "answer": "a"} | description))
    assert (example.answer, example.options) == (answer, options)


@pytest.mark.parametrize("answer", ["C", "D"])
def test_an_answer_that_is_the_key_of_no_choice_is_named(answer: str) -> None:
    description = TaskFile(input="{q}", answer="a", options="o", option_keys=["A", "B", "C"])
    options = ["up", "down"] if answer == "C" else ["up", "down", "left"]
    with pytest.raises(RowError) as raised:
        make_example(TableRow({"q": "x", "a": answer, "o": options}, "f:1"), description)
    keys = ", ".join("ABC"[: len(options)])
    assert str(raised.value) == (
        f"f:1: answer {answer!r} is the key of none of its {len(options)} options (keys: {keys}). Correct the row."
    )


def test_keys_without_choices_are_refused(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text('{input: "{q}", answer: a, option_keys: [A]}')
    with pytest.raises(TaskError, match=r"option_keys = \['A'\]: stands for choices, and there are none\. Name their field"):
        load_task(tmp_path)


def test_queries_have_the_choices_of_several_fields(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text('{input: "{q}", answer: a, options: [s0, s1], option_keys: ["0", "1"]}')
    path = write_rows(tmp_path / "q.jsonl", [{"q": "one", "s0": "x", "s1": "y"}])
    (query,) = read_queries(path, folder=tmp_path)
    assert query.options == ("x", "y")


# Which rows of a hub data set are read.


def hub_rows(monkeypatch, rows: list[dict]) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name=None, **options: datasets.Dataset.from_list(rows))


def hub_folder(tmp_path: Path, **source: object) -> Path:
    folder = tmp_path / "task"
    folder.mkdir(parents=True)
    description = {"input": "{sentence}", "answer": "label", "labels": {"0": "bad", "1": "good"}, "hub": source}
    (folder / "task.yaml").write_text(json.dumps(description))
    return folder


def test_hub_rows_are_shuffled_and_capped_the_same_each_time(tmp_path: Path, monkeypatch) -> None:
    hub_rows(monkeypatch, [{"sentence": f"row {number}", "label": number % 2} for number in range(40)])
    seeds = {"a": 3, "b": 3, "c": 4}
    tasks = [load_task(hub_folder(tmp_path / name, path="o/s", shuffle_seed=seed, max_rows=30)) for name, seed in seeds.items()]
    orders = [[example.input for example in task.train] for task in tasks]
    assert orders[0] == orders[1] != orders[2]
    assert len(set(orders[0])) == 30
    assert orders[0] != sorted(orders[0], key=lambda text: int(text.split()[1]))
    assert [example.input for example in tasks[0].test] != orders[0]
    assert all(example.source == f"o/s/train:{int(example.input.split()[1]) + 1}" for example in tasks[0].train)


def test_a_cap_without_a_seed_takes_the_first_rows(tmp_path: Path, monkeypatch) -> None:
    hub_rows(monkeypatch, [{"sentence": f"row {number}", "label": number % 2} for number in range(5)])
    task = load_task(hub_folder(tmp_path, path="o/s", max_rows=2))
    assert [example.input for example in task.train] == ["row 0", "row 1"]
    task = load_task(hub_folder(tmp_path / "all", path="o/s", max_rows=9))
    assert len(task.train) == 5


def test_hub_rows_with_a_skipped_value_are_left_out_and_counted(tmp_path: Path, monkeypatch, caplog) -> None:
    labels = [0, 1, -1, 1]
    rows = [
        {"sentence": f"row {number}", "label": label, "note": {"by": [None, "x"][number < 3]}}
        for number, label in enumerate(labels)
    ]
    hub_rows(monkeypatch, rows)
    folder = hub_folder(tmp_path, path="o/s", skip={"label": ["-1"], "note.by": [""]})
    with caplog.at_level("INFO"):
        task = load_task(folder)
    assert [(example.input, example.source) for example in task.train] == [("row 0", "o/s/train:1"), ("row 1", "o/s/train:2")]
    assert "o/s/train: 2 of 4 rows left out by hub.skip" in caplog.messages
    with pytest.raises(RowError, match=r"o/s/train:1: field 'lable' is missing"):
        load_task(hub_folder(tmp_path / "typo", path="o/s", skip={"lable": ["-1"]}))


def test_a_hub_data_set_that_needs_a_loading_script_is_named(tmp_path: Path, monkeypatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(path, name=None, **options):
        raise RuntimeError("Dataset scripts are no longer supported, but found s.py")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(TaskError, match=r"task\.yaml: o/s split 'train' cannot be loaded: Dataset scripts are no longer"):
        load_task(hub_folder(tmp_path, path="o/s"))
