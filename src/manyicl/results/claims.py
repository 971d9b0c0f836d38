"""What a study's results say of each claim, with intervals: made from records alone, by code that was there before them.

A method is read at the shot count that is best for it on the validation tasks (its own best shots), and at max. The headline is
the mean over held-out tasks in a family, then over families, without math. Few-shot tuning is the better of its variants on the
validation tasks. A second reading, where it was evaluated, lets each method be calibrated if that is better for it on the
validation tasks (see `calibrated`); the first stands beside it. See `contrasts` for intervals.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from manyicl.records import EvaluationRecord, Shots, shot_order
from manyicl.results.calibrated import CALIBRATED, calibrated_model, with_calibrated
from manyicl.results.contrasts import (
    Cells,
    TaskTerms,
    Term,
    estimate,
    headline_value,
    task_estimate,
    terms_at,
    verdict,
    worst_order,
)
from manyicl.results.dedicated import dedicated_claim, overtaking
from manyicl.results.files import BASE, ModelFacts, StudyResults
from manyicl.results.forgetting_card import forgetting_card

OURS = "all_answers"
FEW_SHOT = ("few_shot_5", "few_shot_16")
ZERO_SHOT = "zero_shot"
AIMS = {"few_shot": 5.0, "zero_shot": 8.0}


@dataclass(frozen=True)
class Reading:
    """How a method is read: which weights, and at which shots.

    Attributes:
        validation: Headline on the validation tasks by shots, in points.
    """

    method: str
    model: str
    best_shots: Shots
    validation: dict[Shots, float]


def make_claims(results: StudyResults) -> dict[str, Any]:
    """Every claim that the records suffice for; one that waits for cells says so under `waiting`."""
    cells = Cells(results.records)
    models = final_models(results)
    shots: list[Shots] = list(results.recipe.get("shots", []))
    readings = {name: reading for name, model in models.items() if (reading := read_method(cells, name, model, shots))}
    few_shot = better_few_shot(readings)
    claims: dict[str, Any] = compare_all(cells, readings) | {
        "approaches_dedicated": dedicated_claim(cells, readings[OURS].model, readings[OURS].best_shots)
        if OURS in readings
        else None,
        "more_shots_help": compare_slopes(cells, readings, shots),
        "forgets_less": forgetting_card(results, cells, models),
    }
    return {
        "methods": {name: method_summary(cells, reading, shots) for name, reading in readings.items()},
        "claims": {name: claim for name, claim in claims.items() if claim},
        "waiting": sorted(name for name, claim in claims.items() if not claim),
        "few_shot_variant": few_shot.method if few_shot else None,
        "training_seeds": spread_over_training_seeds(results, cells),
        "budget_curves": budget_curves(results, cells, readings),
        "family": family_claim(results, cells, few_shot),
        "overtaking": overtaking(cells, readings[OURS].model) if OURS in readings else [],
        "second_reading": second_reading(results, readings, shots),
        "variants": compare_variants(results, cells, readings),
    }


def better_few_shot(readings: Mapping[str, Reading]) -> Reading | None:
    """The variant of few-shot tuning with the higher score on the validation tasks."""
    own = [readings[name] for name in FEW_SHOT if name in readings]
    return max(own, key=lambda reading: reading.validation[reading.best_shots], default=None)


def compare_all(cells: Cells, readings: Mapping[str, Reading]) -> dict[str, Any]:
    """Ours against each method that a claim names; None where one is not evaluated."""
    ours = readings.get(OURS)
    return {
        "beats_few_shot": compare(cells, ours, better_few_shot(readings), aim=AIMS["few_shot"]),
        "beats_zero_shot": compare(cells, ours, readings.get(ZERO_SHOT), aim=AIMS["zero_shot"]),
        "beats_base": compare(cells, ours, readings.get("in_context"), aim=None),
        "beats_last_answer": compare(cells, ours, readings.get("last_answer"), aim=None),
    }


def compare_variants(results: StudyResults, cells: Cells, readings: Mapping[str, Reading]) -> dict[str, Any]:
    """Each variant of an ablation less the method it is one of, on held-out tasks: at the best shots of each, and at max."""
    variants = results.recipe.get("variants", {})
    found = {
        name: compare(cells, readings.get(name), readings.get(variant["method"]), aim=None) for name, variant in variants.items()
    }
    return {name: claim for name, claim in found.items() if claim}


def second_reading(results: StudyResults, readings: Mapping[str, Reading], shots: Sequence[Shots]) -> dict[str, Any] | None:
    """The comparisons with each method calibrated where that is better on the validation tasks; None until all cells are done."""
    if any(cell.kind == CALIBRATED and cell.status != "done" for cell in results.cells):
        return None
    cells = Cells(with_calibrated(results.records))
    chosen, validation = {}, {}
    for name, plain in readings.items():
        if name == "classic":  # It has no label scores of a language model.
            chosen[name] = plain
            continue
        other = read_method(cells, name, calibrated_model(plain.model), shots)
        if other is None or len(other.validation) < len(plain.validation):
            return None
        validation[name] = {str(count): round(value, 3) for count, value in other.validation.items()}
        is_better = other.validation[other.best_shots] > plain.validation[plain.best_shots]
        chosen[name] = other if is_better else plain
    if not validation:
        return None
    few_shot = better_few_shot(chosen)
    return {
        "calibrated_validation": validation,
        "methods": {name: method_summary(cells, reading, shots) for name, reading in chosen.items()},
        "claims": {name: claim for name, claim in compare_all(cells, chosen).items() if claim},
        "few_shot_variant": few_shot.method if few_shot else None,
    }


def final_models(results: StudyResults) -> dict[str, str]:
    """The weights by which each method is judged: whole budget, first training seed, all meta-training tasks."""
    finals = [facts for facts in results.models if facts.is_final and facts.setting == "held_out" and not facts.task]
    first = min((facts.training_seed for facts in finals), default=0)
    found = {facts.method: facts.model for facts in finals if facts.training_seed == first}
    if any(record.model == BASE for record in results.records):
        found = {"in_context": BASE} | found
    if any(record.method == "classic" for record in results.records):
        found["classic"] = "classic"
    return found


def read_method(cells: Cells, method: str, model: str, shots: Sequence[Shots]) -> Reading | None:
    """A method's best shots on the validation tasks; None while these are not evaluated."""
    tasks = cells.tasks_of("validation")
    values = {count: headline_value(terms) for count in shots if (terms := terms_at(cells, tasks, [(1.0, model, count)]))}
    if not values:
        return None
    return Reading(method, model, max(values, key=lambda count: (values[count], -shot_order(count))), values)


def compare(cells: Cells, ours: Reading | None, other: Reading | None, *, aim: float | None) -> dict[str, Any] | None:
    """The difference of two methods on held-out tasks, in points: each at its best shots, and both at max."""
    if ours is None or other is None:
        return None
    tasks = cells.tasks_of("held_out")
    at_best = terms_at(cells, tasks, [(1.0, ours.model, ours.best_shots), (-1.0, other.model, other.best_shots)])
    at_max = terms_at(cells, tasks, [(1.0, ours.model, "max"), (-1.0, other.model, "max")])
    if not at_best or not at_max:
        return None
    found = estimate(at_best)
    return {
        "against": other.method,
        "at_best_shots": found.as_json(),
        "at_max": estimate(at_max).as_json(),
        "best_shots": {ours.method: ours.best_shots, other.method: other.best_shots},
        "by_task": {task: task_estimate(terms).as_json() for task, terms in at_best.items()},
        "aim": aim,
        "verdict": verdict(found),
    }


def method_summary(cells: Cells, reading: Reading, shots: Sequence[Shots]) -> dict[str, Any]:
    """A method's held-out results: headline by shots, at its best shots and at max, math apart, worst order."""
    summary: dict[str, Any] = {
        "model": reading.model,
        "best_shots": reading.best_shots,
        "validation": {str(count): round(value, 3) for count, value in reading.validation.items()},
    }
    for name, is_math in (("held_out", False), ("math", True)):
        tasks = cells.tasks_of("held_out", math=is_math)
        curve = {count: terms for count in shots if (terms := terms_at(cells, tasks, [(1.0, reading.model, count)])) and tasks}
        summary[name] = {str(count): estimate(terms).as_json() for count, terms in curve.items()}
        if reading.best_shots in curve and not is_math:
            summary["worst_order"] = round(worst_order(curve[reading.best_shots]), 3)
    return summary


def compare_slopes(cells: Cells, readings: Mapping[str, Reading], shots: Sequence[Shots]) -> dict[str, Any] | None:
    """Points gained per doubling of demonstrations (least squares over the shot counts above zero), tuned and base."""
    counts = [count for count in shots if count != 0]
    tasks = cells.tasks_of("held_out")
    slopes: dict[str, TaskTerms] = {}
    for method in (OURS, "in_context"):
        if method not in readings:
            return None
        model = readings[method].model
        found = {task: _slope_terms([cells.find(model, task, count) for count in counts]) for task in tasks}
        if not tasks or not all(found.values()):
            return None
        slopes[method] = found
    difference = {
        task: [*slopes[OURS][task], *(Term(-term.weight, term.records) for term in slopes["in_context"][task])] for task in tasks
    }
    own, base, gained = (estimate(terms) for terms in (slopes[OURS], slopes["in_context"], difference))
    return {
        OURS: own.as_json(),
        "in_context": base.as_json(),
        "difference": gained.as_json(),
        "verdict": verdict(own),
    }


def _slope_terms(cells: Sequence[Sequence[EvaluationRecord]]) -> list[Term]:
    """The least-squares slope over the logarithm of demonstrations, as weights of cells; none where fewer than two differ."""
    if not all(cells):
        return []
    logs = np.array([np.log2(np.mean([record.num_demonstrations for record in records])) for records in cells])
    centred = logs - logs.mean()
    if not (centred**2).sum() > 0:
        return []
    weights = centred / (centred**2).sum()
    return [Term(float(weight), records) for weight, records in zip(weights, cells, strict=True)]


def spread_over_training_seeds(results: StudyResults, cells: Cells) -> dict[str, dict[str, dict[str, float]]]:
    """The headline of each method by training seed at 0 and max, in points; only where there are several seeds."""
    finals = [facts for facts in results.models if facts.is_final and facts.setting == "held_out" and not facts.task]
    tasks, found = cells.tasks_of("held_out"), {}
    for method in dict.fromkeys(facts.method for facts in finals):
        own = sorted((facts for facts in finals if facts.method == method), key=lambda facts: facts.training_seed)
        by_shots = {
            str(count): {
                str(facts.training_seed): round(headline_value(terms), 3)
                for facts in own
                if (terms := terms_at(cells, tasks, [(1.0, facts.model, count)]))
            }
            for count in (0, "max")
        }
        if len(by_shots["max"]) > 1:
            found[method] = by_shots
    return found


def budget_curves(results: StudyResults, cells: Cells, readings: Mapping[str, Reading]) -> dict[str, list[dict[str, Any]]]:
    """Held-out headline of each snapshot at its method's best shots and at max, beside what it had cost by then."""
    tasks, found = cells.tasks_of("held_out"), {}
    for method, reading in readings.items():
        first = results.model_facts(reading.model)
        if first is None:
            continue
        own = [facts for facts in results.models if _is_snapshot_of(facts, first)]
        points = []
        for facts in sorted(own, key=lambda facts: facts.updates):
            point: dict[str, Any] = facts.model_dump(include={"updates", "tokens", "answers", "target_answers", "seconds"})
            for name, count in (("at_best_shots", reading.best_shots), ("at_max", "max")):
                terms = terms_at(cells, tasks, [(1.0, facts.model, count)])
                point[name] = estimate(terms).as_json() if terms else None
            points.append(point)
        found[method] = points
    return found


def _is_snapshot_of(facts: ModelFacts, final: ModelFacts) -> bool:
    return (facts.method, facts.setting, facts.training_seed, facts.task) == (
        final.method,
        final.setting,
        final.training_seed,
        final.task,
    )


def family_claim(results: StudyResults, cells: Cells, few_shot: Reading | None) -> dict[str, Any] | None:
    """Ours against few-shot tuning where a whole family was left out of the training, at max."""
    finals = {facts.method: facts.model for facts in results.models if facts.is_final and facts.setting == "family"}
    setting = results.recipe.get("held_out_family") or {}
    other = few_shot.method if few_shot else ""
    if OURS not in finals or other not in finals:
        return None
    terms = terms_at(cells, setting.get("held_out", []), [(1.0, finals[OURS], "max"), (-1.0, finals[other], "max")])
    if not terms:
        return None
    found = estimate(terms)
    return {
        "family": setting.get("family"),
        "against": other,
        "at_max": found.as_json(),
        "by_task": {task: task_estimate(own).as_json() for task, own in terms.items()},
        "verdict": verdict(found),
    }
