"""Looking at examples before they are posted: lines that cannot be used, leaks, duplicates, labels, and what would fit.

In: the text of a training file. Out: what a job would make of it, and every problem with its line. Nothing is computed by the
model and nothing is kept.
"""

import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from pydantic import BaseModel, Field

from manyicl.errors import OverloadedError, TaskError, UserInputError
from manyicl.serving.backends import Backend, TaskSpec
from manyicl.serving.errors import ApiError
from manyicl.serving.schemas import Request
from manyicl.serving.service import Deadline, OwnedNow, ServiceNow, until, while_connected
from manyicl.serving.settings import Limits
from manyicl.serving.threads import run_whole
from manyicl.serving.training_files import TrainingFile, find_lone_answer, infer_labels, read_training_file, shuffle_examples
from manyicl.tasks.checks import check_task
from manyicl.tasks.tables import RowError
from manyicl.tasks.task import Example, Task

router = APIRouter(prefix="/v1", tags=["tasks"])

_FILE = "examples.jsonl"
_MAX_PROBLEMS = 200
_MAX_LABEL_COUNTS = 1000
_RETRY_SECONDS = 2.0

Severity = Literal["error", "warning"]


class ExamplesToCheck(Request):
    """Examples as they would stand in a training file."""

    text: Annotated[str, Field(min_length=1, max_length=64 * 2**20, description="Lines of a training file.")]
    labels: Annotated[list[Annotated[str, Field(min_length=1, max_length=1000)]], Field(max_length=1000)] | None = Field(
        default=None, description="The label set, as a job would be given it."
    )


class Problem(BaseModel):
    """Something found in the examples. A job fails at an error; a warning deserves a look."""

    severity: Severity
    kind: Annotated[str, Field(description="What it is, in two or three words.")]
    message: str
    line: Annotated[int | None, Field(description="Line of the text, from 1; none where it concerns the whole.")]


class LabelCount(BaseModel):
    """A label and the number of its examples."""

    label: str
    count: int


class ExamplesCheck(BaseModel):
    """What a job would make of examples."""

    object: Literal["examples.check"] = "examples.check"
    is_usable: Annotated[bool, Field(description="Whether a job with these examples would succeed.")]
    problems: Annotated[list[Problem], Field(description=f"Errors first, then by line; at most {_MAX_PROBLEMS}.")]
    num_errors: int
    num_warnings: int
    num_examples: Annotated[int, Field(description="Examples that can be used.")]
    instruction: str
    labels: Annotated[list[LabelCount], Field(description="Empty where answers are free text.")]
    num_fitting: Annotated[int, Field(description="Examples that would stand in the context.")]
    prefix_tokens: Annotated[int, Field(description="Tokens that these take.")]
    context_tokens: Annotated[int, Field(description="Tokens that the model has room for.")]


@dataclass
class Checked:
    """What is known of examples without the model."""

    training: TrainingFile
    labels: tuple[str, ...]
    problems: list[Problem]


def check_text_of_examples(text: str, labels: Sequence[str] | None, limits: Limits) -> Checked:
    """The usable examples of a training file's text, their labels, and what is wrong with it.

    Args:
        labels: The label set; None finds it as a job does.
    """
    broken: list[RowError] = []
    problems: list[Problem] = []
    training = TrainingFile(())
    num_lines = sum(1 for line in text.split("\n") if line.strip())
    if num_lines > limits.max_examples:
        message = f"holds {num_lines} lines; a task takes {limits.max_examples}. Post fewer."
        return Checked(training, (), [_problem("error", "whole text", message)])
    with tempfile.TemporaryDirectory(prefix="manyicl-check-") as folder:
        path = Path(folder) / _FILE
        path.write_bytes(text.encode())
        try:
            training = read_training_file(path, name=_FILE, limits=limits, problems=broken)
        except TaskError as error:
            problems.append(_problem("error", "whole text", str(error).removeprefix(f"{_FILE}: ")))
        problems += [_problem("error", error.kind, error.problem, error.source) for error in broken]
        if not training.examples:
            return Checked(training, (), problems)
        found = _find_labels(training.examples, labels, problems)
        family: Literal["classification", "qa"] = "classification" if found else "qa"
        metric: Literal["accuracy", "token_f1"] = "accuracy" if found else "token_f1"
        task = Task(_FILE, family, metric, training.examples, (), found, training.instruction)
        for finding in check_task(task):
            message = finding.message.replace(f"{path}:", "line ")
            problems.append(_problem(finding.severity, finding.kind, message, finding.source))
    return Checked(training, found, problems)


def _problem(severity: Severity, kind: str, message: str, source: str = "") -> Problem:
    """A problem whose message begins like a sentence."""
    line = source.rpartition(":")[2]
    return Problem(
        severity=severity, kind=kind, message=message[:1].upper() + message[1:], line=int(line) if line.isdecimal() else None
    )


def _find_labels(examples: Sequence[Example], given: Sequence[str] | None, problems: list[Problem]) -> tuple[str, ...]:
    """The label set that a job would use; what is odd about it is added to `problems`."""
    if given is not None:
        return tuple(given)
    answers = Counter(example.answer for example in examples)
    try:
        labels = infer_labels(examples)
    except TaskError as error:
        folded = Counter(answer.casefold() for answer in answers)
        rarest = min((answer for answer in answers if folded[answer.casefold()] > 1), key=answers.__getitem__)
        source = next(example.source for example in examples if example.answer == rarest)
        problems.append(_problem("error", "labels differ in case", str(error), source))
        return tuple(sorted(answers))
    if labels:
        return labels
    lone = find_lone_answer(examples)
    if lone is not None:
        problems.append(_problem("warning", "free text or labels", lone[1], lone[0].source))
    return ()


async def plan_examples(checked: Checked, backend: Backend) -> tuple[int, int]:
    """How many examples would stand in the context, and their tokens; what stays out is added to the problems."""
    if not checked.training.examples:
        return 0, 0
    examples = shuffle_examples(checked.training.examples, seed=0)
    spec = TaskSpec("0" * 32, examples, checked.labels, checked.training.instruction)
    try:
        planned = await backend.plan(spec)
    except UserInputError as error:
        checked.problems.append(_problem("error", "does not fit", str(error)))
        return 0, 0
    if planned.left_out:
        position, reason = planned.left_out[0]
        message = f"{len(planned.left_out)} of {len(examples)} examples would not be in the context; of this one, {reason}"
        checked.problems.append(_problem("warning", "left out", message, examples[position].source))
    return planned.num_used, planned.prefix_tokens


@router.post("/examples/check")
async def check_examples(
    request: HttpRequest, body: ExamplesToCheck, owned: OwnedNow, service: ServiceNow, deadline: Deadline
) -> ExamplesCheck:
    """What a job would make of examples, and what is wrong with them, before they are posted."""
    labels = None if body.labels is None else tuple(dict.fromkeys(label.strip() for label in body.labels))
    if labels and ("" in labels or len(labels) == 1):
        raise ApiError(400, "Give two labels or more, none of them empty.", code="invalid_value", param="labels")
    if service.checks.locked():
        message = "As many examples as can be at once are being checked. Try again in a moment."
        raise OverloadedError(message, retry_after_seconds=_RETRY_SECONDS)

    async def check() -> ExamplesCheck:
        async with service.checks:
            checked = await run_whole(check_text_of_examples, body.text, labels, service.limits)
            num_fitting, prefix_tokens = await plan_examples(checked, service.backend)
        return _show_check(checked, num_fitting, prefix_tokens, service.backend.context_tokens)

    return await while_connected(request, until(deadline, check()))


def _show_check(checked: Checked, num_fitting: int, prefix_tokens: int, context_tokens: int) -> ExamplesCheck:
    problems = sorted(checked.problems, key=lambda problem: (problem.severity, problem.line or 0))
    num_errors = sum(problem.severity == "error" for problem in problems)
    return ExamplesCheck(
        is_usable=not num_errors and bool(checked.training.examples),
        problems=problems[:_MAX_PROBLEMS],
        num_errors=num_errors,
        num_warnings=len(problems) - num_errors,
        num_examples=len(checked.training.examples),
        instruction=checked.training.instruction,
        labels=_count_labels(checked.training.examples, checked.labels),
        num_fitting=num_fitting,
        prefix_tokens=prefix_tokens,
        context_tokens=context_tokens,
    )


def _count_labels(examples: Iterable[Example], labels: Sequence[str]) -> list[LabelCount]:
    """Labels and the number of their examples, in the order of the label set."""
    counts = Counter(example.answer for example in examples)
    return [LabelCount(label=label, count=counts[label]) for label in labels[:_MAX_LABEL_COUNTS]]
