"""The second reading: label scores calibrated by inputs of random words of the demonstrations (see `calibration`).

Records of it carry the condition `calibrated` and are there for label tasks. A second set of weights is made up for each model,
whose records are the calibrated ones on label tasks and the plain ones on all others; it competes with the plain one on the
validation tasks, so that whether scores are calibrated is chosen like the number of shots.
"""

from collections.abc import Sequence

from manyicl.records import EvaluationRecord

CALIBRATED = "calibrated"


def calibrated_model(model: str) -> str:
    """The name under which a model's calibrated reading stands."""
    return f"{model}+{CALIBRATED}"


def with_calibrated(records: Sequence[EvaluationRecord]) -> list[EvaluationRecord]:
    """The records, and for each model with calibrated ones another model: see the module's first lines."""
    calibrated = {
        (record.model, record.task, record.shots, record.seed): record for record in records if record.condition == CALIBRATED
    }
    models = {record.model for record in calibrated.values()}
    tasks = {record.task for record in calibrated.values()}
    made = []
    for record in records:
        if record.condition or record.model not in models:
            continue
        own = calibrated.get((record.model, record.task, record.shots, record.seed))
        if own is None and record.task in tasks:
            continue  # Not evaluated yet: a cell that is missing, not one that is plain.
        made.append((own or record).model_copy(update={"model": calibrated_model(record.model), "condition": ""}))
    return [*records, *made]
