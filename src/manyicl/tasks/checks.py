"""Looking for what would make a result wrong: leaks, duplicates, bad labels. Each finding has its file and line.

Errors void a result; warnings deserve a look. Costs one pass over all texts, and memory for every run of eight words.
"""

import itertools
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from manyicl.tasks.readers import load_suite
from manyicl.tasks.tables import RowError
from manyicl.tasks.task import Example, Task, TaskSuite

_WORDS = re.compile(r"\w+")
_SHINGLE_WORDS = 8
_MIN_WHOLE_WORDS = 4
_MIN_WHOLE_CHARACTERS = 20
_MIN_SHARED_EXAMPLES = 3
_LABEL_IN_INPUT_SHARE = 0.2
_LABEL_IN_INPUT_DEVIATIONS = 3.0
_ODD_ANSWERS_SHARE = 0.05
_COPIED_SHARE = 0.5
_SHOWN_CHARACTERS = 100


@dataclass(frozen=True, slots=True)
class Finding:
    """Something found in a task; `source` is "file:line" where there is one."""

    severity: Literal["error", "warning"]
    kind: str
    task: str
    message: str
    source: str = ""


@dataclass(frozen=True, slots=True)
class _Member:
    """A task as one of those that are compared; only tasks on different sides are."""

    side: str
    where: str
    task: Task


def check_folder(path: Path | str, *, against: Path | str | None = None) -> list[Finding]:
    """What is wrong with the files of a suite or task: each row that is of no use, and all that `check_suite` finds in the rest.

    Raises:
        TaskError: a whole file, folder or task.yaml cannot be used.
    """
    problems: list[RowError] = []
    suite = load_suite(path, problems=problems)
    findings = [
        Finding(
            "warning" if problem.kind == "mixed types" else "error",
            problem.kind,
            Path(problem.source.rpartition(":")[0]).parent.name,
            problem.problem,
            problem.source,
        )
        for problem in problems
    ]
    return findings + check_suite(suite, against=None if against is None else load_suite(against))


def check_task(task: Task) -> list[Finding]:
    """What is wrong with one task."""
    return [
        *_check_labels(task),
        *_check_answers(task),
        *_check_duplicates(task),
        *_check_overlap(task),
        *_check_label_in_input(task),
    ]


def check_suite(suite: TaskSuite, *, against: TaskSuite | None = None) -> list[Finding]:
    """What is wrong with a suite: each task by itself, and near-duplicates between tasks of different roles.

    Args:
        against: A second suite; near-duplicates between the tasks of the two are looked for too.
    """
    findings = [finding for task in suite.tasks.values() for finding in check_task(task)]
    roles = [_Member(suite.role(name), suite.role(name), task) for name, task in suite.tasks.items()]
    findings += _find_copies(roles)
    findings += _find_shared_texts(roles, "shared between roles")
    if against is not None:
        sides = (("first", suite), ("second", against))
        members = [_Member(side, f"suite {own.name}", task) for side, own in sides for name, task in own.tasks.items()]
        findings += _find_copies(members)
        findings += _find_shared_texts(members, "shared between suites")
    return findings


def _find_copies(members: Sequence[_Member]) -> Iterator[Finding]:
    """Pairs of tasks on different sides where one holds at least half of the other's inputs, however short these are."""
    inputs = [{_normalise(example.input) for example in member.task.train + member.task.test} for member in members]
    for left, right in itertools.combinations(range(len(members)), 2):
        shared = len(inputs[left] & inputs[right])
        smaller = min(len(inputs[left]), len(inputs[right]))
        if members[left].side == members[right].side or shared < max(2, _COPIED_SHARE * smaller):
            continue
        sides = f"{members[left].where} and {members[right].where}"
        message = (
            f"{shared} of {smaller} inputs stand in {members[right].task.name} too ({sides}); a result on either says nothing"
        )
        yield Finding("error", "copied task", members[left].task.name, message, members[left].task.train[0].source)


def _check_answers(task: Task) -> Iterator[Finding]:
    for example in task.train + task.test:
        choices = task.choices(example)
        if not example.answer.strip():
            yield Finding("error", "empty answer", task.name, "the answer is empty; fill it in or remove the row", example.source)
        elif choices and example.answer not in choices:
            message = f"{_quote(example.answer)} is not among {len(choices)} labels"
            yield Finding("error", "unknown label", task.name, message, example.source)
        if not example.input.strip():
            yield Finding("error", "empty input", task.name, "the input is empty; fill it in or remove the row", example.source)
    if task.metric == "numeric_match":
        for example in task.train + task.test:
            if example.answer.strip() and not any(character.isdigit() for character in example.answer):
                message = f"{_quote(example.answer)} holds no number, and is judged as one"
                yield Finding("error", "no number", task.name, message, example.source)
    elif not task.is_choice:
        odd = [example for example in task.train if not _is_number(example.answer)]
        if 0 < len(odd) <= _ODD_ANSWERS_SHARE * len(task.train):
            message = f"{len(odd)} of {len(task.train)} answers are no numbers, the others are; first {_quote(odd[0].answer)}"
            yield Finding("warning", "mixed types", task.name, message, odd[0].source)


def _is_number(text: str) -> bool:
    return bool(re.fullmatch(r"[-+]?[\d.,]*\d[\d.,]*%?", text.strip()))


def _check_labels(task: Task) -> Iterator[Finding]:
    """Label tasks without a label set: their answers would be generated as free text."""
    if task.family == "classification" and not task.is_choice:
        message = "no labels are listed, so that answers are generated as free text. List `labels` in task.yaml"
        yield Finding("warning", "no labels", task.name, message, task.train[0].source if task.train else "")


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
                message += f", with the answer {_quote(known.answer)} instead of {_quote(example.answer)}"
            yield Finding("warning", "conflicting duplicate" if conflict else "duplicate", task.name, message, example.source)


def _check_overlap(task: Task) -> Iterator[Finding]:
    inputs = {_normalise(example.input): example for example in reversed(task.train)}
    groups = {_normalise(example.group): example for example in reversed(task.train) if example.group}
    for example in task.test:
        known = inputs.get(_normalise(example.input))
        shared = groups.get(_normalise(example.group)) if example.group else None
        if known is not None:
            message = f"the input stands in train at {known.source or 'an example'}"
            yield Finding("error", "test in train", task.name, message, example.source)
        elif shared is not None:
            message = f"its premise or passage stands in train at {shared.source or 'an example'}"
            yield Finding("warning", "shared passage", task.name, message, example.source)


def _check_label_in_input(task: Task) -> Iterator[Finding]:
    """Label tasks whose inputs name their own label, and no other, in many rows and far more often than chance."""
    if not task.labels:
        return
    words = {label: label.casefold() for label in task.labels}
    patterns = {label: re.compile(rf"(?<!\w){re.escape(word)}(?!\w)") for label, word in words.items()}
    named: Counter[str] = Counter()
    hits = []
    for example in task.train:
        text = example.input.casefold()
        found = [label for label, word in words.items() if word in text and patterns[label].search(text)]
        found = [label for label in found if not any(words[label] in words[other] for other in found if other != label)]
        if len(found) == 1:
            named[found[0]] += 1
            if found[0] == example.answer:
                hits.append(example)
    total = len(task.train)
    answers = Counter(example.answer for example in task.train)
    chance = sum(count * answers[label] for label, count in named.items()) / max(1, total)
    deviation = math.sqrt(chance * (1 - chance / max(1, total)))
    if len(hits) > _LABEL_IN_INPUT_SHARE * total and len(hits) > chance + _LABEL_IN_INPUT_DEVIATIONS * deviation:
        message = f"{len(hits)} of {total} inputs name their own label and no other; by chance it would be {chance:.0f}"
        yield Finding("warning", "label in input", task.name, message, hits[0].source)


def _find_shared_texts(members: Sequence[_Member], kind: str) -> Iterator[Finding]:
    """Pairs of tasks on different sides that share inputs or long runs of words in three examples or more."""
    owners: dict[int, int] = {}  # For each run of words, one bit per task.
    for number, member in enumerate(members):
        for example in member.task.train + member.task.test:
            for shingle in _shingles(example.input):
                owners[shingle] = owners.get(shingle, 0) | 1 << number
    sharing: dict[tuple[int, int], list[Example]] = defaultdict(list)
    for number, member in enumerate(members):
        others = [place for place, other in enumerate(members) if other.side != member.side]
        for example in member.task.train + member.task.test:
            mask = 0
            for shingle in _shingles(example.input):
                mask |= owners[shingle]
            for other in others if mask & (mask - 1) else ():
                if mask >> other & 1:
                    sharing[number, other].append(example)
    for (left, right), examples in sorted(sharing.items(), key=lambda item: item[0]):
        count = max(len(examples), len(sharing[right, left]))
        if left < right and count >= _MIN_SHARED_EXAMPLES:
            runs = _shingles(examples[0].input)
            match = next(example for example in sharing[right, left] if not runs.isdisjoint(_shingles(example.input)))
            there, sides = members[right], f"{members[left].where} and {members[right].where}"
            message = f"{count} examples share text with {there.task.name} ({sides}), first with {match.source or 'an example'}"
            yield Finding("warning", kind, members[left].task.name, message, examples[0].source)


def _shingles(text: str) -> set[int]:
    """Hashes of all runs of eight words; of the whole text where it is shorter, unless it is very short."""
    words = _WORDS.findall(text.casefold())
    if len(words) < _SHINGLE_WORDS:
        is_long = len(words) >= _MIN_WHOLE_WORDS or len(text) >= _MIN_WHOLE_CHARACTERS
        return {hash(tuple(words))} if words and is_long else set()
    return {hash(tuple(words[start : start + _SHINGLE_WORDS])) for start in range(len(words) - _SHINGLE_WORDS + 1)}


def _normalise(text: str) -> str:
    """One spelling for texts that read alike: case, spaces, quotes' and letters' forms, and stops at the end do not count.

    Signs inside a text do: 3 + 4 is not 3 - 4.
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(" .,;:!?")


def _quote(text: str) -> str:
    """A text in quotes, cut where it is long: one text may stand in the message of every row."""
    return repr(text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…")
