"""The second reading: label scores calibrated by inputs of random words of the demonstrations (see `calibration`).

Records of it carry the condition `calibrated` and are there for label tasks. A second set of weights is made up for each model,
whose records are the calibrated ones on label tasks and the plain ones on all others; it competes with the plain one on the
validation tasks, so that whether scores are calibrated is chosen like the number of shots.
"""

from collections.abc import Sequence

from manyicl.records import EvaluationRecord, Shots

CALIBRATED = "calibrated"


def calibrated_model(model: str) -> str:
    """The name under which a model's calibrated reading stands."""
    return f"{model}+{CALIBRATED}"


def is_calibrated(model: str) -> bool:
    """Whether a name is that of a calibrated reading."""
    return model.endswith(f"+{CALIBRATED}")


def with_calibrated(records: Sequence[EvaluationRecord]) -> list[EvaluationRecord]:
    """The records, and for each model with calibrated ones another model: see the module's first lines.

    Where a task was calibrated for some model, one that has no calibrated record of it lacks the task.
    """
    calibrated = {_cell(record): record for record in records if record.condition == CALIBRATED}
    models = {record.model for record in calibrated.values()}
    tasks = {record.task for record in calibrated.values()}
    made = []
    for record in records:
        if record.condition or record.model not in models:
            continue
        own = calibrated.get(_cell(record))
        if own is not None or record.task not in tasks:
            made.append((own or record).model_copy(update={"model": calibrated_model(record.model), "condition": ""}))
    return [*records, *made]


def _cell(record: EvaluationRecord) -> tuple[str, str, Shots, int]:
    return record.model, record.task, record.shots, record.seed
