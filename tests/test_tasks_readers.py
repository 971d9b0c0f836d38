import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyicl.errors import TaskError
from manyicl.tasks.descriptions import TaskFile
from manyicl.tasks.readers import (
    load_suite,
    load_task,
    make_example,
    read_examples,
    read_queries,
    task_of_examples,
)
from manyicl.tasks.tables import RowError, TableRow
from manyicl.tasks.task import Example
from plain_fixtures import write_rows

ROWS = [{"text": f"t{number}", "label": ("a", "b")[number % 2]} for number in range(4)]
DESCRIPTION = {"input": "{text}", "answer": "label", "labels": ["a", "b"]}


def test_a_task_with_every_key(task_folder) -> None:
    rows = [
        {"premise": "P0", "title": "T", "label": 0, "answers": ["no", "nope"]},
        {"premise": "P1", "title": "T", "label": 1, "answers": ["yes"]},
    ]
    description = {
        "name": "entails",
        "family": "nli",
        "metric": "macro_f1",
        "instruction": "Does it follow?",
        "input": "{{{title}}}: {premise}",
        "answer": "label",
        "labels": {0: "no", 1: "yes"},
        "accepted": "answers",
        "group": "title",
        "max_answer_tokens": 5,
    }
    folder = task_folder(rows, rows[1:], description=description)
    task = load_task(folder)
    assert task.train == (
        Example("{T}: P0", "no", ("nope",), (), "T", f"{folder}/train.jsonl:1"),
        Example("{T}: P1", "yes", (), (), "T", f"{folder}/train.jsonl:2"),
    )
    assert task.test == (Example("{T}: P1", "yes", (), (), "T", f"{folder}/test.jsonl:1"),)
    assert (task.name, task.family, task.metric, task.labels) == ("entails", "nli", "macro_f1", ("no", "yes"))
    assert (task.instruction, task.max_answer_tokens) == ("Does it follow?", 5)
    assert load_task(folder, name="given").name == "given"


def test_csv_and_parquet_and_jsonl_give_the_same_task(tmp_path: Path) -> None:
    import pyarrow.parquet

    answers = {}
    for kind in ("jsonl", "csv", "parquet"):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "task.yaml").write_text("{input: 'Text: {text}', answer: label, labels: [a, b]}")
        if kind == "jsonl":
            write_rows(folder / "train.jsonl", ROWS)
        elif kind == "csv":
            (folder / "train.csv").write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in ROWS))
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "train.parquet")
        answers[kind] = [(example.input, example.answer) for example in load_task(folder).train]
    assert answers["jsonl"] == [("Text: t0", "a"), ("Text: t1", "b"), ("Text: t2", "a"), ("Text: t3", "b")]
    assert answers["csv"] == answers["parquet"] == answers["jsonl"]


@pytest.mark.parametrize(
    ("row", "kind", "problem"),
    [
        ({"label": "a"}, "missing field", "field 'text' is missing (there: label). Correct the row or the task.yaml."),
        ({"text": "x", "label": None}, "missing field", "field 'label' has no value (there: text, label)."),
        ({"text": "x", "label": "  "}, "empty answer", "the answer field 'label' is empty. Fill it in or remove the row."),
        ({"text": "x", "label": "c"}, "unknown label", "label 'c' is not among the 2 labels (a, b). Correct it or list it."),
    ],
)
def test_a_wrong_row_is_named(task_folder, row, kind, problem) -> None:
    folder = task_folder([*ROWS, row], description=DESCRIPTION)
    with pytest.raises(RowError) as raised:
        load_task(folder)
    assert str(raised.value).startswith(f"{folder}/train.jsonl:5: {problem}")
    assert raised.value.kind == kind


def test_a_raw_label_without_a_word_is_named(task_folder) -> None:
    folder = task_folder([*ROWS, {"text": "x", "label": "c"}], description=DESCRIPTION | {"labels": {"a": "A", "b": "B"}})
    with pytest.raises(RowError, match=r"train\.jsonl:5: raw label 'c' is not mapped to a word \(mapped: a, b\)"):
        load_task(folder)


def test_a_test_label_never_seen_in_train_is_named(task_folder) -> None:
    rows = [{"text": f"t{number}", "label": "a"} for number in range(3)]
    folder = task_folder(rows, [*ROWS[:1], *ROWS[:2]], description=DESCRIPTION)
    with pytest.raises(TaskError) as raised:
        load_task(folder)
    assert str(raised.value) == (
        f"{folder}/test.jsonl:3: test label 'b' never occurs in train. Add an example of it, or drop the row."
    )


def test_problems_are_collected_and_the_other_rows_kept(task_folder) -> None:
    train = [*ROWS, '{"text": ', {"text": "x", "label": "c"}, {"text": "y", "label": ""}, {"label": "a"}]
    folder = task_folder(train, [*ROWS[:1], {"text": "z", "label": 7}], description=DESCRIPTION | {"labels": ["a", "b", "7"]})
    problems: list[RowError] = []
    task = load_task(folder, problems=problems)
    assert (len(task.train), len(task.test)) == (4, 2)
    assert [(error.source.removeprefix(f"{folder}/"), error.kind) for error in problems] == [
        ("train.jsonl:5", "broken JSON"),
        ("test.jsonl:2", "mixed types"),
        ("train.jsonl:6", "unknown label"),
        ("train.jsonl:7", "empty answer"),
        ("train.jsonl:8", "missing field"),
        ("test.jsonl:2", "unseen label"),
    ]


@pytest.mark.parametrize(
    ("count", "message"), [(0, "train.jsonl: holds no rows"), (1, ": 1 train example(s); a task needs at least 2")]
)
def test_an_empty_or_one_example_task_is_refused(task_folder, count, message) -> None:
    folder = task_folder(ROWS[:count], description=DESCRIPTION)
    with pytest.raises(TaskError) as raised:
        load_task(folder)
    assert message in str(raised.value)
    assert str(folder) in str(raised.value)


def test_missing_folders_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"nowhere: no such folder\. Give a task's folder"):
        load_task(tmp_path / "nowhere")
    with pytest.raises(TaskError, match=r"has no train\.jsonl, train\.csv or train\.parquet"):
        load_task(tmp_path)


# MetaICL's rows and chats.


def test_metaicl_rows_with_shared_options_have_a_label_set(tmp_path: Path) -> None:
    rows = [{"task": "t", "input": f"i{n}", "output": ("good", "bad")[n % 2], "options": ["bad", "good"]} for n in range(4)]
    path = write_rows(tmp_path / "t_16_100_train.jsonl", rows)
    task = load_task(path)
    assert (task.name, task.labels, task.metric) == ("t_16_100_train", ("bad", "good"), "accuracy")
    assert task.train[1] == Example("i1", "bad", source=f"{path}:2")


def test_metaicl_rows_with_their_own_options(tmp_path: Path) -> None:
    rows = [{"task": "t", "input": f"i{n}", "output": f"o{n}", "options": [f"o{n}", "other"]} for n in range(3)]
    task = load_task(write_rows(tmp_path / "t.jsonl", rows))
    assert (task.labels, task.is_choice, task.metric) == ((), True, "accuracy")
    assert task.train[2].options == ("o2", "other")


def test_metaicl_rows_without_options_are_free_text(tmp_path: Path) -> None:
    rows = [{"task": "t", "input": f"i{n}", "output": f"o{n}", "options": []} for n in range(3)]
    task = load_task(write_rows(tmp_path / "t.jsonl", rows))
    assert (task.labels, task.is_choice, task.metric) == ((), False, "token_f1")


def test_metaicl_files_in_a_task_folder(task_folder) -> None:
    rows = [{"task": "t", "input": f"i{n}", "output": ("good", "bad")[n % 2], "options": ["bad", "good"]} for n in range(4)]
    task = load_task(task_folder(rows, rows[:1]))
    assert (task.labels, len(task.train), len(task.test)) == (("bad", "good"), 4, 1)
    assert {example.options for example in task.train + task.test} == {()}


def test_an_answer_that_is_no_option_is_named(tmp_path: Path) -> None:
    rows = [{"input": "i", "output": "x", "options": ["x", "y"]}, {"input": "j", "output": "z", "options": ["x", "w"]}]
    path = write_rows(tmp_path / "t.jsonl", rows)
    with pytest.raises(RowError) as raised:
        read_examples(path)
    assert str(raised.value) == f"{path}:2: answer 'z' is not among its options ['x', 'w']. Correct the row."


def test_options_as_one_text_are_not_taken_letter_by_letter() -> None:
    description = TaskFile(input="{q}", answer="a", options="o")
    with pytest.raises(RowError, match=r"answer 'b' is not among its options \['abc'\]"):
        make_example(TableRow({"q": "x", "a": "b", "o": "abc"}, "f:1"), description)


def chat(*messages: tuple) -> dict:
    return {"messages": [dict(zip(("role", "content", "loss"), message, strict=False)) for message in messages]}


def test_chat_rows_give_an_example_per_trained_answer(tmp_path: Path) -> None:
    rows = [
        chat(("system", "Be brief."), ("user", "one"), ("assistant", "1"), ("user", "two"), ("assistant", " 2 ", True)),
        chat(("user", "x"), ("assistant", "draft", 0), ("user", "again"), ("assistant", "y", 1)),
    ]
    path = write_rows(tmp_path / "chats.jsonl", rows)
    assert read_examples(path) == (
        Example("Be brief.\none", "1", source=f"{path}:1"),
        Example("two", "2", source=f"{path}:1"),
        Example("x\ndraft\nagain", "y", source=f"{path}:2"),
    )


def test_chat_files_in_a_task_folder(task_folder) -> None:
    rows = [chat(("user", f"u{number}"), ("assistant", ("yes", "no")[number % 2])) for number in range(4)]
    task = load_task(task_folder(rows, rows[:2]))
    assert (task.labels, len(task.train), len(task.test)) == (("no", "yes"), 4, 2)
    with pytest.raises(TaskError, match=r"test\.jsonl:1: test label 'maybe' never occurs in train"):
        load_task(task_folder(rows, [chat(("user", "u"), ("assistant", "maybe"))]))


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": "hi"}, "`messages` holds a str, not a list. Give a list of messages."),
        ({"messages": [{"role": "user"}]}, "message 0 needs a `role` and a text `content`."),
        ({"messages": ["hi"]}, "message 0 needs a `role` and a text `content`."),
        (chat(("user", "u"), ("assistant", ["a"])), "message 1 needs a `role` and a text `content`."),
        (chat(("user", "u"), ("assistant", "a", "no")), "message 1 has loss 'no'. Write 0 or 1."),
        (chat(("user", "u"), ("assistant", "a", None)), "message 1 has loss None. Write 0 or 1."),
        (chat(("assistant", "a")), "message 0 is an answer without text or without an input before it."),
        (chat(("user", "u"), ("assistant", " ")), "message 1 is an answer without text or without an input before it."),
    ],
)
def test_broken_chats_are_named(tmp_path: Path, row, problem) -> None:
    path = write_rows(tmp_path / "chats.jsonl", [chat(("user", "u"), ("assistant", "a")), row])
    with pytest.raises(RowError) as raised:
        read_examples(path)
    assert str(raised.value).startswith(f"{path}:2: {problem}")


def test_a_chat_file_without_answers_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "chats.jsonl", [chat(("user", "u"), ("assistant", "a", 0))])
    with pytest.raises(TaskError, match=r"chats\.jsonl: 1 row\(s\) hold no answer to learn from"):
        read_examples(path)


def test_queries_are_rendered_as_the_demonstrations_are(tmp_path: Path) -> None:
    rows = [{"premise": "P", "hypothesis": "H", "label": "x"}]
    demonstrations = read_examples(write_rows(tmp_path / "a.jsonl", rows))
    asked = read_queries(write_rows(tmp_path / "b.jsonl", [{"premise": "P", "hypothesis": "H"}]))
    assert [query.input for query in asked] == [demonstrations[0].input]
    chats = [
        chat(("user", "one"), ("assistant", "1"), ("user", "two")),
        chat(("user", "a"), ("assistant", "b", 0), ("user", "c")),
    ]
    assert [query.input for query in read_queries(write_rows(tmp_path / "c.jsonl", chats))] == ["two", "a\nb\nc"]
    with pytest.raises(RowError, match=r"d\.jsonl:1: ends with an answer"):
        read_queries(write_rows(tmp_path / "d.jsonl", [chat(("user", "one"), ("assistant", "1"))]))
    with pytest.raises(TaskError, match=r"e\.jsonl:1: no input field among foo\. Name the column `input`"):
        read_queries(write_rows(tmp_path / "e.jsonl", [{"foo": "x"}]))
    with pytest.raises(RowError, match=r"f\.jsonl:2: field 'input' is missing"):
        read_queries(write_rows(tmp_path / "f.jsonl", [{"input": "x"}, {"text": "y"}]))


def test_queries_of_a_task_folder_are_read_by_its_task_yaml(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text('input: "Q: {q}"\nanswer: a\noptions: choices\n')
    path = write_rows(tmp_path / "q.jsonl", [{"q": "one", "choices": ["x", "y"]}])
    (query,) = read_queries(path, folder=tmp_path)
    assert (query.input, query.options, query.source) == ("Q: one", ("x", "y"), f"{path}:1")
    with pytest.raises(RowError, match=r"q\.jsonl:1: field 'choices' is missing"):
        read_queries(write_rows(tmp_path / "q.jsonl", [{"q": "one"}]), folder=tmp_path)


def test_task_of_examples_takes_recurring_answers_as_labels() -> None:
    recurring = [Example(f"i{n}", ("b", "a")[n % 2]) for n in range(4)]
    assert task_of_examples(recurring, name="t").labels == ("a", "b")
    free = task_of_examples([Example("i", "x"), Example("j", "y")], name="t")
    assert (free.labels, free.metric) == ((), "token_f1")
    with pytest.raises(TaskError, match=r"t: 1 train example\(s\); a task needs at least 2"):
        task_of_examples(recurring[:1], name="t")


# The hub.


@pytest.fixture
def hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked: list[tuple] = []

    def load_dataset(path, name=None, *, revision=None, split=None):
        asked.append((path, name, revision, split))
        if split == "dev":
            raise ValueError('Unknown split "dev". Should be one of ["train", "test"].')
        return datasets.Dataset.from_list([{"sentence": f"{split} {number}", "label": number % 2} for number in range(3)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def hub_folder(tmp_path: Path, **source: str) -> Path:
    folder = tmp_path / "glue"
    folder.mkdir()
    description = {"input": "{sentence}", "answer": "label", "labels": {"0": "bad", "1": "good"}, "hub": source}
    (folder / "task.yaml").write_text(json.dumps(description))
    return folder


def test_a_hub_reference_is_read_at_its_revision(tmp_path: Path, hub) -> None:
    folder = hub_folder(tmp_path, path="org/glue", name="sst2", revision="abc123", test_split="validation")
    task = load_task(folder)
    assert hub == [("org/glue", "sst2", "abc123", "train"), ("org/glue", "sst2", "abc123", "validation")]
    assert task.train[1] == Example("train 1", "good", source="org/glue/train:2")
    assert [example.input for example in task.test] == ["validation 0", "validation 1", "validation 2"]
    assert load_suite(folder).held_out == ("glue",)


def test_a_hub_split_that_cannot_be_loaded_is_named(tmp_path: Path, hub) -> None:
    folder = hub_folder(tmp_path, path="org/glue", test_split="dev")
    with pytest.raises(TaskError, match=r"task\.yaml: org/glue split 'dev' cannot be loaded: Unknown split"):
        load_task(folder)


# Suites.


def test_a_suite_with_roles(suite_folder) -> None:
    suite = load_suite(suite_folder())
    assert (suite.name, list(suite.tasks)) == ("suite", ["colour", "size", "mood", "speed"])
    assert (suite.meta_training, suite.validation, suite.held_out) == (("colour", "size"), ("mood",), ("speed",))


def test_split_json_names_the_roles(suite_folder) -> None:
    folder = suite_folder()
    (folder / "suite.yaml").unlink()
    roles = {"meta_training": ["size"], "validation_tasks": ["mood"], "held_out": ["speed"], "notes": ["x"]}
    (folder / "SPLIT.json").write_text(json.dumps(roles, indent="\t"))
    suite = load_suite(folder)
    assert (suite.meta_training, suite.validation, suite.held_out) == (("size",), ("mood",), ("speed",))


def test_without_roles_every_task_is_read_and_has_none(suite_folder) -> None:
    folder = suite_folder()
    (folder / "suite.yaml").unlink()
    suite = load_suite(folder)
    assert list(suite.tasks) == ["colour", "mood", "size", "speed"]
    assert suite.role("size") == "none"


def test_a_single_task_is_a_suite_that_holds_it_out(task_folder, tmp_path: Path) -> None:
    suite = load_suite(task_folder(ROWS, ROWS[:1], description=DESCRIPTION | {"name": "mine"}))
    assert (list(suite.tasks), suite.held_out) == (["mine"], ("mine",))
    file = write_rows(tmp_path / "one.jsonl", ROWS)
    assert load_suite(file).held_out == ("one",)


def test_the_name_in_a_task_yaml_keeps_its_role(suite_folder) -> None:
    folder = suite_folder()
    description = (folder / "speed" / "task.yaml").read_text()
    (folder / "speed" / "task.yaml").write_text(description + "name: velocity\n")
    suite = load_suite(folder)
    assert suite.held_out == ("velocity",)
    assert [suite.role(task.name) for task in suite.tasks.values()] == [
        "meta_training",
        "meta_training",
        "validation",
        "held_out",
    ]
    (folder / "speed" / "task.yaml").write_text(description + "name: mood\n")
    with pytest.raises(TaskError, match=r"speed: another task of the suite is named 'mood' too"):
        load_suite(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("suite.yaml", "meta_training: [colour]\nheld_out: [colour]", "'colour' is both meta_training and held_out"),
        ("suite.yaml", "held-out: [speed]", "suite.yaml: unknown key 'held-out'; the nearest valid one is 'held_out'"),
        ("suite.yaml", "held_out: speed", "suite.yaml: held_out holds 'speed'; it lists names of tasks' folders."),
        ("suite.yaml", "held_out: [1]", "suite.yaml: held_out holds [1]; it lists names of tasks' folders."),
        ("suite.yaml", "- speed", "suite.yaml: holds a list; it maps roles to lists of tasks."),
        ("suite.yaml", "", "suite.yaml: holds a NoneType; it maps roles to lists of tasks."),
        ("suite.yaml", "held_out: [", "suite.yaml: cannot be read: "),
        ("suite.yaml", "held_out: [2001-99-99]", "suite.yaml: cannot be read: month must be in 1..12"),
        ("suite.yaml", "held_out: [sped]", "sped: no such folder."),
        ("SPLIT.json", "{", "SPLIT.json: cannot be read: "),
        ("SPLIT.json", "[]", "SPLIT.json: holds a list; it maps roles to lists of tasks."),
    ],
)
def test_wrong_roles_are_explained(suite_folder, name, content, message) -> None:
    folder = suite_folder()
    (folder / "suite.yaml").unlink()
    (folder / name).write_text(content)
    with pytest.raises(TaskError) as raised:
        load_suite(folder)
    assert message in str(raised.value)


def test_folders_without_tasks_are_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"nowhere: no such folder\. Give `builtin` or the folder of a suite"):
        load_suite(tmp_path / "nowhere")
    with pytest.raises(TaskError, match=r"holds no task\. Each task is a sub-folder with train\.jsonl"):
        load_suite(tmp_path)


def test_a_suite_is_named_after_its_folder_from_inside_too(suite_folder, monkeypatch) -> None:
    folder = suite_folder()
    monkeypatch.chdir(folder)
    assert load_suite(".").name == "suite"
    monkeypatch.chdir(folder / "mood")
    assert load_task(".").name == "mood"


# Whatever stands in a file, reading it ends in a task or in an error that is meant.

KEYS = st.sampled_from(["input", "label", "answer", "question", "choices", "options", "messages", "answers", "premise", "loss"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.just("role") | st.just("content"), inner, max_size=3),
    max_leaves=5,
)


def ends_as_meant(read: Callable[[], object], where: str) -> None:
    try:
        read()
    except TaskError as error:
        assert where in str(error)  # noqa: PT017


@settings(max_examples=150)
@given(rows=st.lists(st.dictionaries(KEYS, VALUES, max_size=5), min_size=1, max_size=4))
def test_any_rows_end_as_meant(tmp_path_factory, rows) -> None:
    folder = tmp_path_factory.mktemp("any") / "task"
    path = write_rows(folder / "train.jsonl", [json.dumps(row) for row in rows])
    ends_as_meant(lambda: load_task(folder), str(folder))
    ends_as_meant(lambda: load_task(folder, problems=[]), str(folder))
    ends_as_meant(lambda: read_examples(path), str(folder))
    ends_as_meant(lambda: read_queries(path), str(folder))


@settings(max_examples=150)
@given(
    content=st.binary(max_size=30) | st.text(max_size=30).map(str.encode),
    name=st.sampled_from(["train.jsonl", "train.csv", "task.yaml"]),
)
def test_any_bytes_end_as_meant(tmp_path_factory, content, name) -> None:
    folder = tmp_path_factory.mktemp("any") / "task"
    folder.mkdir()
    if name == "task.yaml":
        write_rows(folder / "train.jsonl", ROWS)
    (folder / name).write_bytes(content)
    ends_as_meant(lambda: load_task(folder), str(folder))
    ends_as_meant(lambda: load_task(folder, problems=[]), str(folder))
    (folder.parent / "suite.yaml").write_bytes(content)
    ends_as_meant(lambda: load_suite(folder.parent), str(folder.parent))


def test_macro_f1_without_labels_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text('{input: "{text}", answer: label, metric: macro_f1}')
    rows = [{"text": f"text {number}", "label": f"free answer {number}"} for number in range(4)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(TaskError, match=r"metric macro_f1 is a mean over labels, and there are none\. List `labels`"):
        load_task(tmp_path)


def test_a_folder_of_too_few_chat_answers_is_named(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    with pytest.raises(TaskError, match=rf"^{tmp_path}: 1 train example\(s\); a task needs at least 2"):
        load_task(tmp_path)
