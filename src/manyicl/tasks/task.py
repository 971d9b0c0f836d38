"""What a task is: examples, their split, and how an answer is judged. Plain data; loads no torch.

Task "intent"                                     Example
  family   classification                           input   "play some jazz"
  labels   ("play music", "book flight")            answer  "play music"
  train    (Example, Example, …)   demonstrations and training targets are drawn from here
  test     (Example, …)            queries are taken from here, in file order
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from manyicl.errors import TaskError

Family = Literal["classification", "summarization", "qa", "nli", "math"]
Metric = Literal["accuracy", "macro_f1", "exact_match", "token_f1", "rouge_l", "numeric_match"]
Role = Literal["meta_training", "validation", "held_out"]
FAMILIES: tuple[str, ...] = get_args(Family)
METRICS: tuple[str, ...] = get_args(Metric)


@dataclass(frozen=True, slots=True)
class Example:
    """One (input, answer) pair, as text.

    Attributes:
        input: The whole input as the model reads it, its template already filled in.
        answer: The answer that is trained on and shown in demonstrations.
        accepted: Further answers that count as right when a free-text answer is judged.
        options: The choices of this very example (multiple choice); empty when the task's labels apply.
        group: A premise or passage that must not stand in both train and test; empty when there is none.
        source: Where it came from, as "file:line".
    """

    input: str
    answer: str
    accepted: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    group: str = ""
    source: str = ""


@dataclass(frozen=True)
class Task:
    """One task: its examples and how an answer is judged.

    Attributes:
        labels: The label set, in a fixed order; empty for free text and for per-example options.
        instruction: A sentence placed once before the demonstrations; empty for none.
        max_answer_tokens: The most tokens that a generated answer may have; None lets the longest train answer decide.
    """

    name: str
    family: Family
    metric: Metric
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    labels: tuple[str, ...] = ()
    instruction: str = ""
    max_answer_tokens: int | None = None

    @property
    def is_choice(self) -> bool:
        """Whether answers are chosen from a label set or from options, rather than written freely."""
        return bool(self.labels) or any(example.options for example in self.train[:1] + self.test[:1])

    def choices(self, example: Example) -> tuple[str, ...]:
        """The answers among which this example's answer is chosen; empty for free text."""
        return example.options or self.labels

    def fingerprint(self) -> str:
        """SHA-256 over everything a result depends on: examples in order, their split, labels, instruction, metric, limits."""
        digest = hashlib.sha256()
        settings = (self.name, self.family, self.metric, self.labels, self.instruction, self.max_answer_tokens)
        digest.update(repr((*settings, len(self.train))).encode())
        for example in self.train + self.test:
            digest.update(repr((example.input, example.answer, example.accepted, example.options)).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class TaskSuite:
    """Tasks and their roles. A task has at most one role.

    Attributes:
        tasks: Every task by name, in a fixed order.
        meta_training: Names of the tasks that are trained on.
        validation: Names of the tasks that choose learning rates and checkpoints; trained by no method.
        held_out: Names of the tasks that are neither trained on nor choose anything.
    """

    name: str
    tasks: Mapping[str, Task]
    meta_training: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the roles.

        Raises:
            TaskError: a role names an unknown task, or a task has two roles.
        """
        seen: dict[str, str] = {}
        for role in get_args(Role):
            for name in getattr(self, role):
                if name not in self.tasks:
                    raise TaskError(
                        f"suite {self.name!r}: {role} names {name!r}, which is not among its {len(self.tasks)} tasks "
                        f"({', '.join(sorted(self.tasks))}). Add the task or remove the name."
                    )
                if name in seen:
                    raise TaskError(
                        f"suite {self.name!r}: {name!r} is both {seen[name]} and {role}. Give each task one role: "
                        "what is trained on, or chooses anything, is not held out."
                    )
                seen[name] = role

    def role(self, name: str) -> str:
        """The role of a task: meta_training, validation, held_out, or "none"."""
        return next((str(role) for role in get_args(Role) if name in getattr(self, role)), "none")

    def select(self, role: Role) -> tuple[Task, ...]:
        """The tasks of one role, in the suite's order of names."""
        return tuple(self.tasks[name] for name in getattr(self, role))
