"""Which examples of a task stand in its context, and what room is left for queries.

    context   opening │ example example … example │ room: the longest input of these and the longest answer
                        in their order, whole       at most a quarter of the context for the input

In: a task's examples. Out: token ids, where each demonstration ends, and the examples left out with a reason. Whether an example
is in follows from it and those before it, so that appending examples never takes one out. A query that needs more room than
that is answered after fewer demonstrations, and never cut. Loads no torch.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from manyicl.encoding import Encoder
from manyicl.errors import BudgetError
from manyicl.serving.backends import TaskSpec
from manyicl.tasks.task import Example

TokenIds = tuple[int, ...]


@dataclass(frozen=True)
class TaskContext:
    """A task's context.

    Attributes:
        used: Positions of the examples in the context, in order.
        left_out: Position and reason of each of the others.
        token_ids: The context's tokens, opening included.
        stops: `stops[k]` is the number of tokens of the opening and the first k demonstrations.
        label_ids: Token ids of each label, its end included.
        answer_tokens: Room kept for an answer: the longest label, or the longest answer of the demonstrations.
    """

    used: tuple[int, ...]
    left_out: tuple[tuple[int, str], ...]
    token_ids: TokenIds
    stops: tuple[int, ...]
    label_ids: list[TokenIds]
    answer_tokens: int

    @property
    def num_shots(self) -> int:
        """Demonstrations in the context."""
        return len(self.used)

    def pick_demonstrations(self, spec: TaskSpec) -> list[Example]:
        """The examples in the context."""
        return [spec.examples[position] for position in self.used]

    def fitting_shots(self, query_tokens: int, context_tokens: int, *, num_shots: int | None = None) -> int:
        """Demonstrations that a query is answered after: `num_shots` or all, or as many as leave room for it.

        Raises:
            BudgetError: it does not fit even without demonstrations.
        """
        room = context_tokens - query_tokens - self.answer_tokens
        fitting = bisect_right(self.stops, room) - 1
        if fitting < 0:
            raise BudgetError(
                f"the input takes {query_tokens} tokens and its answer up to {self.answer_tokens}, more than the context of "
                f"{context_tokens} has beside its {self.stops[0]} opening tokens. Send a shorter input; inputs are never cut."
            )
        return fitting if num_shots is None else min(fitting, num_shots)

    def fit_inputs(self, lengths: Sequence[int], context_tokens: int, *, num_shots: int | None = None) -> list[int]:
        """`fitting_shots` of several inputs.

        Raises:
            BudgetError: one does not fit; its position is named.
        """
        shots = []
        for place, length in enumerate(lengths):
            try:
                shots.append(self.fitting_shots(length, context_tokens, num_shots=num_shots))
            except BudgetError as error:
                raise BudgetError(f"input {place}: {error}") from error
        return shots


def plan_context(spec: TaskSpec, encoder: Encoder, context_tokens: int) -> TaskContext:
    """The context of a task.

    Raises:
        BudgetError: none of its examples fits.
        TaskError: an answer is empty, or two labels have the same tokens.
        ModelError: the format has no place for an instruction.
    """
    token_ids = list(encoder.encode_opening(spec.instruction))
    label_ids = encoder.encode_labels(spec.labels)
    answer_tokens = max(map(len, label_ids), default=1)
    stops = [len(token_ids)]
    used: list[int] = []
    left_out: list[tuple[int, str]] = []
    longest_input, is_full = 0, False
    for position, example in enumerate(spec.examples):
        encoded = encoder.encode_example(example.input, example.answer)
        inputs = max(longest_input, min(len(encoded.input_ids), context_tokens // 4))
        answers = answer_tokens if label_ids else max(answer_tokens, len(encoded.answer_ids))
        room, size = context_tokens - inputs - answers, encoded.num_tokens
        if stops[0] + size > room:
            reason = f"its {size} tokens do not fit the {context_tokens} of the context beside a query and its answer"
        elif is_full:
            reason = f"the context of {context_tokens} tokens is full: {len(used)} examples before it take {stops[-1]}"
        elif stops[-1] + size > room:
            reason = f"its {size} tokens are more than the {max(0, room - stops[-1])} left of the context's {context_tokens}"
            is_full = True
        else:
            token_ids += [*encoded.input_ids, *encoded.answer_ids, *encoded.gap_ids]
            stops.append(len(token_ids))
            used.append(position)
            longest_input, answer_tokens = inputs, answers
            continue
        left_out.append((position, reason))
    if spec.examples and not used:
        raise BudgetError(
            f"none of {len(spec.examples)} examples fits the context of {context_tokens} tokens; of the first, {left_out[0][1]}. "
            "Send shorter examples."
        )
    return TaskContext(tuple(used), tuple(left_out), tuple(token_ids), tuple(stops), label_ids, answer_tokens)
