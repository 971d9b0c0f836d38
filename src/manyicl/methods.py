"""Everything that can be compared, behind one Protocol. Here: in-context learning with any model, tuned or not.

A method is opened on one task with ordered demonstrations, and then answers queries at any number of shots up to what fits;
shots are nested, so one opening serves a whole shot curve.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from manyicl.calibration import CONTENT_FREE_INPUTS, draw_domain_inputs
from manyicl.engines.native import NativeEngine
from manyicl.episodes import fill_budget
from manyicl.errors import BudgetError
from manyicl.prefix import Prefix
from manyicl.tasks.task import Example, Task


@dataclass(frozen=True, slots=True)
class Answer:
    """A method's answer to one query; `choice` is its index among the choices, -1 for free text."""

    text: str
    choice: int = -1
    log_probability: float = float("nan")


class OpenedMethod(Protocol):
    """A method that has seen a task's demonstrations."""

    @property
    def num_demonstrations(self) -> int:
        """The most demonstrations that it can use."""

    def prefix_tokens(self, num_shots: int) -> int:
        """Tokens that the first `num_shots` demonstrations take."""

    def query_tokens(self, query: Example) -> int:
        """Tokens of a query."""

    def answer(self, queries: Sequence[Example], num_shots: int) -> list[Answer]:
        """Answers to the inputs of `queries`, in order; their gold answers are not looked at."""


class Method(Protocol):
    """Anything that can be evaluated."""

    name: str
    fingerprint: str

    def open(self, task: Task, demonstrations: Sequence[Example], queries: Sequence[Example]) -> OpenedMethod:
        """Prepare for a task: ordered demonstrations, of which the first that fit beside the longest query are used."""


class InContext:
    """In-context learning: demonstrations prefilled once, labels scored exactly, free text generated greedily."""

    def __init__(self, engine: NativeEngine, *, name: str = "in-context") -> None:
        self.engine = engine
        self.name = name
        self.fingerprint = (
            f"{engine.loaded.fingerprint}/{engine.encoder.format}/{engine.context_tokens}/{engine.loaded.model.dtype}"
        )

    def open(self, task: Task, demonstrations: Sequence[Example], queries: Sequence[Example]) -> "OpenedInContext":
        """Prefill the longest front of `demonstrations` that leaves room for every query and its answer.

        Raises:
            BudgetError: a query does not fit even without demonstrations.
        """
        encoder = self.engine.encoder
        if task.is_choice:
            most_answer_tokens = self.engine.answer_tokens([choice for query in queries for choice in task.choices(query)])
        else:
            most_answer_tokens = task.max_answer_tokens or self.engine.answer_tokens([example.answer for example in task.train])
        reserve = max(len(encoder.encode_query(query.input)) for query in queries) + most_answer_tokens
        room = self.engine.context_tokens - reserve
        if room < encoder.count_opening(task.instruction):
            raise BudgetError(
                f"task {task.name!r}: the longest query and its answer take {reserve} tokens, more than the context of "
                f"{self.engine.context_tokens}. Give a larger context; queries are never cut."
            )
        fitting, _ = fill_budget(demonstrations, instruction=task.instruction, counter=encoder, max_tokens=room)
        prefix = self.engine.prefill(fitting, instruction=task.instruction)
        return OpenedInContext(self.engine, task, prefix, most_answer_tokens)


class OpenedInContext:
    """Demonstrations of one task, prefilled."""

    def __init__(self, engine: NativeEngine, task: Task, prefix: Prefix, max_answer_tokens: int) -> None:
        self.engine = engine
        self.task = task
        self.prefix = prefix
        self.max_answer_tokens = max_answer_tokens

    @property
    def num_demonstrations(self) -> int:
        """Demonstrations that were prefilled."""
        return self.prefix.num_shots

    def prefix_tokens(self, num_shots: int) -> int:
        """Tokens of the opening and the first `num_shots` demonstrations."""
        return self.prefix.stops[num_shots]

    def query_tokens(self, query: Example) -> int:
        """Tokens of a query, up to the last one before its answer."""
        return len(self.engine.encoder.encode_query(query.input))

    def answer(self, queries: Sequence[Example], num_shots: int) -> list[Answer]:
        """Answers after the first `num_shots` demonstrations."""
        prefix = self.prefix.trim(num_shots)
        inputs = [query.input for query in queries]
        if not self.task.is_choice:
            return [Answer(text) for text in self.engine.write(prefix, inputs, max_new_tokens=self.max_answer_tokens)]
        choices = [self.task.choices(query) for query in queries]
        best = self.engine.find_best(prefix, inputs, choices)
        return [Answer(own[each.index], each.index, each.log_probability) for own, each in zip(choices, best, strict=True)]


class CalibratedInContext(InContext):
    """In-context learning whose label scores are calibrated by inputs of random words of the demonstrations.

    Without demonstrations there are no such words, and content-free inputs take their place. Tasks without a label set are
    answered as by `InContext`. Costs 20 more queries for each number of shots (3 without demonstrations), and every label of
    every query is scored. See `calibration`.

    Args:
        seed: Draws the words.
    """

    def __init__(self, engine: NativeEngine, *, name: str = "in-context", seed: int = 0) -> None:
        super().__init__(engine, name=name)
        self.seed = seed
        self.fingerprint += f"/domain_context/{seed}"

    def open(self, task: Task, demonstrations: Sequence[Example], queries: Sequence[Example]) -> OpenedInContext:
        """See `InContext.open`."""
        opened = super().open(task, demonstrations, queries)
        return OpenedCalibrated(opened, demonstrations, seed=self.seed) if task.labels else opened


class OpenedCalibrated(OpenedInContext):
    """Demonstrations of one label task, prefilled, with their texts at hand."""

    def __init__(self, opened: OpenedInContext, demonstrations: Sequence[Example], *, seed: int) -> None:
        super().__init__(opened.engine, opened.task, opened.prefix, opened.max_answer_tokens)
        self.demonstrations = demonstrations[: opened.num_demonstrations]
        self.seed = seed

    def answer(self, queries: Sequence[Example], num_shots: int) -> list[Answer]:
        """Answers after the first `num_shots` demonstrations; their calibrated scores are no log-probabilities, and left out."""
        prefix, shown = self.prefix.trim(num_shots), self.demonstrations[:num_shots]
        contexts = draw_domain_inputs(shown, seed=self.seed) if shown else list(CONTENT_FREE_INPUTS)
        room = self.engine.context_tokens - prefix.stops[num_shots] - self.max_answer_tokens
        scores = self.engine.choose_calibrated(
            prefix,
            [query.input for query in queries],
            [self.task.labels] * len(queries),
            context_inputs=[self._shorten(text, room) for text in contexts],
        )
        best = [int(own.argmax()) for own in scores]
        return [Answer(self.task.labels[index], index) for index in best]

    def _shorten(self, text: str, room: int) -> str:
        """A text without its last words, where there is no room for it as there is for the longest query."""
        words = text.split()
        while len(words) > 1 and len(self.engine.encoder.encode_query(" ".join(words))) > room:
            words.pop()
        return " ".join(words)
