"""What requests and answers look like: OpenAI's shapes; this service's own are in `task_schemas`.

Unknown fields are refused by name. A field of OpenAI's that would change the answer and is not offered here takes only the value
that changes nothing.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from manyicl.serving.settings import NAME_PATTERN

MAX_SEED = 2**63 - 1

ModelName = Annotated[str, Field(max_length=64, description="Name of a task, or `base` for the model without examples.")]
TaskName = Annotated[str, Field(pattern=NAME_PATTERN, description="Name of a task.")]
Text = Annotated[str, Field(max_length=1_000_000)]
Seed = Annotated[int, Field(ge=-MAX_SEED, le=MAX_SEED, description="Equal seeds give equal answers.")]
Zero = Annotated[float, Field(ge=0, le=0)]
One = Annotated[float, Field(ge=1, le=1)]
Nothing = Annotated[list[Any], Field(max_length=0)]
StopText = Annotated[str, Field(min_length=1, max_length=200)]


class Request(BaseModel):
    """A request's body or a part of it."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Error(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """An answer that is an error."""

    error: Error


class Deleted(BaseModel):
    """What was deleted."""

    id: str
    object: str
    deleted: Literal[True] = True


class File(BaseModel):
    """An uploaded file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["fine-tune"] = "fine-tune"
    status: Literal["processed"] = "processed"


class FileList(BaseModel):
    """Files."""

    object: Literal["list"] = "list"
    data: list[File]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Hyperparameters(Request):
    """There is nothing to choose: examples are read once, in one pass."""

    n_epochs: Literal["auto"] = "auto"
    batch_size: Literal["auto"] = "auto"
    learning_rate_multiplier: Literal["auto"] = "auto"


class Supervised(Request):
    """Options of the supervised method."""

    hyperparameters: Hyperparameters | None = None


class Method(Request):
    """How a model is made; there is one way."""

    type: Literal["supervised"]
    supervised: Supervised | None = None


class NewJob(Request):
    """A fine-tuning job to be done."""

    training_file: Annotated[str, Field(min_length=1, max_length=64, description="Id of an uploaded file.")]
    model: Annotated[Literal["base"], Field(description="What to start from.")] = "base"
    suffix: Annotated[str, Field(pattern=NAME_PATTERN)] | None = Field(
        default=None, description="Name of the model that is made; without one it gets a name of its own."
    )
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = Field(default=None, description="Seed of the order of examples.")
    labels: Annotated[list[Annotated[str, Field(min_length=1, max_length=1000)]], Field(max_length=1000)] | None = Field(
        default=None, description="The label set; an empty list for free text. Without it, answers that recur are the labels."
    )
    hyperparameters: Hyperparameters | None = None
    method: Method | None = None
    integrations: Nothing | None = None
    validation_file: None = None
    metadata: (
        Annotated[dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)] | None
    ) = None


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None


class JobHyperparameters(BaseModel):
    """What stands in a job for OpenAI's clients."""

    n_epochs: int = 1
    batch_size: int = 1
    learning_rate_multiplier: float = 1.0


class Job(BaseModel):
    """A fine-tuning job."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    training_file: str
    validation_file: str | None = None
    result_files: list[str] = []
    hyperparameters: JobHyperparameters = JobHyperparameters()
    trained_tokens: int | None
    seed: int
    error: JobError | None
    estimated_finish: int | None = None
    integrations: list[Any] = []
    metadata: dict[str, str]


class JobList(BaseModel):
    """Jobs, newest first."""

    object: Literal["list"] = "list"
    data: list[Job]
    has_more: bool


class JobEvent(BaseModel):
    """Something that happened to a job."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message"] = "message"


class JobEventList(BaseModel):
    """Events, newest first."""

    object: Literal["list"] = "list"
    data: list[JobEvent]
    has_more: bool


class Model(BaseModel):
    """A model that can be called."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(BaseModel):
    """Models."""

    object: Literal["list"] = "list"
    data: list[Model]


class TextPart(Request):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class Message(Request):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=100)]
    name: Annotated[str, Field(max_length=64)] | None = None

    def text(self) -> str:
        """Its text, the ends stripped as in training files."""
        whole = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return whole.strip()


class StreamOptions(Request):
    """Options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class ResponseFormat(Request):
    """The form of an answer: text."""

    type: Literal["text"]


class Sampling(Request):
    """What chat and plain completions have in common."""

    model: ModelName
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(default=None, description="0 unless given.")
    seed: Seed | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = Field(
        default=None, description="Ends an answer of free text. A label is chosen whole."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    top_p: One | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None

    def stop_texts(self) -> tuple[str, ...]:
        """The strings that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(Sampling):
    """A chat completion. The last message, the user's, is the input; a task has read its examples and reads no turns before."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Nothing | None = None
    functions: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=512)] | None = None


class CompletionRequest(Sampling):
    """A plain completion; the prompt is the input."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    suffix: None = None

    def text(self) -> str:
        """The prompt, the ends stripped as in training files."""
        return (self.prompt if isinstance(self.prompt, str) else self.prompt[0]).strip()


class PromptDetails(BaseModel):
    """Of the prompt's tokens, those of the examples: computed before, or by this request where nothing was kept of them."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of a request. `prompt_tokens` holds the task's examples; what is not cached of it is the request's own."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TopLogprob(BaseModel):
    """A token and its log-probability."""

    token: str
    bytes: list[int] | None
    logprob: float


class TokenLogprobs(TopLogprob):
    """A token of an answer and what else could have stood there."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of an answer. A label counts as one token."""

    content: list[TokenLogprobs]
    refusal: None = None


class AnswerMessage(BaseModel):
    """An answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """The one choice of a chat completion."""

    index: int = 0
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """A chat completion."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class PlainLogprobs(BaseModel):
    """Log-probabilities of a plain completion."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class PlainChoice(BaseModel):
    """The one choice of a plain completion."""

    index: int = 0
    text: str
    logprobs: PlainLogprobs | None
    finish_reason: Literal["stop", "length"]


class PlainCompletion(BaseModel):
    """A plain completion."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[PlainChoice]
    usage: Usage


class Health(BaseModel):
    """Whether the service lives, or is ready."""

    status: Literal["ok"] = "ok"
