"""What the sections of a report draw on: a study's results with its claims, and how methods are called and drawn."""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from manyicl.records import EvaluationRecord, Shots, shot_order
from manyicl.reporting.charts import Axis
from manyicl.results.claims import make_claims
from manyicl.results.contrasts import Cells
from manyicl.results.files import StudyResults
from manyicl.results.readings import BASE_METHOD, OURS, ZERO_SHOT, final_models

DEDICATED = ("dedicated_prefix", "dedicated_full")
NUM_DRAWS = 500  # Of the intervals that only figures show; those of claims take more.

_LABELS = {
    OURS: "many-shot, all answers (ours)",
    BASE_METHOD: "no tuning",
    "few_shot_5": "few-shot tuning (5)",
    "few_shot_16": "few-shot tuning (16)",
    ZERO_SHOT: "zero-shot tuning",
    "last_answer": "many-shot, last answer",
    "reweighted": "many-shot, reweighted",
    "classic": "TF-IDF, no language model",
    "dedicated_prefix": "dedicated, same demonstrations",
    "dedicated_full": "dedicated, whole train split",
}


def method_label(method: str) -> str:
    """A method in words; a variant by its own name."""
    if method.startswith("dedicated_") and method.rpartition("_")[2].isdecimal():
        return f"dedicated, {method.rpartition('_')[2]} examples"
    return _LABELS.get(method, method.replace("_", " "))


def in_sentence(method: str) -> str:
    """A method as a sentence names it."""
    return "ours" if method == OURS else method_label(method)


class Findings:
    """A study's results, with claims made where none were written.

    Args:
        results: What `read_results` returns.
    """

    def __init__(self, results: StudyResults) -> None:
        self.results = results
        self.cells = Cells(results.records)
        self.claims: dict[str, Any] = results.claims or make_claims(results)
        self.recipe = results.recipe

    @cached_property
    def models(self) -> dict[str, str]:
        """The weights by which each method is judged, ours first, then those it is compared with, in a fixed order."""
        found = final_models(self.results)
        order = [*_LABELS, *sorted(found)]
        return {method: found[method] for method in sorted(found, key=order.index)}

    @cached_property
    def shots(self) -> list[Shots]:
        """Shot counts of the study, ascending."""
        known = self.recipe.get("shots") or {record.shots for record in self.results.records if not record.condition}
        return sorted(known, key=shot_order)

    def readings(self) -> Mapping[str, Mapping[str, Any]]:
        """What the claims hold of each method that was read on the validation tasks."""
        found: Mapping[str, Mapping[str, Any]] = self.claims.get("methods", {})
        return found

    def claim(self, name: str) -> Any:
        """A claim; None while it waits for cells."""
        return self.claims.get("claims", {}).get(name)

    def best_shots(self, method: str) -> Shots:
        """The shots at which a method is read: its best on the validation tasks, or max where these are not evaluated."""
        reading = self.readings().get(method)
        return reading["best_shots"] if reading else "max"

    def style(self, method: str) -> int:
        """The number of a method's colour, dash and marker."""
        if method in _LABELS:
            return list(_LABELS).index(method)
        others = sorted(name for name in self.models if name not in _LABELS)
        return len(_LABELS) + (others.index(method) if method in others else 0)

    def families(self) -> dict[str, list[str]]:
        """Held-out tasks by family, math last."""
        found: dict[str, list[str]] = {}
        for name in [*self.cells.tasks_of("held_out"), *self.cells.tasks_of("held_out", math=True)]:
            found.setdefault(self.cells.tasks[name].family, []).append(name)
        return dict(sorted(found.items(), key=lambda item: (item[0] == "math", item[0])))

    def cells_with(self, status: str) -> int:
        """How many cells are done, failed or open."""
        return sum(cell.status == status for cell in self.results.cells)


def shots_axis(shots: Sequence[Shots], label: str) -> tuple[Axis, dict[Shots, float]]:
    """A logarithmic scale of shots, with 0 to its left and `max` to its right, and the place of each count."""
    places: dict[Shots, float] = {}
    last, smallest = 0.0, min((count for count in shots if count != "max" and count > 0), default=1)
    for count in sorted(shots, key=shot_order):
        if count == "max":
            places[count] = last + 1.6 if places else 0.0
        elif count > 0:
            places[count] = (1.6 if 0 in shots else 0.0) + math.log2(count / smallest)
        else:
            places[count] = 0.0
        last = places[count]
    ticks = tuple((place, str(count)) for count, place in places.items())
    return Axis(label, -0.3, max(places.values(), default=0.0) + 0.3, ticks), places


def demonstrations_at_max(records: Sequence[EvaluationRecord]) -> tuple[int, int] | None:
    """The fewest and the most demonstrations that `max` stood for; None where it was not evaluated."""
    counts = [record.num_demonstrations for record in records if record.shots == "max" and not record.condition]
    return (min(counts), max(counts)) if counts else None
