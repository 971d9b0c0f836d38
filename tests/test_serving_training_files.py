import json
from pathlib import Path
from typing import Any

import pytest

from manyicl.errors import TaskError
from manyicl.serving.settings import Limits
from manyicl.serving.training_files import check_labels, infer_labels, read_training_file, shuffle_examples
from manyicl.tasks.task import Example
from serving_fixtures import TICKETS, chat_file, plain_file

LIMITS = Limits(max_examples=10, max_text_chars=100)


def read(folder: Path, content: bytes | list[Any]) -> tuple[list[tuple[str, str]], str]:
    path = folder / "file-0123.jsonl"
    lines = content if isinstance(content, bytes) else "".join(json.dumps(line) + "\n" for line in content).encode()
    path.write_bytes(lines)
    found = read_training_file(path, name="mine.jsonl", limits=LIMITS)
    return [(example.input, example.answer) for example in found.examples], found.instruction


def chat(*messages: tuple[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in messages], **fields}


def test_both_formats_hold_the_same_examples(tmp_path: Path) -> None:
    assert read(tmp_path, chat_file(TICKETS)) == read(tmp_path, plain_file(TICKETS)) == (TICKETS, "")


def test_ends_of_texts_do_not_count(tmp_path: Path) -> None:
    assert read(tmp_path, [{"prompt": "q\n\n###\n\n", "completion": " a\n"}]) == ([("q\n\n###", "a")], "")


def test_one_system_message_is_the_instruction(tmp_path: Path) -> None:
    assert read(tmp_path, chat_file(TICKETS, system=" Route it. ")) == (TICKETS, "Route it.")
    lines = chat_file(TICKETS[:2], system="Route it.") + chat_file(TICKETS[2:3])
    with pytest.raises(TaskError) as raised:
        read(tmp_path, lines)
    assert str(raised.value) == (
        "mine.jsonl:3: its system message is not the first line's. Give one system message to all lines, or none."
    )


def test_turns_and_weights_make_examples(tmp_path: Path) -> None:
    turns = chat(("developer", "D"), ("user", "one"), ("assistant", "1"), ("user", "two"), ("assistant", "2"), ("user", "three"))
    turns["messages"][4]["weight"] = 0
    assert read(tmp_path, [turns]) == ([("one", "1")], "D")
    parts = chat(("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), ("assistant", "c"))
    assert read(tmp_path, [parts]) == ([("ab", "c")], "")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"messages": []}, "`messages` is no list of messages"),
        ({"messages": "x"}, "`messages` is no list of messages"),
        ({"messages": ["x"]}, "message 0 has fields beyond role, content, name and weight, or is no object"),
        (chat(("user", "x"), ("assistant", "")), "the answer is empty"),
        (chat(("user", " "), ("assistant", "x")), "the input is empty"),
        (chat(("assistant", "x")), "message 0 is an answer without a user message before it"),
        (chat(("user", "x"), ("assistant", "a"), ("assistant", "b")), "message 2 is an answer without a user message"),
        (chat(("user", "x"), ("system", "s"), ("assistant", "a")), "message 1 is a system message. Only the first one may be"),
        (chat(("user", "x"), ("tool", "a")), "message 1 has a role that is none of system, user and assistant"),
        (chat(("user", "x"), ("assistant", None)), "message 1's content is no text"),
        (chat(("user", [{"type": "image_url"}]), ("assistant", "a")), "message 0's content is no text"),
        (chat(("user", "x"), ("assistant", "a"), tools=[]), "its fields are 'messages', 'tools'"),
        ({"prompt": "x"}, "its fields are 'prompt'"),
        ({"prompt": 5, "completion": "x"}, "prompt is no text"),
        ({}, "its fields are none"),
        ({"prompt": "a\x00", "completion": "x"}, "the input holds a NUL character"),
        ({"prompt": "a" * 101, "completion": "x"}, "the input has 101 characters; at most 100 are taken"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, line: Any, problem: str) -> None:
    good = json.loads(chat_file(TICKETS[:1]))
    with pytest.raises(TaskError) as raised:
        read(tmp_path, [good, line])
    assert str(raised.value).startswith(f"mine.jsonl:2: {problem}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "mine.jsonl: holds no rows"),
        (b"\n\n", "mine.jsonl: holds no rows"),
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": "\xff"}', "mine.jsonl:2: byte 13 of the line, 0xff, is not UTF-8"),
        (b"[" * 100_000, "mine.jsonl:1: cannot be read as JSON: maximum recursion depth exceeded"),
        (b"[1]", "mine.jsonl:1: holds a list, not an object"),
        (b'{"prompt": "\\ud83d", "completion": "b"}', "mine.jsonl:1: holds '\\ud83d', half of a pair"),
        (b"\x1f\x8b\x08\x00", "mine.jsonl:1: byte 2 of the line, 0x8b, is not UTF-8"),
        (plain_file(TICKETS * 2), "mine.jsonl: holds 12 lines; a task takes 10"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "mine.jsonl: 1 line(s) hold no answer to learn from"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_by_its_owners_name(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(TaskError) as raised:
        read(tmp_path, content)
    assert str(raised.value).startswith(message)
    assert str(tmp_path) not in str(raised.value)


def examples(*answers: str) -> list[Example]:
    return [Example(str(place), answer) for place, answer in enumerate(answers)]


def test_answers_that_recur_are_labels() -> None:
    assert infer_labels(examples("b", "a", "a", "b")) == ("a", "b")
    assert infer_labels(examples("a", "b", "c")) == ()
    assert infer_labels(examples("a", "a", "b")) == ()


@pytest.mark.parametrize("answers", [("Yes", "yes", "Yes", "yes", "no", "no"), ("Yes", "yes", "no", "no")])
def test_labels_that_differ_only_in_case_are_refused(answers: tuple[str, ...]) -> None:
    with pytest.raises(TaskError) as raised:
        infer_labels(examples(*answers))
    count = answers.count("Yes")
    assert str(raised.value) == (
        f"the labels 'Yes' ({count} examples), 'yes' ({count} examples) differ only in case. Write one everywhere, or list both "
        "in the job's `labels`."
    )


def test_answers_are_compared_with_given_labels() -> None:
    check_labels(examples("a", "b"), ("a", "b", "c"))
    check_labels(examples("a", "b"), ())
    with pytest.raises(TaskError, match=r"line 2: the answer 'b' is not among the 1 labels"):
        check_labels(examples("a", "b"), ("a",))


def test_the_order_is_random_and_a_function_of_the_seed() -> None:
    given = examples(*"abcdefgh")
    assert shuffle_examples(given, seed=1) == shuffle_examples(given, seed=1)
    assert shuffle_examples(given, seed=1) != shuffle_examples(given, seed=2)
    assert sorted(shuffle_examples(given, seed=1), key=lambda example: example.answer) == given
