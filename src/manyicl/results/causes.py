"""What stands behind a claim: the same differences by training seed and by budget, and what the choice of shots costs.

None of this decides a claim. Where one is not shown, it says what to change: more budget helps if a difference grows with it; one
training run says little if the differences of two seeds are further apart than a claim's aim; shots that validation tasks choose
cost what lies between them and the shots that are best on held-out tasks, which nothing may choose.
"""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from manyicl.records import Shots
from manyicl.results.contrasts import Cells, TaskTerms, Term, estimate, headline_value, terms_at, verdict, without_each
from manyicl.results.files import ModelFacts, StudyResults
from manyicl.results.readings import OURS, Reading

SEED_SHOTS: tuple[Shots, ...] = (0, "max")  # Those at which a study evaluates further training seeds.


def find_causes(
    results: StudyResults, cells: Cells, readings: Mapping[str, Reading], methods: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Ours less each other jointly tuned method by training seed and by budget, and what the choice of shots costs each.

    Args:
        methods: The summaries of the claims.

    Returns:
        `by_seed`, `by_budget`, `choice` and `one_label`, as the functions of these names give them.
    """
    found: dict[str, Any] = {"choice": costs_of_choice(methods), "one_label": one_label_shares(cells, readings)}
    found |= {"by_seed": {}, "by_budget": {}}
    if OURS in readings:
        others = [reading for name, reading in readings.items() if name != OURS and results.model_facts(reading.model)]
        found["by_seed"] = differences_by_seed(models_by_seed(results), cells, [reading.method for reading in others])
        found["by_budget"] = differences_by_budget(results, cells, readings[OURS], others)
    return found


def models_by_seed(results: StudyResults) -> dict[str, dict[int, str]]:
    """The final weights of each jointly tuned method by training seed, ascending."""
    finals = [facts for facts in results.models if facts.is_final and facts.setting == "held_out" and not facts.task]
    found: dict[str, dict[int, str]] = {}
    for facts in sorted(finals, key=lambda facts: facts.training_seed):
        found.setdefault(facts.method, {})[facts.training_seed] = facts.model
    return found


def differences_by_seed(models: Mapping[str, Mapping[int, str]], cells: Cells, others: Sequence[str]) -> dict[str, Any]:
    """Ours less each other method by training seed, seed against the same seed, and the mean over seeds, at 0 and max.

    The interval of the mean is over tasks, queries and orders of demonstrations, like every other; seeds are not drawn.

    Args:
        models: As `models_by_seed` gives them.

    Returns:
        For each other method with two seeds or more and each number of shots: `by_seed`, `mean` and `verdict`, and under
        `without_task` the mean without each task.
    """
    tasks = cells.tasks_of("held_out")
    found: dict[str, Any] = {}
    for other in others:
        for shots in SEED_SHOTS:
            pairs = {
                seed: terms
                for seed, own in models.get(OURS, {}).items()
                if seed in models.get(other, {})
                and (terms := terms_at(cells, tasks, [(1.0, own, shots), (-1.0, models[other][seed], shots)]))
            }
            if len(pairs) > 1:
                contrast = _mean_of(list(pairs.values()))
                mean = estimate(contrast)
                found.setdefault(other, {})[str(shots)] = {
                    "by_seed": {str(seed): estimate(terms).as_json() for seed, terms in pairs.items()},
                    "mean": mean.as_json(),
                    "verdict": verdict(mean),
                    "without_task": without_each(contrast),
                }
    return found


def _mean_of(contrasts: Sequence[TaskTerms]) -> TaskTerms:
    """The mean of contrasts of the same tasks."""
    share = 1 / len(contrasts)
    return {
        task: [Term(share * term.weight, term.records) for contrast in contrasts for term in contrast[task]]
        for task in contrasts[0]
    }


def spread_over_training_seeds(results: StudyResults, cells: Cells) -> dict[str, dict[str, dict[str, float]]]:
    """The headline of each method by training seed at 0 and max, in points; only where there are several seeds."""
    tasks, found = cells.tasks_of("held_out"), {}
    for method, models in models_by_seed(results).items():
        by_shots = {
            str(count): {
                str(seed): round(headline_value(terms), 3)
                for seed, model in models.items()
                if (terms := terms_at(cells, tasks, [(1.0, model, count)]))
            }
            for count in SEED_SHOTS
        }
        if len(by_shots["max"]) > 1:
            found[method] = by_shots
    return found


def budget_curves(results: StudyResults, cells: Cells, readings: Mapping[str, Reading]) -> dict[str, list[dict[str, Any]]]:
    """Held-out headline of each snapshot at its method's best shots and at max, beside what it had cost by then."""
    tasks, found = cells.tasks_of("held_out"), {}
    for method, reading in readings.items():
        points = []
        for facts in _snapshots(results, reading):
            point: dict[str, Any] = facts.model_dump(include={"updates", "tokens", "answers", "target_answers", "seconds"})
            for name, count in (("at_best_shots", reading.best_shots), ("at_max", "max")):
                terms = terms_at(cells, tasks, [(1.0, facts.model, count)])
                point[name] = estimate(terms).as_json() if terms else None
            points.append(point)
        if points:
            found[method] = points
    return found


def differences_by_budget(
    results: StudyResults, cells: Cells, ours: Reading, others: Sequence[Reading]
) -> dict[str, list[dict[str, Any]]]:
    """Ours less each other method from snapshot to snapshot, each against that of the same share of the budget.

    All are read with the orders of demonstrations that every snapshot has, so that a row differs from the next by budget alone.

    Returns:
        For each other method of which two snapshots or more are evaluated, a row for each: `tokens` that ours was fed by then
        (the other is within about a row of it), and the differences `at_best_shots` and `at_max` in points.
    """
    tasks, found = cells.tasks_of("held_out"), {}
    for other in others:
        rows: list[tuple[int, list[TaskTerms]]] = []
        for own, theirs in zip(_snapshots(results, ours), _snapshots(results, other), strict=False):
            shots: tuple[tuple[Shots, Shots], ...] = ((ours.best_shots, other.best_shots), ("max", "max"))
            contrasts = [terms_at(cells, tasks, [(1.0, own.model, one), (-1.0, theirs.model, two)]) for one, two in shots]
            if all(contrasts):
                rows.append((own.tokens, contrasts))
        if len(rows) > 1:
            at_best, at_max = (_same_orders([contrasts[place] for _, contrasts in rows]) for place in (0, 1))
            found[other.method] = [
                {"tokens": tokens, "at_best_shots": estimate(best).as_json(), "at_max": estimate(most).as_json()}
                for (tokens, _), best, most in zip(rows, at_best, at_max, strict=True)
            ]
    return found


def _same_orders(contrasts: Sequence[TaskTerms]) -> list[TaskTerms]:
    """Contrasts of the same tasks with the orders of demonstrations that all of them have."""
    seeds = {
        task: set.intersection(*({record.seed for record in term.records} for contrast in contrasts for term in contrast[task]))
        for task in contrasts[0]
    }
    return [
        {
            task: [Term(term.weight, [record for record in term.records if record.seed in seeds[task]]) for term in terms]
            for task, terms in contrast.items()
        }
        for contrast in contrasts
    ]


def costs_of_choice(methods: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What each method would have on held-out tasks at the shots that are best there, beside the shots that were chosen.

    Args:
        methods: The summaries of the claims.

    Returns:
        For each method the shots `chosen`, the `highest` on held-out tasks, and the `cost` in points.
    """
    found = {}
    for name, method in methods.items():
        curve = {shots: one["value"] for shots, one in method["held_out"].items()}
        chosen = str(method["best_shots"])
        if chosen in curve:
            highest = max(curve, key=lambda shots: (curve[shots], shots == chosen))
            found[name] = {"chosen": chosen, "highest": highest, "cost": round(curve[highest] - curve[chosen], 3)}
    return found


def one_label_shares(cells: Cells, readings: Mapping[str, Reading]) -> dict[str, dict[str, Any]]:
    """How often each method gives its commonest label on each held-out label task, beside how often a label is right.

    A method that gives one label to nearly all queries reads nothing of them; its accuracy is that label's share, by luck.

    Returns:
        For each task `right`, the share of the commonest right label, and for each method its shares `at_best_shots` and
        `at_max`, all from 0 to 1, mean over orders of demonstrations.
    """
    found: dict[str, dict[str, Any]] = {}
    for task in cells.tasks_of("held_out"):
        gold = cells.tasks[task].queries.gold
        if gold[0] < 0:
            continue
        shares = {}
        for name, reading in readings.items():
            records = [cells.find(reading.model, task, shots) for shots in (reading.best_shots, "max")]
            if all(records):
                at_best, at_max = (_mean_share([record.queries.predicted for record in own]) for own in records)
                shares[name] = {"at_best_shots": at_best, "at_max": at_max}
        if shares:
            found[task] = {"right": _mean_share([gold]), "methods": shares}
    return found


def _mean_share(answers: Sequence[Sequence[int]]) -> float:
    """The share of the commonest of each sequence of labels, mean over sequences."""
    return round(statistics.fmean(max(Counter(own).values()) / len(own) for own in answers), 3)


def _snapshots(results: StudyResults, reading: Reading) -> list[ModelFacts]:
    """The weights on the way to those that are read, and these, by updates."""
    final = results.model_facts(reading.model)
    own = [facts for facts in results.models if final and _is_snapshot_of(facts, final)]
    return sorted(own, key=lambda facts: facts.updates)


def _is_snapshot_of(facts: ModelFacts, final: ModelFacts) -> bool:
    return (facts.method, facts.setting, facts.training_seed, facts.task) == (
        final.method,
        final.setting,
        final.training_seed,
        final.task,
    )
