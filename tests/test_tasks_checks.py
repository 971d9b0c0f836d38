from dataclasses import replace
from pathlib import Path

import pytest

from manyicl.errors import TaskError
from manyicl.tasks.checks import Finding, check_folder, check_suite, check_task
from manyicl.tasks.task import Example, TaskSuite

LABELS = ("yes", "no")
SENTENCE = "the quick brown fox jumps over the lazy dog near the river bank"


def found(findings: list[Finding]) -> list[tuple[str, str, str]]:
    return [(finding.severity, finding.kind, finding.source) for finding in findings]


def test_a_clean_task_has_no_findings(small_task) -> None:
    assert check_task(small_task()) == []
    assert check_task(small_task(())) == []


def test_empty_answers_inputs_and_unknown_labels(small_task) -> None:
    task = small_task(LABELS)
    train = (
        *task.train,
        Example("a", " ", source="f:1"),
        Example("b", "perhaps", source="f:2"),
        Example("  ", "yes", source="f:3"),
    )
    findings = check_task(replace(task, train=train))
    assert found(findings) == [
        ("error", "empty answer", "f:1"),
        ("error", "unknown label", "f:2"),
        ("error", "empty input", "f:3"),
    ]
    assert findings[1].message == "'perhaps' is not among 2 labels"


def test_an_answer_that_is_not_among_its_own_options(small_task) -> None:
    train = [Example("a", "x", options=("x", "y"), source="f:1"), Example("b", "z", options=("x", "y"), source="f:2")]
    assert found(check_task(small_task((), train=train, test=()))) == [("error", "unknown label", "f:2")]


def test_duplicates_and_conflicting_ones(small_task) -> None:
    train = [
        Example("Is it so?", "yes", source="f:1"),
        Example("is  it so", "yes", source="f:2"),
        Example("IS IT SO!", "no", source="f:3"),
        Example("is it not so?", "no", source="f:4"),
    ]
    findings = check_task(small_task(LABELS, train=train, test=()))
    assert found(findings) == [("warning", "duplicate", "f:2"), ("warning", "conflicting duplicate", "f:3")]
    assert findings[1].message == "the input stands at f:1 too, with the answer 'yes' instead of 'no'"


def test_signs_make_inputs_differ(small_task) -> None:
    inputs = ["3 + 4", "3 - 4", "3 * 4", "-3", "3", "@ #", "% &", "(a b)", "a b"]
    train = [Example(text, ("yes", "no")[place % 2], source=f"f:{place}") for place, text in enumerate(inputs)]
    assert check_task(small_task(LABELS, train=train, test=[Example("3 / 4", "yes", source="g:1")])) == []


def test_test_inputs_and_passages_that_stand_in_train(small_task) -> None:
    train = [
        Example("P one. Q a", "yes", group="P one.", source="train:1"),
        Example("P two. Q b", "no", group="P two.", source="train:2"),
        Example("P two. Q c", "no", group="P two.", source="train:3"),
    ]
    test = [
        Example("p one.  q A", "yes", group="P one.", source="test:1"),
        Example("P two. Q d", "no", group="P two.", source="test:2"),
        Example("P three. Q e", "no", group="P three.", source="test:3"),
    ]
    findings = check_task(small_task(LABELS, train=train, test=test))
    assert found(findings) == [("error", "test in train", "test:1"), ("warning", "shared passage", "test:2")]
    assert findings[0].message == "the input stands in train at train:1"
    assert findings[1].message == "its premise or passage stands in train at train:2"


def test_passages_are_known_by_their_field_names(task_folder) -> None:
    rows = [{"context": f"passage {number // 2}", "q": f"q{number}", "label": LABELS[number % 2]} for number in range(8)]
    description = {"input": "{context} {q}", "answer": "label", "labels": list(LABELS)}
    findings = check_folder(task_folder(rows[:5], rows[5:], description=description))
    assert [(finding.kind, finding.source.rpartition("/")[2]) for finding in findings] == [("shared passage", "test.jsonl:1")]


def test_inputs_that_name_their_own_label(small_task) -> None:
    labels = ("sport", "arts", "sport and arts")
    train = [
        Example(f"[{labels[place % 3].upper()}] story {place}", labels[place % 3], source=f"f:{place + 1}") for place in range(30)
    ]
    findings = check_task(small_task(labels, train=train, test=()))
    assert found(findings) == [("warning", "label in input", "f:1")]
    assert findings[0].message == "30 of 30 inputs name their own label and no other; by chance it would be 10"


def test_words_that_happen_to_be_labels_are_no_leak(small_task) -> None:
    # "a" is an article in nearly every input, and the answer is A half of the time, whatever the input says.
    train = [Example(f"this is a story of {place}", ("A", "B")[place // 2 % 2], source=f"f:{place}") for place in range(200)]
    assert check_task(small_task(("A", "B"), train=train, test=())) == []
    named = [replace(example, input=f"{example.input}: {'B' if place % 7 else 'A'}") for place, example in enumerate(train)]
    assert check_task(small_task(("A", "B"), train=named, test=())) == []


def test_answers_without_the_number_that_is_judged(small_task) -> None:
    train = [Example(f"q{number}", str(number), source=f"f:{number}") for number in range(30)]
    train.append(Example("q", "none", source="f:30"))
    findings = check_task(small_task((), train=train, test=(), metric="numeric_match"))
    assert found(findings) == [("error", "no number", "f:30")]
    assert found(check_task(small_task((), train=train, test=()))) == [("warning", "mixed types", "f:30")]


def overlapping(small_task, count: int) -> dict:
    """Two tasks that share a run of eight words in `count` examples."""
    left = [Example(f"{SENTENCE} {word}", "yes", source=f"left:{place}") for place, word in enumerate("pqrst")]
    shared = [
        Example(f"{number} {word} {SENTENCE}", "no", source=f"right:{number}") for number, word in enumerate("pqrst"[:count])
    ]
    right = [*shared, *(Example(f"something else {number}", "yes", source=f"right:{number + 5}") for number in range(5))]
    return {
        "left": small_task(LABELS, name="left", train=left, test=()),
        "right": small_task(LABELS, name="right", train=right, test=()),
    }


def test_texts_shared_by_tasks_of_different_roles(small_task) -> None:
    tasks = overlapping(small_task, 3)
    tasks["left"] = replace(tasks["left"], train=tasks["left"].train[:1])
    findings = check_suite(TaskSuite("s", tasks, meta_training=("left",), held_out=("right",)))
    assert findings == [
        Finding(
            "warning",
            "shared between roles",
            "left",
            "3 examples share text with right (meta_training and held_out), first with right:0",
            "left:0",
        )
    ]


def test_texts_shared_within_a_role_or_by_too_few_examples_are_fine(small_task) -> None:
    tasks = overlapping(small_task, 3)
    assert check_suite(TaskSuite("s", tasks, meta_training=("left", "right"))) == []
    few = overlapping(small_task, 2)
    few["left"] = replace(few["left"], train=few["left"].train[:1])
    assert check_suite(TaskSuite("s", few, meta_training=("left",), held_out=("right",))) == []


def test_three_tasks_that_share_a_text_give_a_finding_for_each_pair_across_roles(small_task) -> None:
    texts = [f"{number} {SENTENCE}" for number in "abc"]
    tasks = {
        name: small_task(LABELS, name=name, train=[Example(f"{text} {name}", "yes", source=name) for text in texts], test=())
        for name in ("one", "two", "three")
    }
    findings = check_suite(TaskSuite("s", tasks, meta_training=("one", "two"), held_out=("three",)))
    assert [(finding.task, finding.kind) for finding in findings] == [
        ("one", "shared between roles"),
        ("two", "shared between roles"),
    ]
    assert all("with three (meta_training and held_out)" in finding.message for finding in findings)


def test_near_duplicates_between_two_suites(small_task) -> None:
    tasks = overlapping(small_task, 4)
    first = TaskSuite("mine", {"left": replace(tasks["left"], train=tasks["left"].train[:1])}, held_out=("left",))
    second = TaskSuite("theirs", {"right": tasks["right"]}, held_out=("right",))
    assert check_suite(first) == []
    findings = check_suite(first, against=second)
    assert [(finding.kind, finding.task, finding.source, finding.message) for finding in findings] == [
        (
            "shared between suites",
            "left",
            "left:0",
            "4 examples share text with right (suite mine and suite theirs), first with right:0",
        )
    ]


def test_a_suite_against_itself_finds_every_task(suite_folder) -> None:
    folder = suite_folder(num_train=24)
    rows = [f'{{"input": "{SENTENCE} {number}", "label": "{("slow", "fast")[number % 2]}"}}\n' for number in range(6)]
    (folder / "speed" / "train.jsonl").write_text("".join(rows))
    (folder / "speed" / "test.jsonl").unlink()
    kinds = [(finding.kind, finding.task) for finding in check_folder(folder, against=folder)]
    assert sorted(name for kind, name in kinds if kind == "copied task") == ["colour", "mood", "size", "speed"]
    assert [name for kind, name in kinds if kind != "copied task"] == ["speed"]
    assert check_folder(folder) == []


def test_a_copied_task_of_short_texts_in_another_role_is_an_error(small_task) -> None:
    rows = [Example(f"no {number}", LABELS[number % 2], source=f"a:{number}") for number in range(6)]
    tasks = {
        "first": small_task(LABELS, name="first", train=rows, test=()),
        "copy": small_task(LABELS, name="copy", train=[*rows[:3], Example("else", "yes"), Example("more", "no")], test=()),
    }
    findings = check_suite(TaskSuite("s", tasks, meta_training=("first",), held_out=("copy",)))
    assert [(finding.severity, finding.kind, finding.source) for finding in findings] == [("error", "copied task", "a:0")]
    assert findings[0].message.startswith("3 of 5 inputs stand in copy too (meta_training and held_out)")
    assert check_suite(TaskSuite("s", tasks, held_out=("first", "copy"))) == []
    tasks["copy"] = small_task(LABELS, name="copy", train=[*rows[:2], *(Example(text, "no") for text in "abc")], test=())
    assert check_suite(TaskSuite("s", tasks, meta_training=("first",), held_out=("copy",))) == []


def test_classification_without_labels_is_a_warning(small_task) -> None:
    free = small_task((), family="classification", train=[Example("one", "slow"), Example("two", "fast")], test=())
    assert [(finding.severity, finding.kind) for finding in check_task(free)] == [("warning", "no labels")]
    assert check_task(replace(free, family="qa")) == []


def test_short_texts_without_spaces_are_compared_whole(small_task) -> None:
    texts = [f"{number}这是一个没有空格的比较长的中文句子用来测试重复检测" for number in "一二三"]
    tasks = {
        name: small_task(LABELS, name=name, train=[Example(text, "yes", source=name) for text in texts], test=())
        for name in ("one", "two")
    }
    findings = check_suite(TaskSuite("s", tasks, meta_training=("one",), held_out=("two",)))
    assert [finding.message for finding in findings if finding.kind != "copied task"] == [
        "3 examples share text with two (meta_training and held_out), first with two"
    ]


def test_every_row_that_cannot_be_used_is_a_finding(task_folder) -> None:
    good = [{"text": f"t{number}", "label": LABELS[number % 2]} for number in range(4)]
    description = {"input": "{text}", "answer": "label", "labels": list(LABELS)}
    folder = task_folder(
        [*good, "{", {"text": "x", "label": "maybe"}, {"text": "y", "label": ""}, {"label": "yes"}],
        [{"text": "T0.", "label": "yes"}, {"text": 5, "label": "no"}],
        description=description,
    )
    with (folder / "test.jsonl").open("ab") as stream:
        stream.write(b'{"text": "\xe9"}\n')
    findings = check_folder(folder)
    assert [(finding.severity, finding.kind, finding.source.rpartition("/")[2]) for finding in findings] == [
        ("error", "broken JSON", "train.jsonl:5"),
        ("error", "bad UTF-8", "test.jsonl:3"),
        ("warning", "mixed types", "test.jsonl:2"),
        ("error", "unknown label", "train.jsonl:6"),
        ("error", "empty answer", "train.jsonl:7"),
        ("error", "missing field", "train.jsonl:8"),
        ("error", "test in train", "test.jsonl:1"),
    ]
    assert {finding.task for finding in findings} == {"task"}


def test_a_label_of_test_alone_and_too_few_examples_are_findings(task_folder) -> None:
    description = {"input": "{text}", "answer": "label", "labels": list(LABELS)}
    folder = task_folder([{"text": "a", "label": "yes"}], [{"text": "b", "label": "no"}], description=description)
    findings = check_folder(folder)
    assert [(finding.kind, finding.message.partition(".")[0]) for finding in findings] == [
        ("few examples", "1 train example(s); a task needs at least 2"),
        ("unseen label", "test label 'no' never occurs in train"),
    ]


def test_a_folder_of_which_no_row_can_be_read_is_an_error(task_folder, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="no row of its examples could be read"):
        check_folder(task_folder(["{", "}"]))
    with pytest.raises(TaskError, match="no such folder"):
        check_folder(tmp_path / "nowhere")
