"""Tasks written from word lists and sentence templates; a pure function of (seed, task).

    words      dish: soup | salad            labelled(...)  ->  {"dish": ("soup", "salad")}
    sentences  good: The {dish} was warm.    expand(...)    ->  "The soup was warm."

What goes in is a `TaskGrammar`, what comes out a `Task` whose inputs are all distinct as sequences of words. A group (a
premise, a passage, a fact) falls into train or into test, never into both. A task takes a few milliseconds.
"""

import random
import re
import zlib
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial

from manyicl.errors import TaskError
from manyicl.tasks.task import Example, Family, Metric, Task

Words = Mapping[str, Sequence[str]]
Writer = Callable[[random.Random, str], Example]

_SLOT = re.compile(r"\{([a-z_]+)(\d*)\}")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeio]|u(?!ni|se)|hour|[AEIO])")
_SENTENCE_START = re.compile(r"(?:^|(?<=[.!?] )|(?<=\n))[a-z]")
_WORD = re.compile(r"\w+")
_MAX_REJECTED = 2000
_TEST_GROUP_SHARE = 3


@dataclass(frozen=True, kw_only=True)
class TaskGrammar:
    """How the examples of one task are written.

    Attributes:
        write: Writes one example from a source of randomness and the label that is wanted most ("" where there are no
            labels). An example of another label is welcome until that label has its share.
        labels: The label set; empty for free text and for per-example options.
        weights: Relative frequencies of the labels; empty for equal ones.
    """

    name: str
    family: Family
    metric: Metric
    write: Writer
    labels: tuple[str, ...] = ()
    weights: tuple[int, ...] = ()
    instruction: str = ""
    num_train: int = 320
    num_test: int = 80

    def make_task(self, seed: int) -> Task:
        """The task for a seed.

        Raises:
            TaskError: the grammar is too small for this many distinct examples.
        """
        draw = random.Random(f"{seed}/builtin/{self.name}")
        seen: set[str] = set()
        splits = []
        for is_test, size in ((False, self.num_train), (True, self.num_test)):
            fits = partial(_is_in_split, seed=seed, is_test=is_test)
            examples = self._write_split(draw, size, seen, fits)
            draw.shuffle(examples)
            splits.append(tuple(examples))
        return Task(self.name, self.family, self.metric, splits[0], splits[1], self.labels, self.instruction)

    def _quota(self, size: int) -> dict[str, int]:
        """How many of `size` examples each label gets, in proportion to the weights."""
        if not self.labels:
            return {"": size}
        weights = self.weights or (1,) * len(self.labels)
        ends = [round(size * sum(weights[: place + 1]) / sum(weights)) for place in range(len(weights))]
        return {label: end - start for label, start, end in zip(self.labels, [0, *ends[:-1]], ends, strict=True)}

    def _write_split(self, draw: random.Random, size: int, seen: set[str], fits: Callable[[str], bool]) -> list[Example]:
        """Examples whose inputs are new, whose groups fit the split and whose labels meet the quota."""
        missing = self._quota(size)
        examples: list[Example] = []
        num_rejected = 0
        while len(examples) < size:
            wanted = max(missing, key=missing.__getitem__)
            example = self.write(draw, wanted)
            label = example.answer if self.labels else ""
            key = " ".join(_WORD.findall(example.input.lower()))
            if missing[label] and key not in seen and fits(example.group):
                seen.add(key)
                missing[label] -= 1
                examples.append(example)
                num_rejected = 0
                continue
            num_rejected += 1
            if num_rejected == _MAX_REJECTED:
                raise TaskError(
                    f"builtin task {self.name!r}, label {wanted!r}: no new example in {num_rejected} draws, after {len(seen)} "
                    "examples. Widen its word lists or ask for fewer examples."
                )
        return examples


def _is_in_split(group: str, *, seed: int, is_test: bool) -> bool:
    """Whether a group belongs to train or test: a third of all groups to test. No group fits both."""
    return not group or (zlib.crc32(f"{seed}/{group}".encode()) % _TEST_GROUP_SHARE == 0) == is_test


def listed(text: str) -> tuple[str, ...]:
    """The entries of a text, one per line or separated by "|"."""
    return tuple(entry.strip() for line in text.splitlines() for entry in line.split("|") if entry.strip())


def labelled(text: str) -> dict[str, tuple[str, ...]]:
    """The entries of lines "name: entry | entry" by name; a name may have several lines."""
    found: dict[str, tuple[str, ...]] = {}
    for line in text.splitlines():
        if line.strip():
            name, _, entries = line.partition(":")
            found[name.strip()] = found.get(name.strip(), ()) + listed(entries)
    return found


def paired(text: str) -> tuple[tuple[str, str], ...]:
    """The two sides of lines "left => right"; in both, " // " stands for a line break."""
    lines = [line.replace(" // ", "\n").split("=>") for line in text.splitlines() if line.strip()]
    return tuple((left.strip(), right.strip()) for left, right in lines)


def expand(template: str, words: Words, draw: random.Random, chosen: MutableMapping[str, str] | None = None) -> str:
    """A template with its `{slot}` places filled from the word lists, "a" made "an" where needed.

    A slot has one value throughout; `{city}` and `{city2}` take different words of the list "city". Words may have slots
    of their own. `chosen` holds values that are already fixed, and takes those chosen here.
    """
    return _ARTICLE.sub(r"\1n ", _fill(template, words, draw, {} if chosen is None else chosen))


def _fill(template: str, words: Words, draw: random.Random, chosen: MutableMapping[str, str]) -> str:
    def choose(match: re.Match[str]) -> str:
        slot, kind = match[1] + match[2], match[1]
        if slot not in chosen:
            taken = {value for name, value in chosen.items() if name.rstrip("0123456789") == kind}
            free = [word for word in words[kind] if word not in taken] if taken else words[kind]
            chosen[slot] = _fill(draw.choice(free), words, draw, chosen)
        return chosen[slot]

    return _SLOT.sub(choose, template) if "{" in template else template


def capitalise(text: str) -> str:
    """A text whose sentences begin with capital letters."""
    return _SENTENCE_START.sub(lambda match: match[0].upper(), text)


def sentence_task(
    name: str,
    sentences: Words,
    words: Words,
    *,
    codes: Mapping[str, str] | None = None,
    weights: tuple[int, ...] = (),
    instruction: str = "",
) -> TaskGrammar:
    """A classification task: sentence templates by label.

    Args:
        name: Name of the task.
        sentences: Templates by label.
        words: Word lists for the places of the templates.
        codes: What stands for each label, where label words shall say nothing: symbols or invented words.
        weights: Relative frequencies of the labels in the order of `sentences`; unequal ones are judged by macro-F1.
        instruction: A sentence before the demonstrations.
    """
    by_label = {codes[label] if codes else label: templates for label, templates in sentences.items()}

    def write(draw: random.Random, label: str) -> Example:
        return Example(capitalise(expand(draw.choice(by_label[label]), words, draw)), label)

    return TaskGrammar(
        name=name,
        family="classification",
        metric="macro_f1" if weights else "accuracy",
        write=write,
        labels=tuple(by_label),
        weights=weights,
        instruction=instruction,
    )


def summary_task(name: str, pairs: Sequence[tuple[str, str]], words: Words, *, instruction: str = "") -> TaskGrammar:
    """A summarization task: pairs of a text and its summary, whose places are filled alike."""

    def write(draw: random.Random, label: str) -> Example:
        chosen: dict[str, str] = {}
        text, summary = draw.choice(pairs)
        document = capitalise(expand(text, words, draw, chosen))
        return Example(document, capitalise(expand(summary, words, draw, chosen)))

    return TaskGrammar(name=name, family="summarization", metric="rouge_l", write=write, instruction=instruction)


def number_task(name: str, problem: Callable[[random.Random], tuple[str, int]], *, instruction: str = "") -> TaskGrammar:
    """A math task: a function that writes a problem and works out its result."""

    def write(draw: random.Random, label: str) -> Example:
        text, result = problem(draw)
        return Example(capitalise(text), str(result))

    return TaskGrammar(name=name, family="math", metric="numeric_match", write=write, instruction=instruction)


def entailment_task(
    name: str,
    labels: tuple[str, str, str],
    statement: Callable[[random.Random], tuple[str, str, bool | None]],
    *,
    layout: str,
    instruction: str = "",
) -> TaskGrammar:
    """An nli task: a function that writes a premise, a hypothesis and whether it is true (None: it cannot be known).

    Args:
        name: Name of the task.
        labels: What stands for true, unknown and false.
        statement: Writes (premise, hypothesis, truth).
        layout: How the two stand in the input, with {premise} and {hypothesis}.
        instruction: A sentence before the demonstrations.
    """
    label_of = {True: labels[0], None: labels[1], False: labels[2]}

    def write(draw: random.Random, label: str) -> Example:
        premise, hypothesis, truth = statement(draw)
        premise, hypothesis = capitalise(premise), capitalise(hypothesis)
        return Example(layout.format(premise=premise, hypothesis=hypothesis), label_of[truth], group=premise)

    return TaskGrammar(name=name, family="nli", metric="accuracy", write=write, labels=labels, instruction=instruction)
