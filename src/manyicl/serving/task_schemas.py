"""What requests and answers of tasks look like: labels with probabilities, examples, quality and shot curves."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from manyicl.serving.schemas import ModelName, Request, Text, Usage

SHOTS_PATTERN = r"^(max|[0-9]{1,6})(,(max|[0-9]{1,6})){0,11}$"


class ClassifyRequest(Request):
    """Inputs to be labelled."""

    model: ModelName
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=10_000)]
    top_labels: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        default=None, description="Return only so many labels of each input, the most probable ones."
    )


class Classified(BaseModel):
    """The label of an input, and the probability of each label; over all labels they sum to 1."""

    index: int
    label: str
    probability: float
    probabilities: dict[str, float]
    num_shots: Annotated[int, Field(description="Demonstrations that it was scored after.")]


class Classification(BaseModel):
    """Labels of inputs."""

    object: Literal["classification"] = "classification"
    model: str
    data: list[Classified]
    usage: Usage


class NewExample(Request):
    """An example to be added."""

    input: Annotated[str, Field(min_length=1, max_length=1_000_000)]
    answer: Annotated[str, Field(min_length=1, max_length=1_000_000)]


class NewExamples(Request):
    """Examples to be added behind those of a task."""

    examples: Annotated[list[NewExample], Field(min_length=1, max_length=20_000)]
    after: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = Field(
        default=None,
        description="How many examples the task has before; with another number it is left alone (409). So a repeated request "
        "adds nothing twice.",
    )


class LeftOut(BaseModel):
    """An example that is not in the context."""

    position: Annotated[int, Field(description="Its place among the task's examples, which a job has shuffled, from 0.")]
    line: Annotated[int | None, Field(description="Its line in the training file, from 1; null where it was appended.")] = None
    reason: str


class TaskFacts(BaseModel):
    """A task: what it was made of and what it costs."""

    id: str
    object: Literal["task"] = "task"
    created_at: int
    labels: list[str]
    instruction: str
    num_examples: int
    num_shots: Annotated[int, Field(description="Examples that stand in the context.")]
    prefix_tokens: Annotated[int, Field(description="Tokens that queries share.")]
    computed_tokens: Annotated[int, Field(description="Tokens computed to make it, appended examples included.")]
    prefill_seconds: Annotated[float, Field(description="Time that this took.")]
    temperature: Annotated[float, Field(description="That probabilities are told at; 1 until the task is calibrated.")]
    context_tokens: Annotated[int, Field(description="Tokens that the model has room for.")]
    left_out: list[LeftOut]
    num_left_out: int


class QualityRequest(Request):
    """How a task's quality is to be estimated: some of its examples are held out, and answered after the rest."""

    share: Annotated[float, Field(gt=0, le=0.5)] = Field(default=0.2, description="Share of the examples that is held out.")
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    calibrate: bool = Field(
        default=False, description="Keep the temperature at which the held-out labels were most probable, for /v1/classify."
    )


class Quality(BaseModel):
    """An estimate of a task's quality, with a 95% interval; the task itself has more shots than the estimate."""

    object: Literal["quality"] = "quality"
    model: str
    metric: Literal["accuracy", "token_f1"]
    value: float
    low: float
    high: float
    num_held_out: int
    num_shots: int
    seed: int
    log_loss: Annotated[float | None, Field(description="Of a task with labels, in nats an example, at temperature 1.")]
    temperature: Annotated[float | None, Field(description="At which the held-out labels were most probable.")]
    calibrated_log_loss: Annotated[float | None, Field(description="At that temperature, on the very examples that chose it.")]


class CurveQuery(BaseModel):
    """How a shot curve is to be drawn."""

    model_config = ConfigDict(extra="forbid")

    shots: Annotated[str, Field(pattern=SHOTS_PATTERN)] = Field(
        default="0,1,4,16,64,max", description="Numbers of demonstrations; max is all."
    )
    share: Annotated[float, Field(gt=0, le=0.5)] = Field(default=0.2, description="Share of the examples that is held out.")
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0


class CurvePoint(BaseModel):
    """Quality after so many demonstrations."""

    num_shots: int
    value: float
    low: float
    high: float


class ShotCurve(BaseModel):
    """Quality by the number of demonstrations, each set part of the next, always on the same held-out examples."""

    object: Literal["shot_curve"] = "shot_curve"
    model: str
    metric: Literal["accuracy", "token_f1"]
    num_held_out: int
    seed: int
    points: list[CurvePoint]
