"""How each method of a study is read: which weights, and at which number of shots, as the validation tasks choose it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from manyicl.records import Shots, shot_order
from manyicl.results.contrasts import Cells, headline_value, terms_at
from manyicl.results.files import BASE, StudyResults

OURS = "all_answers"
BASE_METHOD = "in_context"
FEW_SHOT = ("few_shot_5", "few_shot_16")
ZERO_SHOT = "zero_shot"


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


def better_few_shot(readings: Mapping[str, Reading]) -> Reading | None:
    """The variant of few-shot tuning with the higher score on the validation tasks."""
    own = [readings[name] for name in FEW_SHOT if name in readings]
    return max(own, key=lambda reading: reading.validation[reading.best_shots], default=None)
