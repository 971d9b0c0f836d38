"""Draw ordered examples of one task under a token budget.

An episode is a pure function of (seed, index): resume, workers and ranks agree without talking to each other. Examples are
drawn uniformly without replacement and stay in the order drawn, so that the preceding answers say nothing about the next
one. Only whole examples are taken; what is left out is named with its reason. Loads no torch: lengths come from a
`TokenCounter`.
"""

import bisect
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from manyicl.config import EpisodesConfig
from manyicl.errors import BudgetError, TaskError
from manyicl.tasks.task import Example, Task

SYMBOLS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ@#%&*+=?!$")


class TokenCounter(Protocol):
    """Says how many tokens the parts of a sequence take; `encoding.Encoder` is one."""

    def count_opening(self, instruction: str) -> int:
        """Tokens before the first example."""

    def count_example(self, input: str, answer: str) -> int:
        """Tokens of a whole example: input part, answer, terminator and gap."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """An example that was drawn but did not fit, and why."""

    example: Example
    reason: str


@dataclass(frozen=True)
class Episode:
    """Ordered examples of one task; the one at position k is answered after k demonstrations.

    Attributes:
        label_map: Old and new label words when this episode remaps them; empty otherwise.
    """

    task: str
    instruction: str
    examples: tuple[Example, ...]
    left_out: tuple[LeftOut, ...] = ()
    index: int = 0
    label_map: tuple[tuple[str, str], ...] = ()


def order_examples(examples: Sequence[Example], *, seed: int, purpose: str, index: int | str) -> list[Example]:
    """A uniformly random order of `examples`, a pure function of (seed, purpose, index).

    As in any draw without replacement, a task of few examples grows predictable to who counts as its last ones are drawn.
    Shot sets taken from the front of one order are nested: k shots are the first k of it.
    """
    order = list(range(len(examples)))
    random.Random(f"{seed}/{purpose}/{index}").shuffle(order)
    return [examples[position] for position in order]


def balance_order(examples: Sequence[Example], *, seed: int, purpose: str, index: int | str) -> list[Example]:
    """A random order in which, at each draw, every answer that has examples left is equally likely.

    Until the rarest answer runs out the answers fall as fair dice do, so that those before say nothing about the next one.
    """
    left: dict[str, list[Example]] = {}
    for example in order_examples(examples, seed=seed, purpose=purpose, index=index):
        left.setdefault(example.answer, []).append(example)
    answers = sorted(left)
    draw = random.Random(f"{seed}/{purpose}/{index}/answers")
    ordered = []
    while answers:
        answer = draw.choice(answers)
        ordered.append(left[answer].pop())
        if not left[answer]:
            answers.remove(answer)
    return ordered


def draw_task(tasks: Sequence[Task], *, seed: int, index: int, alpha: float = 0.0) -> Task:
    """The task of episode `index`, drawn with probability proportional to (train size) ** alpha.

    Draws come in blocks of `len(tasks)` stratified draws in random order: with alpha 0 each block holds every task once.
    """
    block, place = divmod(index, len(tasks))
    draw = random.Random(f"{seed}/task-block/{block}")
    offset = draw.random()
    strata = list(range(len(tasks)))
    draw.shuffle(strata)
    cumulative = list(itertools.accumulate(len(task.train) ** alpha for task in tasks))
    point = (strata[place] + offset) / len(tasks) * cumulative[-1]
    return tasks[min(bisect.bisect_right(cumulative, point), len(tasks) - 1)]


def sample_episode(
    task: Task, *, config: EpisodesConfig, counter: TokenCounter, seed: int, index: int, max_tokens: int | None = None
) -> Episode:
    """The episode of `task` at `index`: examples in random order until the budget is full or `num_shots` is reached.

    Raises:
        TaskError: the task has fewer than two train examples.
        BudgetError: not even one demonstration and one further example fit, or most examples are longer than the budget.
    """
    if len(task.train) < 2 and config.num_shots != 0:
        raise TaskError(f"task {task.name!r} has {len(task.train)} train example(s); an episode needs at least 2. Add examples.")
    purpose = f"episode/{task.name}"
    label_map = _draw_label_map(task, config.remap_probability, random.Random(f"{seed}/remap/{task.name}/{index}"))
    order = balance_order if config.class_balance and task.labels else order_examples
    ordered = [_remap(example, dict(label_map)) for example in order(task.train, seed=seed, purpose=purpose, index=index)]
    budget = max_tokens or config.max_tokens
    limit = None if config.num_shots is None else config.num_shots + 1
    examples, left_out = fill_budget(ordered, instruction=task.instruction, counter=counter, max_tokens=budget, limit=limit)
    if len(examples) < min(2, limit or 2) or len(left_out) - 1 > len(examples):
        lengths = [counter.count_example(example.input, example.answer) for example in ordered[:20]]
        raise BudgetError(
            f"task {task.name!r}: {len(examples)} example(s) fit max_tokens={budget} and {len(left_out)} were left out; its "
            f"examples take {min(lengths)} to {max(lengths)} tokens. Raise episodes.max_tokens or leave the task out."
        )
    return Episode(task.name, task.instruction, tuple(examples), tuple(left_out), index, label_map)


def fill_budget(
    ordered: Sequence[Example], *, instruction: str, counter: TokenCounter, max_tokens: int, limit: int | None = None
) -> tuple[list[Example], list[LeftOut]]:
    """The longest front of `ordered` that fits `max_tokens`, whole examples only, and what was left out on the way.

    An example longer than the whole budget is passed over; the first one that only misses the rest of the row ends it, as
    going on to shorter ones would favour short examples at the end of rows.
    """
    opening = counter.count_opening(instruction)
    used = opening
    examples: list[Example] = []
    left_out: list[LeftOut] = []
    for example in ordered:
        if limit is not None and len(examples) >= limit:
            break
        length = counter.count_example(example.input, example.answer)
        if opening + length > max_tokens:
            left_out.append(LeftOut(example, f"its {length} tokens are more than the row's {max_tokens - opening}"))
        elif used + length > max_tokens:
            left_out.append(LeftOut(example, f"its {length} tokens are more than the {max_tokens - used} left in the row"))
            break
        else:
            examples.append(example)
            used += length
    return examples, left_out


def _draw_label_map(task: Task, probability: float, draw: random.Random) -> tuple[tuple[str, str], ...]:
    """New label words for an episode: symbols or the labels permuted, each half the time; empty when not remapped."""
    if not task.labels or draw.random() >= probability:
        return ()
    if draw.random() < 0.5:
        pool: Sequence[str] = SYMBOLS
        if len(pool) < len(task.labels):
            pool = [f"L{number}" for number in range(1, len(task.labels) + 1)]
    else:
        pool = task.labels
    return tuple(zip(task.labels, draw.sample(list(pool), len(task.labels)), strict=True))


def _remap(example: Example, label_map: dict[str, str]) -> Example:
    return replace(example, answer=label_map[example.answer]) if label_map else example
