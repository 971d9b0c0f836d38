r"""Uploaded training files -> examples. Two formats, one JSON object a line, as OpenAI's clients send them.

    {"messages": [{"role": "system", "content": "Route the ticket."},      optional, and the same on every line
                  {"role": "user", "content": "I was charged twice"},      input: the user message right before an answer
                  {"role": "assistant", "content": "billing"}]}            answer, unless its "weight" is 0
    {"prompt": "I was charged twice", "completion": "billing"}

Each line is read on its own, so a chat of several turns is several examples. Spaces at the ends of texts do not count, here and
in requests alike. Errors name the file as its owner named it, and the line.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyicl.errors import TaskError
from manyicl.serving.settings import Limits
from manyicl.tasks.descriptions import looks_like_labels
from manyicl.tasks.tables import RowError, TableRow, raise_or_add, read_table
from manyicl.tasks.task import Example

_SYSTEM_ROLES = ("system", "developer")
_MESSAGE_FIELDS = {"role", "content", "weight", "name"}
_CONTROL = "\x00"
_LABELLED_SHARE = 0.8  # Of examples whose answers recur: then those that do not are odd.


@dataclass(frozen=True)
class TrainingFile:
    """What a training file holds: examples in file order, and the system message that all of its lines share."""

    examples: tuple[Example, ...]
    instruction: str = ""


def read_training_file(path: Path, *, name: str, limits: Limits, problems: list[RowError] | None = None) -> TrainingFile:
    """The examples of a stored file.

    Args:
        name: What its owner called it; errors name it so.
        problems: Where given, each line that cannot be used is added to it and left out, in place of an error at the first.

    Raises:
        TaskError: a line cannot be used, the file has none, or too many.
    """
    try:
        rows = read_table(path, problems=problems)
        if len(rows) > limits.max_examples:
            raise TaskError(f"{path}: holds {len(rows)} lines; a task takes {limits.max_examples}. Post fewer.")
        read = []
        for row in rows:
            try:
                read.append((row, *_read_row(row, limits)))
            except RowError as error:
                raise_or_add(error, problems)
        examples = tuple(example for _, _, own in read for example in own)
        if not examples and not problems:
            raise TaskError(
                f"{path}: {len(rows)} line(s) hold no answer to learn from. Give assistant messages whose weight is not 0."
            )
        if len(examples) > limits.max_examples:
            raise TaskError(f"{path}: holds {len(examples)} examples; a task takes {limits.max_examples}. Post fewer.")
        for row, instruction, _ in read:
            if instruction != read[0][1]:
                problem = "its system message is not the first line's. Give one system message to all lines, or none."
                raise_or_add(RowError(row.source, "system message", problem), problems)
    except TaskError as error:
        raise TaskError(str(error).replace(str(path), name)) from error
    return TrainingFile(examples, read[0][1] if read else "")


def infer_labels(examples: Sequence[Example]) -> tuple[str, ...]:
    """The label set, sorted, where few distinct answers recur; empty for free text.

    Raises:
        TaskError: two answers differ only in case.
    """
    answers = Counter(example.answer for example in examples)
    folded = Counter(answer.casefold() for answer in answers.elements())
    if not looks_like_labels(folded):
        return ()
    if len(folded) < len(answers):
        twins = next(sorted(own) for word in folded if len(own := [a for a in answers if a.casefold() == word]) > 1)
        shown = ", ".join(f"{twin!r} ({answers[twin]} examples)" for twin in twins)
        raise TaskError(f"the labels {shown} differ only in case. Write one everywhere, or list both in the job's `labels`.")
    return tuple(sorted(answers))


def find_lone_answer(examples: Sequence[Example]) -> tuple[Example, str] | None:
    """An example for whose answer alone all may be read as free text, and what to say of it; None where nothing is odd."""
    answers = Counter(example.answer for example in examples)
    lone = [example for example in examples if answers[example.answer] == 1]
    if not lone or len(lone) > (1 - _LABELLED_SHARE) * len(examples):
        return None
    return lone[0], (
        f"the answer {lone[0].answer!r} stands once only, as {len(lone)} of {len(answers)} answers do, so that all are "
        "read as free text. If they are labels, correct it, add an example of it, or list the labels"
    )


def check_labels(examples: Sequence[Example], labels: Sequence[str]) -> None:
    """Compare answers with a label set that was given.

    Raises:
        TaskError: an answer is none of them.
    """
    known = set(labels)
    for position, example in enumerate(examples):
        if known and example.answer not in known:
            where = example.source.rpartition(":")[2] or str(position + 1)
            raise TaskError(
                f"line {where}: the answer {example.answer!r} is not among the {len(labels)} labels. Correct it or list it."
            )


def shuffle_examples(examples: Sequence[Example], *, seed: int) -> tuple[Example, ...]:
    """The order in which examples stand in the context: random, as a file sorted by label would teach the order of labels."""
    shuffled = list(examples)
    random.Random(f"{seed}/order").shuffle(shuffled)
    return tuple(shuffled)


def check_text(text: str, *, what: str, limits: Limits) -> str:
    """A text with its ends stripped.

    Raises:
        TaskError: it is empty, too long, or holds a NUL, which no database keeps.
    """
    stripped = text.strip()
    if not stripped:
        raise TaskError(f"{what} is empty. Fill it in.")
    if len(stripped) > limits.max_text_chars:
        raise TaskError(f"{what} has {len(stripped)} characters; at most {limits.max_text_chars} are taken. Shorten it.")
    if _CONTROL in stripped:
        raise TaskError(f"{what} holds a NUL character. Remove it.")
    return stripped


def _read_row(row: TableRow, limits: Limits) -> tuple[str, list[Example]]:
    """The system message and the examples of a line."""
    try:
        if set(row.fields) == {"prompt", "completion"}:
            pairs = [(_text(row.fields["prompt"], "prompt"), _text(row.fields["completion"], "completion"))]
            instruction = ""
        elif set(row.fields) == {"messages"}:
            instruction, pairs = _read_messages(row.fields["messages"])
        else:
            there = ", ".join(repr(field)[:40] for field in list(row.fields)[:5]) or "none"
            raise TaskError(f"its fields are {there}. Give `messages` alone, or `prompt` and `completion`.")
        if instruction:
            instruction = check_text(instruction, what="the system message", limits=limits)
        examples = [
            Example(
                check_text(given, what="the input", limits=limits),
                check_text(answer, what="the answer", limits=limits),
                source=row.source,
            )
            for given, answer in pairs
        ]
    except RowError:
        raise
    except TaskError as error:
        raise RowError(row.source, "training line", str(error)) from error
    return instruction, examples


def _read_messages(messages: Any) -> tuple[str, list[tuple[str, str]]]:
    """The system message of a chat, and its pairs of a user message and the answer after it."""
    if not isinstance(messages, list) or not messages:
        raise TaskError("`messages` is no list of messages. Give a user message and an assistant message.")
    instruction, pairs, before = "", [], ""
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not set(message) <= _MESSAGE_FIELDS:
            raise TaskError(f"message {number} has fields beyond role, content, name and weight, or is no object. Remove them.")
        role, content = message.get("role"), _text(message.get("content"), f"message {number}'s content")
        if role in _SYSTEM_ROLES:
            if number:
                raise TaskError(f"message {number} is a system message. Only the first one may be.")
            instruction = content.strip()
        elif role == "user":
            before = content
        elif role != "assistant":
            raise TaskError(f"message {number} has a role that is none of system, user and assistant.")
        elif message.get("weight", 1) not in (0, 1):
            raise TaskError(f"message {number} has a weight that is neither 0 nor 1.")
        elif message.get("weight", 1):
            if not before:
                raise TaskError(f"message {number} is an answer without a user message before it.")
            pairs.append((before, content))
            before = ""
        else:
            before = ""
    return instruction, pairs


def _text(value: Any, what: str) -> str:
    """A text, or the texts of a list of text parts."""
    if isinstance(value, list) and value and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        parts = [part.get("text") for part in value]
        if all(isinstance(part, str) for part in parts):
            return "".join(parts)
    if not isinstance(value, str):
        raise TaskError(f"{what} is no text. Write a text.")
    return value
