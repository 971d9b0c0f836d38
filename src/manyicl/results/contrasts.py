"""Differences between methods with intervals: a weighted sum of cells per task, averaged over tasks and families.

    contrast of a task     sum of weight x value over cells, e.g. +1 x ours at its best shots, -1 x few-shot at its best shots
    headline               mean over the tasks of a family, then over families; points on 0-100
    interval               percentile bootstrap: tasks are drawn within their family, queries and orders of demonstrations within
                           a task, the same draws for every cell of a task

Draws depend on (seed, task, place) alone, so that two contrasts of the same tasks are resampled alike and their ratio can be
taken draw by draw. Differences over training seeds are none of this: they are shown apart.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from manyicl.metrics import macro_f1
from manyicl.records import EvaluationRecord, Shots

NUM_DRAWS = 2000
CONFIDENCE = 0.95
_LEAST_DEFINED = 0.99
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Term:
    """One cell of a contrast: its records, one per order of demonstrations, and their weight."""

    weight: float
    records: Sequence[EvaluationRecord]


@dataclass(frozen=True)
class Estimate:
    """A value in points (0-100) with its interval."""

    value: float
    low: float
    high: float
    num_tasks: int

    def as_json(self) -> dict[str, float | int | None]:
        """Rounded to thousandths, so that files compare; None for what is undefined."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        rounded = {name: None if math.isnan(number) else round(number, 3) for name, number in numbers.items()}
        return rounded | {"num_tasks": self.num_tasks}


TaskTerms = Mapping[str, Sequence[Term]]


def estimate(tasks: TaskTerms, *, num_draws: int = NUM_DRAWS, seed: int = 0) -> Estimate:
    """The mean over families of the mean over tasks of each task's contrast, with its interval.

    Raises:
        ValueError: there is no task.
    """
    if not tasks:
        raise ValueError("a contrast of no task has no value")
    draws = headline_draws(tasks, num_draws=num_draws, seed=seed)
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(headline_value(tasks), float(low), float(high), len(tasks))


def headline_value(tasks: TaskTerms) -> float:
    """The mean over families of the mean over tasks of each task's contrast, in points."""
    families = _by_family(tasks)
    return float(np.mean([np.mean([task_value(tasks[name]) for name in names]) for names in families.values()]))


def without_each(tasks: TaskTerms) -> dict[str, float]:
    """The headline without each task, in points: what hangs on one of them."""
    return {
        task: round(headline_value({name: terms for name, terms in tasks.items() if name != task}), 3)
        for task in tasks
        if len(tasks) > 1
    }


def task_value(terms: Sequence[Term]) -> float:
    """A task's contrast, mean over orders of demonstrations, in points."""
    return 100 * float(sum(term.weight * np.mean([record.value for record in term.records]) for term in terms))


def task_estimate(terms: Sequence[Term], *, num_draws: int = NUM_DRAWS, seed: int = 0) -> Estimate:
    """A task's contrast with its interval over queries and orders of demonstrations."""
    draws = _task_draws(terms, num_draws, f"{seed}/{terms[0].records[0].task}/0")
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(task_value(terms), float(low), float(high), 1)


def headline_draws(tasks: TaskTerms, *, num_draws: int = NUM_DRAWS, seed: int = 0) -> Floats:
    """The headline under resampling: [num_draws], in points."""
    means = []
    for family, names in _by_family(tasks).items():
        draw = _generator(f"{seed}/{family}")
        chosen = draw.integers(0, len(names), (num_draws, len(names)))
        # A task that is drawn twice is resampled twice: each place among the family's tasks has draws of its own.
        own = np.stack(
            [
                np.stack([_task_draws(tasks[name], num_draws, f"{seed}/{name}/{place}") for name in names])
                for place in range(len(names))
            ]
        )
        means.append(np.mean([own[place, chosen[:, place], np.arange(num_draws)] for place in range(len(names))], axis=0))
    return np.asarray(np.mean(means, axis=0))


def _by_family(tasks: TaskTerms) -> dict[str, list[str]]:
    families: dict[str, list[str]] = {}
    for name in sorted(tasks):
        families.setdefault(tasks[name][0].records[0].family, []).append(name)
    return dict(sorted(families.items()))


def _generator(name: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))


def _task_draws(terms: Sequence[Term], num_draws: int, name: str) -> Floats:
    """A task's contrast under resampling of queries and orders, the same for all its terms: [num_draws], in points."""
    draw = _generator(name)
    num_queries = terms[0].records[0].num_queries
    num_orders = max(len(term.records) for term in terms)
    queries = draw.integers(0, num_queries, (num_draws, num_queries))
    orders = draw.integers(0, num_orders, (num_draws, num_orders))
    total = np.zeros(num_draws)
    for term in terms:
        if any(record.num_queries != num_queries for record in term.records):
            raise ValueError(f"{terms[0].records[0].task}: cells of {num_queries} and other numbers of queries are not paired")
        values = np.stack([_resampled_values(record, queries) for record in term.records])
        total += term.weight * values[orders % len(term.records), np.arange(num_draws)[:, None]].mean(axis=1)
    return 100 * total


def _resampled_values(record: EvaluationRecord, queries: npt.NDArray[np.int64]) -> Floats:
    """The metric of each draw of queries: [num_draws]."""
    if record.metric != "macro_f1":
        return np.asarray(np.asarray(record.queries.scores)[queries].mean(axis=1))
    gold, predicted = np.asarray(record.queries.gold), np.asarray(record.queries.predicted)
    labels, codes = np.unique(np.concatenate([gold, predicted]), return_inverse=True)
    gold, predicted = codes[: len(gold)], codes[len(gold) :]
    return _macro_f1_of_draws(gold[queries], predicted[queries], len(labels))


def _macro_f1_of_draws(gold: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64], num_labels: int) -> Floats:
    """Macro-F1 of each line of label codes [num_draws, Q], as `metrics.macro_f1` has it."""
    total, count = np.zeros(len(gold)), np.zeros(len(gold))
    for label in range(num_labels):
        in_gold, in_predicted = gold == label, predicted == label
        true = (in_gold & in_predicted).sum(axis=1)
        occurring = in_gold.sum(axis=1) + in_predicted.sum(axis=1)
        total += np.where(occurring > 0, 2 * true / np.maximum(occurring, 1), 0.0)
        count += occurring > 0
    return np.asarray(total / count)


def majority_value(record: EvaluationRecord) -> float:
    """The metric of a predictor that always gives the commonest label among these queries, in points."""
    gold = record.queries.gold
    commonest = max(sorted(set(gold)), key=gold.count)
    if record.metric == "macro_f1":
        return 100 * macro_f1(gold, [commonest] * len(gold))
    return 100 * gold.count(commonest) / len(gold)


class Cells:
    """Finds the records of a cell, one for each order of demonstrations.

    Where a task does not fit so many shots, its cell is read at what fits it. Of two records of the same model, task, shots,
    order and condition the first counts: a study may evaluate the same twice for two of its questions.
    """

    def __init__(self, records: Sequence[EvaluationRecord]) -> None:
        self._cells: dict[tuple[str, str, Shots, str], list[EvaluationRecord]] = {}
        self._by_method: dict[tuple[str, str], list[EvaluationRecord]] = {}
        seen: set[tuple[str, str, Shots, str, int]] = set()
        for record in sorted(records, key=lambda record: record.seed):
            key = (record.model, record.task, record.shots, record.condition, record.seed)
            if key in seen:
                continue
            seen.add(key)
            self._cells.setdefault((record.model, record.task, record.shots, record.condition), []).append(record)
            self._by_method.setdefault((record.method, record.task), []).append(record)
        self.tasks: dict[str, EvaluationRecord] = {record.task: record for record in records}

    def tasks_of(self, role: str, *, math: bool = False) -> list[str]:
        """Names of the tasks of a role, those of math or all others."""
        return sorted(name for name, record in self.tasks.items() if record.role == role and (record.family == "math") == math)

    def find(self, model: str, task: str, shots: Shots, condition: str = "") -> list[EvaluationRecord]:
        """Records of a cell; empty where it was not evaluated."""
        exact = self._cells.get((model, task, shots, condition))
        if exact or shots == "max":
            return exact or []
        most = self._cells.get((model, task, "max", condition), [])
        return most if most and max(record.num_demonstrations for record in most) < shots else []

    def of_method(self, method: str, task: str) -> list[EvaluationRecord]:
        """All records of a method with a model of its own for each order of demonstrations, such as dedicated tuning."""
        return self._by_method.get((method, task), [])

    def methods(self, task: str) -> list[str]:
        """Names of the methods that a task was evaluated with."""
        return sorted(method for method, name in self._by_method if name == task)

    def conditions(self) -> list[str]:
        """What was done to demonstrations, in the order of names; without doing nothing."""
        return sorted({condition for _, _, _, condition in self._cells if condition})


def terms_at(
    cells: Cells, tasks: Sequence[str], readings: Sequence[tuple[float, str, Shots]], *, condition: str = ""
) -> TaskTerms:
    """A contrast of weighted cells (weight, model, shots) on each task; empty where a cell is missing on any."""
    found = {
        task: [Term(weight, cells.find(model, task, shots, condition)) for weight, model, shots in readings] for task in tasks
    }
    return found if all(term.records for terms in found.values() for term in terms) else {}


def verdict(found: Estimate) -> str:
    """Whether a difference above zero is shown: `holds`, `fails` (below zero), or `not shown`."""
    return "holds" if found.low > 0 else "fails" if found.high < 0 else "not shown"


def ratio_estimate(numerator: TaskTerms, denominator: TaskTerms) -> Estimate:
    """The ratio of two contrasts of the same tasks, with its interval from paired draws; no points but a share.

    A draw whose denominator is not above zero has no ratio. Where more than one in a hundred has none, neither has the interval
    ends (nan).
    """
    above, below = headline_draws(numerator), headline_draws(denominator)
    defined = below > 0
    low, high = float("nan"), float("nan")
    if defined.mean() >= _LEAST_DEFINED:
        low, high = np.quantile(above[defined] / below[defined], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    whole = headline_value(denominator)
    return Estimate(headline_value(numerator) / whole if whole > 0 else float("nan"), float(low), float(high), len(numerator))


def worst_order(tasks: TaskTerms) -> float:
    """The headline of the worst order of demonstrations, in points; orders that not all cells have are left out."""
    num_orders = min(len(term.records) for terms in tasks.values() for term in terms)
    by_order = (
        {task: [Term(term.weight, [term.records[order]]) for term in terms] for task, terms in tasks.items()}
        for order in range(num_orders)
    )
    return min(headline_value(order) for order in by_order)
