"""What the service asks of whoever runs the model: tasks are prepared once, then scored and answered by their key.

In: a task as plain data, every time it is used. Out: what became of its examples, label scores, text as it is written. The
service keeps the examples and a backend keeps what it computed of them; that may be lost at any time, and is then computed
again from the same `TaskSpec`. Loads no torch.

    prepare(spec) ──► Prepared            once, slow, durable
    score(spec, inputs) ──► Scored        label tasks
    generate(spec, input) ──► Piece …     free text, token by token

Everything is awaited on one event loop, which no method blocks. Times are seconds; a deadline is a time of `time.monotonic()`.
"""

import math
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from manyicl.errors import ManyICLError, UserInputError
from manyicl.tasks.task import Example

MAX_TOP_LOGPROBS = 20

FinishReason = Literal["stop", "length"]


class ShortMemoryError(ManyICLError):
    """Less memory is free than a task takes; nothing is wrong with the request."""


@dataclass(frozen=True)
class TaskSpec:
    """A served task.

    Attributes:
        key: The only name that a backend knows it by, 32 hexadecimal digits that cannot be guessed. Its examples only ever grow.
        examples: In the order in which they stand in the context; none for the plain model.
        labels: The label set, in a fixed order; empty for free text.
        instruction: A sentence before the examples; empty for none.
    """

    key: str
    examples: tuple[Example, ...]
    labels: tuple[str, ...] = ()
    instruction: str = ""


def equal_specs(held: TaskSpec, spec: TaskSpec) -> bool:
    """Whether two specs are equal; found at once where they are one, or one has more examples."""
    return held is spec or (len(held.examples) == len(spec.examples) and held == spec)


@dataclass(frozen=True)
class Prepared:
    """What came of a task's examples.

    Attributes:
        num_used: Demonstrations in the context: the examples in their order, without those left out.
        prefix_tokens: Tokens of the context before any query.
        computed_tokens: Of these, those that this call computed.
        left_out: Position and reason of each example that is not in the context.
        seconds: What this call took.
    """

    num_used: int
    prefix_tokens: int
    computed_tokens: int
    left_out: tuple[tuple[int, str], ...]
    seconds: float


@dataclass(frozen=True)
class Scored:
    """Label scores of several inputs, each attribute with one entry an input.

    Attributes:
        log_probabilities: For each of the task's labels, in its order, the sum over its tokens and its end.
        num_shots: Demonstrations that the input was scored after; fewer than the task has where a long input leaves less room.
        cached_tokens: Tokens that were computed before.
        computed_tokens: Tokens of the input and its label continuations.
    """

    log_probabilities: tuple[tuple[float, ...], ...]
    num_shots: tuple[int, ...]
    cached_tokens: tuple[int, ...]
    computed_tokens: tuple[int, ...]


@dataclass(frozen=True)
class GenerationOptions:
    """How an answer is written.

    Attributes:
        max_tokens: The most tokens it may have; None takes what is left of the context.
        temperature: 0 takes the most probable token each time.
        seed: Equal seeds give equal text, up to the rounding of bf16; None draws one.
        stop: Strings that end the answer and are not part of it.
        top_logprobs: How many alternatives are told for each token, 0 to 20; None tells not even the token's own.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            UserInputError: one is out of range.
        """
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UserInputError(f"max_tokens is {self.max_tokens}. Give at least 1.")
        if not 0 <= self.temperature < math.inf:
            raise UserInputError(f"temperature is {self.temperature}. Give 0 or a positive number.")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise UserInputError(f"top_logprobs is {self.top_logprobs}. Give 0 to {MAX_TOP_LOGPROBS}.")


@dataclass(frozen=True)
class TokenLogprob:
    """A token and its log-probability at temperature 1. `token_bytes` are its own; a character may need several tokens."""

    text: str
    token_bytes: bytes
    log_probability: float


@dataclass(frozen=True)
class Piece:
    """One step of an answer: a token, or the end.

    Attributes:
        text: What can be shown now, whole characters; may be empty while a character or a stop string may still follow.
        token: The token of this step, where log-probabilities are asked for; None on a last piece that adds none.
        alternatives: The most probable tokens at its place, most probable first.
        finish_reason: On the last piece: "stop" at the answer's own end or a stop string, "length" at `max_tokens`.
        num_tokens: Tokens written so far, those of this step included and the end not.
        cached_tokens: Tokens before the answer that were computed before.
        computed_tokens: Tokens before the answer that this call computed.
    """

    text: str
    token: TokenLogprob | None = None
    alternatives: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    num_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0


@dataclass(frozen=True)
class BackendLoad:
    """How busy a backend is, and what it has done since it started.

    Attributes:
        num_waiting: Queries in the queue now.
        num_running: Queries in the pass that is computed now, and answers being written.
        batch_sizes: How many passes served so many queries.
        opened: How often a task's prefix was found ("memory", "disk") or had to be made ("computed").
        cached_tokens: Tokens that queries used without computing them.
        computed_tokens: Tokens of queries, answers and prefixes that were computed.
    """

    num_waiting: int = 0
    num_running: int = 0
    batch_sizes: Mapping[int, int] = field(default_factory=dict)
    opened: Mapping[str, int] = field(default_factory=dict)
    cached_tokens: int = 0
    computed_tokens: int = 0


@dataclass(frozen=True)
class BackendLimits:
    """What a backend may hold.

    Attributes:
        max_queue: Queries that may wait.
        max_batch_queries: Queries that one pass serves at most.
        max_open_bytes: Memory of prefixes that are held open.
        max_stored_bytes: Disk space of prefixes; those used longest ago make room.
    """

    max_queue: int = 1024
    max_batch_queries: int = 64
    max_open_bytes: int = 4 * 2**30
    max_stored_bytes: int = 20 * 2**30


class Backend(Protocol):
    """Runs the model of a service.

    Errors of all methods: `UserInputError` for what the caller can mend, `OverloadedError` at once when the queue is full or the
    backend stops, `DeadlineError` when the deadline passes. A call that is cancelled, and an iterator that is closed, costs
    nothing from then on: what waits is not computed, and an answer ends at its next token.
    """

    @property
    def name(self) -> str:
        """Name of the model; known once started."""

    @property
    def context_tokens(self) -> int:
        """Tokens that demonstrations, query and answer may have together; known once started."""

    @property
    def context_identity(self) -> str:
        """What decides which examples of a task stand in its context: model, format and context; known once started."""

    @property
    def is_alive(self) -> bool:
        """Whether what runs the model is there, as far as this is known without asking it; once started."""

    async def start(self) -> None:
        """Load the model.

        Raises:
            ModelError: it cannot be loaded.
        """

    async def stop(self) -> None:
        """Finish what is being computed and the answers that are being written, and refuse everything else."""

    async def prepare(self, spec: TaskSpec, *, progress: Callable[[int, int], None] | None = None) -> Prepared:
        """Compute what a task's queries share, and keep it for later, also after a restart; found again where it is kept already.

        Args:
            progress: Told (tokens done, tokens in all) now and then, on the event loop.

        Raises:
            BudgetError: no example fits.
            ShortMemoryError: memory is short.
            StorageError: it cannot be kept.
        """

    async def extend(self, spec: TaskSpec, num_old: int, *, progress: Callable[[int, int], None] | None = None) -> Prepared:
        """Like `prepare` for a task whose first `num_old` examples were prepared before: only the others are computed.

        Until the caller uses the longer spec, calls with the shorter one are served as before.
        """

    async def plan(self, spec: TaskSpec) -> Prepared:
        """What `prepare` would return, found without computing or keeping anything: its computed tokens and seconds are 0."""

    async def forget(self, key: str) -> None:
        """Remove what is kept of a task. A later call with its spec would compute it again."""

    async def score(
        self, spec: TaskSpec, inputs: Sequence[str], *, num_shots: int | None = None, deadline: float | None = None
    ) -> Scored:
        """Log-probability of each label of the task after each input.

        Args:
            num_shots: Score after the first so many demonstrations (of those used) only; None takes all. Costs no new prefix.

        Raises:
            UserInputError: the task has no labels; or, of an input, it leaves no room even without demonstrations.
        """

    def generate(
        self, spec: TaskSpec, input: str, options: GenerationOptions, *, deadline: float | None = None
    ) -> AsyncGenerator[Piece, None]:
        """The answer to an input, piece by piece; the last piece has a `finish_reason`. Close it when it is left before that.

        Where demonstrations, input and answer meet the end of the context, the answer ends there. Errors are raised by the first
        step, so that a caller who takes one piece before it answers can still say so.
        """

    def check_room(self, num_requests: int) -> None:
        """Refuse a further request before it is read, where so many that were read wait for their answers.

        It takes no time, and errs on the side of letting in: calls refuse what is too much themselves, in items.

        Raises:
            OverloadedError: the queue is full, or will be by those requests.
        """

    def load(self) -> BackendLoad:
        """How busy it is."""
