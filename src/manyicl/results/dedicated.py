"""Ours against one tuned model per task: the difference, the share of its gain that is reached, and where it overtakes.

    dedicated_prefix   tuned on the very demonstrations that our longest prefix holds, one model per order of demonstrations
    dedicated_full     tuned on the whole train split
    dedicated_64 …     tuned on the first 64 demonstrations of an order

All are read without demonstrations.
"""

import re
from typing import Any

from manyicl.records import EvaluationRecord, Shots
from manyicl.results.contrasts import (
    Cells,
    TaskTerms,
    Term,
    estimate,
    majority_value,
    ratio_estimate,
    task_estimate,
    task_value,
    terms_at,
    verdict,
)
from manyicl.results.files import BASE

PREFIX, FULL = "dedicated_prefix", "dedicated_full"
LEAST_GAIN = 5.0  # Points over the majority label from which a task counts as one that dedicated tuning can learn.


def dedicated_claim(cells: Cells, ours: str, best_shots: Shots) -> dict[str, Any] | None:
    """Ours less dedicated tuning where that learns the task, in points, and the share of its gain over the base at 0 shots.

    The claim is that at our best shots; at max stands beside it, where ours holds the demonstrations that `PREFIX` is tuned on.
    """
    tasks = [name for name in cells.tasks_of("held_out") if cells.of_method(FULL, name) and cells.of_method(PREFIX, name)]
    if not tasks or len(tasks) < len(cells.tasks_of("held_out")):
        return None
    learnt = [name for name in tasks if _gain_over_majority(cells.of_method(FULL, name)) >= LEAST_GAIN]
    claim: dict[str, Any] = {
        "tasks": learnt,
        "not_learnt": {name: round(_gain_over_majority(cells.of_method(FULL, name)), 3) for name in tasks if name not in learnt},
        "best_shots": best_shots,
    }
    if not learnt:
        return claim
    own, own_at_max, base = (
        terms_at(cells, learnt, [(1.0, model, shots)]) for model, shots in ((ours, best_shots), (ours, "max"), (BASE, 0))
    )
    if not own or not own_at_max or not base:
        return None
    for method in (PREFIX, FULL):
        dedicated = {name: [Term(1.0, cells.of_method(method, name))] for name in learnt}
        difference = _subtract(own, dedicated)
        claim[method] = {
            "difference": estimate(difference).as_json(),
            "by_task": {name: task_estimate(terms).as_json() for name, terms in difference.items()},
            "share_of_gain": ratio_estimate(_subtract(own, base), _subtract(dedicated, base)).as_json(),
            "difference_at_max": estimate(_subtract(own_at_max, dedicated)).as_json(),
            "share_of_gain_at_max": ratio_estimate(_subtract(own_at_max, base), _subtract(dedicated, base)).as_json(),
            "verdict": verdict(estimate(difference)),
        }
    return claim


def _gain_over_majority(records: list[EvaluationRecord]) -> float:
    """Points over always giving the commonest label; over nothing where answers are free text."""
    majority = majority_value(records[0]) if records[0].queries.gold[0] >= 0 else 0.0
    return task_value([Term(1.0, records)]) - majority


def _subtract(left: TaskTerms, right: TaskTerms) -> TaskTerms:
    return {name: [*left[name], *(Term(-term.weight, term.records) for term in right[name])] for name in left}


def count_kept_back(num_examples: int) -> int:
    """How many of the examples a dedicated model is not trained on: a fifth, one at least."""
    return max(1, num_examples // 5)


def overtaking(cells: Cells, ours: str) -> list[dict[str, Any]]:
    """On each task with dedicated models of several sizes: both by number of examples, in points."""
    points = []
    for task in cells.tasks_of("held_out") + cells.tasks_of("held_out", math=True):
        sizes = sorted(int(found.group(1)) for name in cells.methods(task) if (found := re.fullmatch(r"dedicated_(\d+)", name)))
        for size in sizes:
            own = cells.find(ours, task, size)
            points.append(_overtaking_point(task, size, own, cells.of_method(f"dedicated_{size}", task)))
        full = cells.of_method(FULL, task)
        if sizes and full:
            points.append(_overtaking_point(task, "all", cells.find(ours, task, "max"), full))
    return points


def _overtaking_point(
    task: str, size: int | str, ours: list[EvaluationRecord], dedicated: list[EvaluationRecord]
) -> dict[str, Any]:
    """Both methods with so many examples; ours may hold fewer in its context, and says how many."""
    return {
        "task": task,
        "examples": size,
        "ours": task_estimate([Term(1.0, ours)]).as_json() if ours else None,
        "our_demonstrations": min((record.num_demonstrations for record in ours), default=None),
        "dedicated": task_estimate([Term(1.0, dedicated)]).as_json(),
    }
