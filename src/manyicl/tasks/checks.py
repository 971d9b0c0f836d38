"""Looking for what would make a result wrong: leaks, duplicates, bad labels. Each finding has its file and line.

Errors void a result; warnings deserve a look. Costs one pass over all texts.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from manyicl.tasks.task import Example, Task, TaskSuite

_WORDS = re.compile(r"\w+")
_SHINGLE_WORDS = 8
_MIN_SHARED_EXAMPLES = 3
_LABEL_IN_INPUT_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class Finding:
    """Something found in a task; `source` is "file:line" where there is one."""

    severity: Literal["error", "warning"]
    kind: str
    task: str
    message: str
    source: str = ""


def check_task(task: Task) -> list[Finding]:
    """What is wrong with one task."""
    return [
        *_check_answers(task),
        *_check_duplicates(task),
        *_check_overlap(task),
        *_check_label_in_input(task),
    ]


def check_suite(suite: TaskSuite) -> list[Finding]:
    """What is wrong with a suite: each task by itself, and near-duplicates between tasks of different roles."""
    findings = [finding for task in suite.tasks.values() for finding in check_task(task)]
    return findings + list(_check_between_roles(suite))


def _check_answers(task: Task) -> Iterator[Finding]:
    seen = {example.answer for example in task.train}
    for example in task.train + task.test:
        choices = task.choices(example)
        if not example.answer.strip():
            yield Finding("error", "empty answer", task.name, "the answer is empty; fill it in or remove the row", example.source)
        elif choices and example.answer not in choices:
            yield Finding(
                "error",
                "unknown label",
                task.name,
                f"{example.answer!r} is not among {len(choices)} labels",
                example.source,
            )
        if not example.input.strip():
            yield Finding("error", "empty input", task.name, "the input is empty; fill it in or remove the row", example.source)
    for example in task.test:
        if task.labels and example.answer not in seen:
            yield Finding("error", "unseen label", task.name, f"{example.answer!r} never occurs in train", example.source)
    numeric = sum(_is_number(example.answer) for example in task.train)
    if not task.is_choice and task.metric != "numeric_match" and 0 < numeric < 0.05 * len(task.train):
        first = next(example for example in task.train if _is_number(example.answer))
        yield Finding("warning", "mixed types", task.name, f"{numeric} of {len(task.train)} answers are numbers", first.source)


def _is_number(text: str) -> bool:
    return bool(re.fullmatch(r"-?[\d.,]+", text))


def _check_duplicates(task: Task) -> Iterator[Finding]:
    for split in (task.train, task.test):
        first: dict[str, Example] = {}
        for example in split:
            known = first.setdefault(_normalise(example.input), example)
            if known is example:
                continue
            conflict = known.answer != example.answer
            message = f"the input stands at {known.source or 'an earlier example'} too"
            if conflict:
                message += f", with the answer {known.answer!r} instead of {example.answer!r}"
            yield Finding("warning", "conflicting duplicate" if conflict else "duplicate", task.name, message, example.source)


def _check_overlap(task: Task) -> Iterator[Finding]:
    inputs = {_normalise(example.input): example for example in task.train}
    groups = {_normalise(example.group): example for example in task.train if example.group}
    for example in task.test:
        known = inputs.get(_normalise(example.input))
        if known is not None:
            yield Finding("error", "test in train", task.name, f"the input stands in train at {known.source}", example.source)
        shared = groups.get(_normalise(example.group)) if example.group else None
        if shared is not None and known is None:
            yield Finding(
                "warning",
                "shared passage",
                task.name,
                f"its premise or passage stands in train at {shared.source}",
                example.source,
            )


def _check_label_in_input(task: Task) -> Iterator[Finding]:
    """Label tasks whose inputs name their own label, and not the others, far more often than chance."""
    if not task.labels:
        return
    patterns = {label: re.compile(rf"(?<!\w){re.escape(label.lower())}(?!\w)") for label in task.labels}
    hits = []
    for example in task.train:
        text = example.input.lower()
        named = [label for label in task.labels if label.lower() in text and patterns[label].search(text)]
        if named == [example.answer]:
            hits.append(example)
    if len(hits) > _LABEL_IN_INPUT_SHARE * len(task.train):
        message = f"{len(hits)} of {len(task.train)} inputs name their own label and no other"
        yield Finding("warning", "label in input", task.name, message, hits[0].source)


def _check_between_roles(suite: TaskSuite) -> Iterator[Finding]:
    """Pairs of tasks of different roles that share inputs or long runs of words."""
    owners: dict[int, set[str]] = defaultdict(set)
    examples: dict[tuple[int, str], Example] = {}
    for name, task in suite.tasks.items():
        for example in task.train + task.test:
            for shingle in _shingles(example.input):
                owners[shingle].add(name)
                examples.setdefault((shingle, name), example)
    shared: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], tuple[Example, Example]] = {}
    counted: set[tuple[str, str, str]] = set()
    for shingle, names in owners.items():
        for left in sorted(names):
            for right in sorted(names):
                if left >= right or suite.role(left) == suite.role(right):
                    continue
                pair = (examples[shingle, left], examples[shingle, right])
                if (left, right, pair[0].input) not in counted:
                    counted.add((left, right, pair[0].input))
                    shared[left, right] += 1
                    first.setdefault((left, right), pair)
    for (left, right), count in shared.items():
        if count >= _MIN_SHARED_EXAMPLES:
            where = first[left, right][1].source or "an example"
            message = f"{count} examples share text with {right} ({suite.role(left)} and {suite.role(right)}), first with {where}"
            yield Finding("warning", "shared between roles", left, message, first[left, right][0].source)


def _shingles(text: str) -> set[int]:
    """Hashes of all runs of eight words; of the whole text where it is shorter but no less than four words."""
    words = _WORDS.findall(text.lower())
    if len(words) < _SHINGLE_WORDS:
        return {hash(tuple(words))} if len(words) >= 4 else set()
    return {hash(tuple(words[start : start + _SHINGLE_WORDS])) for start in range(len(words) - _SHINGLE_WORDS + 1)}


def _normalise(text: str) -> str:
    return " ".join(_WORDS.findall(text.lower()))
