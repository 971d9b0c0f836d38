"""What a study's results say of each claim, with intervals: made from records alone, by code that was there before them.

A method is read at the shot count that is best for it on the validation tasks (its own best shots), and at max. The headline is
the mean over held-out tasks in a family, then over families, without math. Few-shot tuning is the better of its variants on the
validation tasks. A second reading, where it was evaluated, lets each method be calibrated if that is better for it on the
validation tasks (see `calibrated`); the first stands beside it. See `contrasts` for intervals.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from manyicl.records import EvaluationRecord, Shots
from manyicl.results.calibrated import CALIBRATED, calibrated_model, is_calibrated, with_calibrated
from manyicl.results.causes import (
    budget_curves,
    differences_by_seed,
    find_causes,
    models_by_seed,
    one_label_shares,
    spread_over_training_seeds,
)
from manyicl.results.contrasts import (
    Cells,
    TaskTerms,
    Term,
    estimate,
    task_estimate,
    terms_at,
    verdict,
    without_each,
    worst_order,
)
from manyicl.results.dedicated import dedicated_claim, overtaking
from manyicl.results.files import StudyResults
from manyicl.results.forgetting_card import forgetting_card
from manyicl.results.readings import BASE_METHOD, FEW_SHOT, OURS, ZERO_SHOT, Reading, better_few_shot, final_models, read_method

AIMS = {"few_shot": 5.0, "zero_shot": 8.0}


def make_claims(results: StudyResults) -> dict[str, Any]:
    """Every claim that the records suffice for; one that waits for cells says so under `waiting`."""
    cells = Cells(results.records)
    models = final_models(results)
    shots: list[Shots] = list(results.recipe.get("shots", []))
    readings = {name: reading for name, model in models.items() if (reading := read_method(cells, name, model, shots))}
    few_shot = better_few_shot(readings)
    differences = compare_all(cells, readings)
    claims: dict[str, Any] = differences | {
        "approaches_dedicated": dedicated_claim(cells, readings[OURS].model, readings[OURS].best_shots)
        if OURS in readings
        else None,
        "more_shots_help": compare_slopes(cells, readings, shots),
        "forgets_less": forgetting_card(results, cells, models),
    }
    methods = {name: method_summary(cells, reading, shots) for name, reading in readings.items()}
    return {
        "methods": methods,
        "claims": {name: claim for name, claim in claims.items() if claim},
        "waiting": sorted(name for name, claim in claims.items() if not claim),
        "few_shot_variant": few_shot.method if few_shot else None,
        "training_seeds": spread_over_training_seeds(results, cells),
        "budget_curves": budget_curves(results, cells, readings),
        "family": family_claim(results, cells, readings, few_shot),
        "overtaking": overtaking(cells, readings[OURS].model) if OURS in readings else [],
        "second_reading": second_reading(results, readings, shots),
        "variants": compare_variants(results, cells, readings),
        "pairs": compare_pairs(cells, readings, differences),
        "causes": find_causes(results, cells, readings, methods),
    }


def compare_all(cells: Cells, readings: Mapping[str, Reading]) -> dict[str, Any]:
    """Ours against each method that a claim names; None where one is not evaluated."""
    ours = readings.get(OURS)
    return {
        "beats_few_shot": compare(cells, ours, better_few_shot(readings), aim=AIMS["few_shot"]),
        "beats_zero_shot": compare(cells, ours, readings.get(ZERO_SHOT), aim=AIMS["zero_shot"]),
        "beats_base": compare(cells, ours, readings.get(BASE_METHOD), aim=None),
        "beats_last_answer": compare(cells, ours, readings.get("last_answer"), aim=None),
    }


def compare_pairs(
    cells: Cells, readings: Mapping[str, Reading], differences: Mapping[str, Mapping[str, Any] | None]
) -> dict[str, dict[str, Any]]:
    """Ours less every other method, and every tuned method less the one that is not, whatever the claims name.

    Args:
        differences: What `compare_all` found for these readings; a pair that is among them is not estimated again.
    """
    known = {
        claim["against"]: {name: claim[name] for name in ("at_best_shots", "at_max")} for claim in differences.values() if claim
    }
    found: dict[str, dict[str, Any]] = {}
    for group, left, right in (
        ("ours_less", [OURS], [name for name in readings if name != OURS]),
        ("less_untuned", [name for name in readings if name not in (BASE_METHOD, "classic")], [BASE_METHOD]),
    ):
        found[group] = {}
        for one, other in itertools.product(left, right):
            key = other if group == "ours_less" else one
            if one == OURS and other in known:
                found[group][key] = known[other]
            elif terms := _at_both(cells, readings.get(one), readings.get(other)):
                found[group][key] = {name: estimate(own).as_json() for name, own in terms.items()}
    return found


def compare_variants(results: StudyResults, cells: Cells, readings: Mapping[str, Reading]) -> dict[str, Any]:
    """Each variant of an ablation less the method it is one of, on held-out tasks: at the best shots of each, and at max."""
    variants = results.recipe.get("variants", {})
    found = {
        name: compare(cells, readings.get(name), readings.get(variant["method"]), aim=None) for name, variant in variants.items()
    }
    return {name: claim for name, claim in found.items() if claim}


def second_reading(results: StudyResults, readings: Mapping[str, Reading], shots: Sequence[Shots]) -> dict[str, Any] | None:
    """The comparisons with each method calibrated where that is better on the validation tasks.

    None until all cells of the first training seed are done; further seeds are read as was chosen with the first.
    """
    further = tuple(f"seed-{seed}" for seed in (results.recipe.get("training_seeds") or {}).get("values", ()))
    asked = [cell for cell in results.cells if cell.kind == CALIBRATED and not cell.cell.rpartition("/")[0].endswith(further)]
    if any(cell.status != "done" for cell in asked):
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
    few_shot, ours = better_few_shot(chosen), chosen.get(OURS)
    differences = compare_all(cells, chosen)
    return {
        "calibrated_validation": validation,
        "approaches_dedicated": dedicated_claim(cells, ours.model, ours.best_shots) if ours else None,
        "one_label": one_label_shares(cells, chosen),
        "methods": {name: method_summary(cells, reading, shots) for name, reading in chosen.items()},
        "claims": {name: claim for name, claim in differences.items() if claim},
        "pairs": compare_pairs(cells, chosen, differences),
        "more_shots_help": compare_slopes(cells, chosen, shots),
        "few_shot_variant": few_shot.method if few_shot else None,
        "by_seed": differences_by_seed(_read_by_seed(results, chosen), cells, [name for name in chosen if name != OURS]),
    }


def _read_by_seed(results: StudyResults, chosen: Mapping[str, Reading]) -> dict[str, dict[int, str]]:
    """The final weights of each method by training seed, calibrated where the method is read so."""
    found = {}
    for name, models in models_by_seed(results).items():
        is_read_so = name in chosen and is_calibrated(chosen[name].model)
        found[name] = {seed: calibrated_model(model) if is_read_so else model for seed, model in models.items()}
    return found


def compare(cells: Cells, ours: Reading | None, other: Reading | None, *, aim: float | None) -> dict[str, Any] | None:
    """The difference of two methods on held-out tasks, in points: each at its best shots, and both at max."""
    terms = _at_both(cells, ours, other)
    if ours is None or other is None or terms is None:
        return None
    at_best, at_max = terms["at_best_shots"], terms["at_max"]
    found = estimate(at_best)
    return {
        "against": other.method,
        "at_best_shots": found.as_json(),
        "at_max": estimate(at_max).as_json(),
        "without_task": {name: without_each(own) for name, own in terms.items()},
        "best_shots": {ours.method: ours.best_shots, other.method: other.best_shots},
        "by_task": {task: task_estimate(terms).as_json() for task, terms in at_best.items()},
        "aim": aim,
        "verdict": verdict(found),
    }


def _at_both(cells: Cells, ours: Reading | None, other: Reading | None) -> dict[str, TaskTerms] | None:
    """The contrast of two methods on the held-out tasks, each at its best shots, and both at max; None where one is missing."""
    if ours is None or other is None:
        return None
    tasks = cells.tasks_of("held_out")
    found = {
        "at_best_shots": terms_at(cells, tasks, [(1.0, ours.model, ours.best_shots), (-1.0, other.model, other.best_shots)]),
        "at_max": terms_at(cells, tasks, [(1.0, ours.model, "max"), (-1.0, other.model, "max")]),
    }
    return found if all(found.values()) else None


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
    for method in (OURS, BASE_METHOD):
        if method not in readings:
            return None
        model = readings[method].model
        found = {task: _slope_terms([cells.find(model, task, count) for count in counts]) for task in tasks}
        if not tasks or not all(found.values()):
            return None
        slopes[method] = found
    difference = {
        task: [*slopes[OURS][task], *(Term(-term.weight, term.records) for term in slopes[BASE_METHOD][task])] for task in tasks
    }
    own, base, gained = (estimate(terms) for terms in (slopes[OURS], slopes[BASE_METHOD], difference))
    return {
        OURS: own.as_json(),
        BASE_METHOD: base.as_json(),
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


def family_claim(
    results: StudyResults, cells: Cells, readings: Mapping[str, Reading], few_shot: Reading | None
) -> dict[str, Any] | None:
    """Ours less few-shot tuning where a whole family was left out of the training, at max and at the shots of the main setting.

    Returns:
        The claim is at max, against the variant that validation tasks choose, as everywhere; `by_method` holds the difference to
        each. `at_best_shots` is at the shots that `readings` have; None where one has none, or was not evaluated there.
    """
    finals = {facts.method: facts.model for facts in results.models if facts.is_final and facts.setting == "family"}
    setting = results.recipe.get("held_out_family") or {}
    held_out = setting.get("held_out", [])
    by_method: dict[str, dict[str, Any]] = {}
    for other in (name for name in FEW_SHOT if OURS in finals and name in finals):
        terms = terms_at(cells, held_out, [(1.0, finals[OURS], "max"), (-1.0, finals[other], "max")])
        if not terms:
            continue
        found, best = estimate(terms), None
        if OURS in readings and other in readings:
            at = [(sign, finals[name], readings[name].best_shots) for sign, name in ((1.0, OURS), (-1.0, other))]
            best = terms_at(cells, held_out, at)
        by_method[other] = {
            "at_max": found.as_json(),
            "at_best_shots": estimate(best).as_json() if best else None,
            "by_task": {task: task_estimate(own).as_json() for task, own in terms.items()},
            "verdict": verdict(found),
        }
    if few_shot is None or few_shot.method not in by_method:
        return None
    chosen = by_method[few_shot.method]
    return {"family": setting.get("family"), "against": few_shot.method, **chosen, "by_method": by_method}
