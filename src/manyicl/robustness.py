"""What is done to demonstrations to see what a method can bear.

    order:shuffled  order:grouped  order:reversed    the same demonstrations, in their drawn order, by label, backwards
    flipped:0.25                                     a quarter of their answers replaced by another label
    symbols                                          labels replaced by symbols, in demonstrations and queries
    nearest                                          each query has its own demonstrations, the most similar ones
    context:4096                                     as many as fit a context of so many tokens

In: a label task and a method. Out: records that name the condition. The demonstrations of one seed are the same first ones in
every condition, but for `nearest`.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from manyicl.encoding import Encoder
from manyicl.engines.native import NativeEngine
from manyicl.episodes import SYMBOLS
from manyicl.errors import TaskError
from manyicl.evaluation import Plan, evaluate_task
from manyicl.methods import Answer, InContext
from manyicl.records import EvaluationRecord, RecordWriter
from manyicl.selection import Bm25Similarity, choose_nearest, rank_nearest
from manyicl.tasks.task import Example, Task

Arrange = Callable[[list[Example], int], list[Example]]


def evaluate_robustness(
    method: InContext, task: Task, role: str, *, plan: Plan, writer: RecordWriter, conditions: Sequence[str]
) -> Iterator[EvaluationRecord]:
    """The records of one task under each condition; `plan.shots` holds the one number of demonstrations.

    Raises:
        TaskError: the task has no labels, or a condition is unknown.
    """
    if not task.labels:
        raise TaskError(f"task {task.name!r} has no label set; robustness is read on label tasks. Name others.")
    for condition in conditions:
        own, asked, altered = _alter(condition, method, task, plan)
        yield from evaluate_task(own, asked, role, plan=altered, writer=writer)


def _alter(condition: str, method: InContext, task: Task, plan: Plan) -> tuple[InContext, Task, Plan]:
    """The method, the task and the plan under a condition."""
    name, _, value = condition.partition(":")
    num_shots = int(plan.shots[0])
    plan = replace(plan, condition=condition)
    if name == "order" and value in _ORDERS:
        return method, task, replace(plan, arrange=partial(_ORDERS[value], num_shots, task))
    if name == "flipped":
        return method, task, replace(plan, arrange=partial(flip_labels, num_shots, task, float(value)))
    if name == "symbols":
        return method, use_symbols(task), plan
    if name == "nearest":
        return NearestDemonstrations(method.engine, name=method.name, num_shots=num_shots), task, plan
    if name == "context":
        engine = NativeEngine(method.engine.loaded, method.engine.encoder, context_tokens=int(value))
        return InContext(engine, name=method.name), task, replace(plan, shots=("max",))
    raise TaskError(
        f"condition {condition!r} is unknown. Use order:{'|'.join(_ORDERS)}, flipped:SHARE, symbols, nearest or context:TOKENS."
    )


def _keep_order(num_shots: int, task: Task, order: list[Example], seed: int) -> list[Example]:
    return order[:num_shots]


def group_by_label(num_shots: int, task: Task, order: list[Example], seed: int) -> list[Example]:
    """The first demonstrations, those of the first label first."""
    return sorted(order[:num_shots], key=lambda example: task.labels.index(example.answer))


def _reverse(num_shots: int, task: Task, order: list[Example], seed: int) -> list[Example]:
    return order[:num_shots][::-1]


_ORDERS = {"shuffled": _keep_order, "grouped": group_by_label, "reversed": _reverse}


def flip_labels(num_shots: int, task: Task, share: float, order: list[Example], seed: int) -> list[Example]:
    """The first demonstrations, a share of them with another label of the task; which ones follows from (seed, task)."""
    draw = random.Random(f"{seed}/flip/{task.name}")
    places = list(range(min(num_shots, len(order))))
    draw.shuffle(places)
    flipped = order[:num_shots]
    for place in places[: round(share * len(places))]:  # Nested: a larger share flips these and more.
        others = [label for label in task.labels if label != flipped[place].answer]
        flipped[place] = replace(flipped[place], answer=draw.choice(others))
    return flipped


def use_symbols(task: Task) -> Task:
    """The task with symbols in place of its labels, the same for all its examples.

    Raises:
        TaskError: it has more labels than there are symbols.
    """
    if len(task.labels) > len(SYMBOLS):
        raise TaskError(f"task {task.name!r} has {len(task.labels)} labels, more than the {len(SYMBOLS)} symbols. Name another.")
    chosen = random.Random(f"symbols/{task.name}").sample(SYMBOLS, len(task.labels))
    symbols = dict(zip(task.labels, chosen, strict=True))

    def rename(examples: Sequence[Example]) -> tuple[Example, ...]:
        return tuple(replace(example, answer=symbols[example.answer], accepted=()) for example in examples)

    return replace(task, labels=tuple(chosen), train=rename(task.train), test=rename(task.test))


class NearestDemonstrations(InContext):
    """In-context learning where each query has the most similar examples before it (BM25), the most similar last.

    Costs a prefill per query.
    """

    def __init__(self, engine: NativeEngine, *, name: str, num_shots: int) -> None:
        super().__init__(engine, name=name)
        self.fingerprint += f"/nearest-{num_shots}"
        self.num_shots = num_shots

    def open(self, task: Task, demonstrations: Sequence[Example], queries: Sequence[Example]) -> "OpenedNearest":  # type: ignore[override]
        """Index the whole train split; the demonstrations given are not looked at, as each query draws its own."""
        return OpenedNearest(self, task)


class OpenedNearest:
    """A train split that queries choose from."""

    def __init__(self, method: NearestDemonstrations, task: Task) -> None:
        self._method = method
        self._task = task
        self._similarity = Bm25Similarity([example.input for example in task.train])
        encoder: Encoder = method.engine.encoder
        self._lengths = [encoder.count_example(example.input, example.answer) for example in task.train]
        self.num_demonstrations = min(method.num_shots, len(task.train))

    def prefix_tokens(self, num_shots: int) -> int:
        """Of one query, about: the mean length of so many examples."""
        return round(sum(self._lengths) / len(self._lengths) * num_shots)

    def query_tokens(self, query: Example) -> int:
        """Tokens of a query, up to the last one before its answer."""
        return len(self._method.engine.encoder.encode_query(query.input))

    def answer(self, queries: Sequence[Example], num_shots: int) -> list[Answer]:
        """Answers, each after the most similar examples of its own that fit half of the context."""
        ties = np.arange(len(self._task.train))
        answers = []
        for query, scores in zip(queries, self._similarity.scores([query.input for query in queries]), strict=True):
            ranking = rank_nearest(scores, ties, num=num_shots)
            room = self._method.engine.context_tokens // 2
            chosen = choose_nearest(ranking, self._lengths, num=num_shots, max_tokens=room)
            opened = InContext.open(self._method, self._task, [self._task.train[place] for place in chosen], [query])
            answers += opened.answer([query], opened.num_demonstrations)
        return answers
