"""Addresses beyond OpenAI's: label probabilities in batches, appending examples, what a task is made of, and how good it is."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Path, Query, Request, Response

from manyicl.errors import UserInputError
from manyicl.serving.backends import Prepared, Scored, TaskSpec
from manyicl.serving.database import TaskRow
from manyicl.serving.errors import ApiError
from manyicl.serving.measuring import MIN_CALIBRATION, Measured, Scores, Split, measure, temper
from manyicl.serving.schemas import PromptDetails, Usage
from manyicl.serving.service import (
    Deadline,
    OwnedNow,
    Served,
    Service,
    ServiceNow,
    find_served,
    find_task,
    in_thread,
    until,
    while_connected,
)
from manyicl.serving.task_schemas import (
    Classification,
    Classified,
    ClassifyRequest,
    CurvePoint,
    CurveQuery,
    LeftOut,
    NewExamples,
    Quality,
    QualityRequest,
    ShotCurve,
    TaskFacts,
)
from manyicl.serving.threads import run_whole
from manyicl.serving.training_files import check_labels, check_text
from manyicl.tasks.task import Example

router = APIRouter(prefix="/v1", tags=["tasks"])

_ALL = 10**7
Name = Annotated[str, Path(description="Name of a task.")]


def show_task(row: TaskRow, service: Service) -> TaskFacts:
    """A task as clients see it."""
    left_out = [
        LeftOut(position=position, reason=reason, line=line[0] if line else None)  # Rows of before had none.
        for position, reason, *line in row.left_out
    ]
    return TaskFacts(
        id=row.name or "",
        created_at=row.created_at,
        labels=row.labels,
        instruction=row.instruction,
        num_examples=row.num_examples,
        num_shots=row.num_used,
        prefix_tokens=row.prefix_tokens,
        computed_tokens=row.computed_tokens,
        prefill_seconds=row.prefill_seconds,
        temperature=row.temperature,
        context_tokens=service.backend.context_tokens,
        left_out=left_out,
        num_left_out=row.num_examples - row.num_used,
    )


@router.post("/classify", response_model=Classification)
async def classify(request: Request, body: ClassifyRequest, owned: OwnedNow, service: ServiceNow, deadline: Deadline) -> Response:
    """The most probable label of each input, with probabilities."""
    served = await find_served(service, owned, body.model)
    if not served.spec.labels:
        message = f"'{body.model}' has no labels; its answers are free text. Ask /v1/chat/completions."
        raise ApiError(400, message, code="no_labels", param="model")
    inputs = [body.input] if isinstance(body.input, str) else body.input
    if len(inputs) > service.limits.max_inputs:
        message = f"{len(inputs)} inputs; at most {service.limits.max_inputs} are taken at once."
        raise ApiError(400, message, code="too_many_inputs", param="input")
    num_told = min(body.top_labels or len(served.spec.labels), len(served.spec.labels))
    if len(inputs) * num_told > service.limits.max_probabilities:
        most = service.limits.max_probabilities
        message = f"{len(inputs)} inputs with {num_told} labels each; at most {most} probabilities are told at once. "
        raise ApiError(400, message + "Send fewer inputs, or give top_labels.", code="too_many_probabilities", param="top_labels")
    texts = [check_input(text, f"input.{place}", service) for place, text in enumerate(inputs)]
    scored = await while_connected(request, service.backend.score(served.spec, texts, deadline=deadline))
    content = await in_thread(write_classification, served, scored, num_told)
    return Response(content, media_type="application/json")


def write_classification(served: Served, scored: Scored, num_told: int) -> str:
    """The answer as JSON, of which the event loop should not make much."""
    temperature = served.row.temperature if served.row is not None else 1.0
    probabilities = np.exp(temper(np.asarray(scored.log_probabilities, dtype=np.float64), temperature))
    data = [show_scores(served.spec, place, own, scored.num_shots[place], num_told) for place, own in enumerate(probabilities)]
    cached, computed = sum(scored.cached_tokens), sum(scored.computed_tokens)
    usage = Usage(
        prompt_tokens=cached + computed,
        completion_tokens=0,
        total_tokens=cached + computed,
        prompt_tokens_details=PromptDetails(cached_tokens=cached),
    )
    return Classification(model=served.name, data=data, usage=usage).model_dump_json()


def check_input(text: str, param: str, service: Service) -> str:
    """An input with its ends stripped, as in training files.

    Raises:
        ApiError: it is empty or too long.
    """
    try:
        return check_text(text, what="the input", limits=service.limits)
    except UserInputError as error:
        raise ApiError(400, f"{param}: {error}", code="invalid_value", param=param) from error


def show_scores(spec: TaskSpec, place: int, probabilities: Scores, num_shots: int, num_told: int) -> Classified:
    """The labels of one input, the most probable first."""
    order = np.argsort(-probabilities, kind="stable")[:num_told].tolist()
    return Classified(
        index=place,
        label=spec.labels[order[0]],
        probability=float(probabilities[order[0]]),
        probabilities={spec.labels[index]: float(probabilities[index]) for index in order},
        num_shots=num_shots,
    )


@router.get("/tasks/{name}")
async def get_task(request: Request, name: Name, owned: OwnedNow, service: ServiceNow, deadline: Deadline) -> TaskFacts:
    """What a task is made of, and what it costs."""
    served = await find_task(service, owned, name)
    row, identity = _row_of(served), service.backend.context_identity
    if row.planned_with != identity:  # The service was started anew, with another model, format or context.
        planned = await while_connected(request, until(deadline, service.backend.plan(served.spec)))
        row = await run_whole(owned.append_examples, row, (), planned, planned_with=identity)
    return show_task(row, service)


@router.post("/tasks/{name}/examples")
async def append_examples(
    request: Request, name: Name, body: NewExamples, owned: OwnedNow, service: ServiceNow, deadline: Deadline
) -> TaskFacts:
    """Add examples behind those of a task. Only they are computed; they are kept when this is answered."""
    first = await find_task(service, owned, name)
    async with _changing(service, first.spec.key, deadline):
        served = await find_task(service, owned, name)
        if served.spec.key != first.spec.key:
            message = f"'{name}' was deleted and made again meanwhile. Look at it and try again."
            raise ApiError(409, message, code="task_changed", param="name")
        longer = _lengthen(served, body, service)
        num_old = len(served.spec.examples)
        prepared: Prepared = await while_connected(request, until(deadline, service.backend.extend(longer, num_old)))
        # From here on it is kept, also for a client who leaves; the lock is held until it is.
        added, identity = longer.examples[num_old:], service.backend.context_identity
        row = await run_whole(owned.append_examples, _row_of(served), added, prepared, planned_with=identity)
    return show_task(row, service)


@asynccontextmanager
async def _changing(service: Service, key: str, deadline: float) -> AsyncGenerator[None, None]:
    """Hold the lock of a task, which is waited for until the deadline."""
    lock = service.changes[key]
    await until(deadline, lock.acquire())
    try:
        yield
    finally:
        lock.release()


def _row_of(served: Served) -> TaskRow:
    assert served.row is not None
    return served.row


def _lengthen(served: Served, body: NewExamples, service: Service) -> TaskSpec:
    """A task with further examples.

    Raises:
        ApiError: they are not as they have to be, or the task is not as the client has it.
    """
    before, limits = _row_of(served), service.limits
    if body.after is not None and body.after != before.num_examples:
        message = f"'{served.name}' has {before.num_examples} examples, not {body.after}. Look at it and try again."
        raise ApiError(409, message, code="task_changed", param="after")
    if before.num_examples + len(body.examples) > limits.max_examples:
        message = f"'{served.name}' would have more than {limits.max_examples} examples."
        raise ApiError(400, message, code="too_many_examples", param="examples")
    try:
        added = tuple(
            Example(
                check_text(new.input, what="the input", limits=limits), check_text(new.answer, what="the answer", limits=limits)
            )
            for new in body.examples
        )
        check_labels(added, served.spec.labels)
    except UserInputError as error:
        raise ApiError(400, str(error), code="invalid_value", param="examples") from error
    return replace(served.spec, examples=served.spec.examples + added)


@router.post("/tasks/{name}/quality")
async def estimate_quality(
    request: Request, name: Name, body: QualityRequest, owned: OwnedNow, service: ServiceNow, deadline: Deadline
) -> Quality:
    """How well a task answers examples that were held out of its context."""
    served = await find_task(service, owned, name)
    work = measure(service, owned, served, Split(body.share, body.seed), deadline=deadline)
    found: Measured = await while_connected(request, until(deadline, work))
    best = found.estimates[-1]
    if body.calibrate:
        if served.row is None or best.temperature is None or found.num_held_out < MIN_CALIBRATION:
            message = f"{found.num_held_out} held-out examples; calibrating takes {MIN_CALIBRATION} of a task with labels."
            raise ApiError(400, message, code="too_few_examples", param="calibrate")
        await in_thread(owned.set_temperature, served.row, best.temperature)
    return Quality(
        model=name,
        metric=found.metric,
        value=best.value,
        low=best.low,
        high=best.high,
        num_held_out=found.num_held_out,
        num_shots=best.num_shots,
        seed=body.seed,
        log_loss=best.log_loss,
        temperature=best.temperature,
        calibrated_log_loss=best.calibrated_log_loss,
    )


@router.get("/tasks/{name}/shot-curve")
async def draw_shot_curve(
    request: Request,
    name: Name,
    owned: OwnedNow,
    service: ServiceNow,
    deadline: Deadline,
    asked: Annotated[CurveQuery, Query()],
) -> ShotCurve:
    """Quality by the number of demonstrations, on one held-out share."""
    served = await find_task(service, owned, name)
    if not served.spec.labels:
        raise ApiError(400, f"'{name}' has no labels; a curve of free text is not drawn.", code="no_labels", param="name")
    counts = tuple(_ALL if part == "max" else int(part) for part in asked.shots.split(","))
    work = measure(service, owned, served, Split(asked.share, asked.seed, counts), deadline=deadline)
    found: Measured = await while_connected(request, until(deadline, work))
    points = [
        CurvePoint(num_shots=point.num_shots, value=point.value, low=point.low, high=point.high) for point in found.estimates
    ]
    return ShotCurve(model=name, metric=found.metric, num_held_out=found.num_held_out, seed=asked.seed, points=points)
