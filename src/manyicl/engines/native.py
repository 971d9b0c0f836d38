"""The native engine: this process runs the model, with text in and scores or text out.

The seam for other engines: methods say `prefill`, `find_best` and `write`, and see no tensor. The estimators go through it to
the model, since they put retrieved demonstrations into a query's own tokens.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from manyicl.calibration import score_contextual
from manyicl.encoding import Encoder
from manyicl.errors import BudgetError, UserInputError
from manyicl.label_search import BestLabel, find_best_labels
from manyicl.modeling import Format, LoadedModel
from manyicl.prefix import Prefix, prefill
from manyicl.scoring import generate_answers, score_labels
from manyicl.tasks.task import Example


class NativeEngine:
    """Runs a loaded model on prefilled demonstrations.

    Args:
        loaded: The model and its tokenizer.
        encoder: Turns text into the tokens that the model was tuned on.
        context_tokens: Tokens that demonstrations, query and answer may have together; None takes the model's positions.

    Raises:
        BudgetError: the context is wider than the model's positions.
    """

    def __init__(self, loaded: LoadedModel, encoder: Encoder, *, context_tokens: int | None = None) -> None:
        self.loaded = loaded
        self.encoder = encoder
        self.context_tokens = loaded.context_tokens if context_tokens is None else context_tokens
        if not 0 < self.context_tokens <= loaded.context_tokens:
            raise BudgetError(
                f"a context of {self.context_tokens} tokens was asked of {loaded.name}, which has {loaded.context_tokens} "
                "positions. Give a number from 1 to that."
            )

    def prefill(self, demonstrations: Sequence[Example], *, instruction: str = "") -> Prefix:
        """Prefill ordered demonstrations once.

        Raises:
            BudgetError: they are longer than the context.
        """
        return prefill(self.loaded.model, self.encoder, demonstrations, instruction=instruction, max_tokens=self.context_tokens)

    def choose(
        self, prefix: Prefix, inputs: Sequence[str], choices: Sequence[Sequence[str]], *, normalise: bool = False
    ) -> list[npt.NDArray[np.float64]]:
        """Log-probability of each choice of each query.

        Raises:
            TaskError: a choice is empty, or two have the same tokens.
            BudgetError: a query does not fit behind the prefix.
        """
        queries = [self.encoder.encode_query(text) for text in inputs]
        return score_labels(self.loaded.model, prefix, queries, self._encode_choices(choices), normalise=normalise)

    def choose_calibrated(
        self, prefix: Prefix, inputs: Sequence[str], choices: Sequence[Sequence[str]], *, context_inputs: Sequence[str]
    ) -> list[npt.NDArray[np.float64]]:
        """Scores of each choice of each query, less what the choices score after inputs that say nothing; see `calibration`.

        Raises:
            TaskError: see `choose`.
            BudgetError: a query or one of `context_inputs` does not fit behind the prefix, or there is none of these.
        """
        encode = self.encoder.encode_query
        queries, contexts = [encode(text) for text in inputs], [encode(text) for text in context_inputs]
        return score_contextual(self.loaded.model, prefix, queries, self._encode_choices(choices), contexts=contexts)

    def find_best(self, prefix: Prefix, inputs: Sequence[str], choices: Sequence[Sequence[str]]) -> list[BestLabel]:
        """The choice of the highest score of each query, as `choose` would have it; of many choices few are computed.

        Raises:
            TaskError: see `choose`; or a query has no choice.
            BudgetError: a query does not fit behind the prefix.
        """
        queries = [self.encoder.encode_query(text) for text in inputs]
        return find_best_labels(self.loaded.model, prefix, queries, self._encode_choices(choices))

    def _encode_choices(self, choices: Sequence[Sequence[str]]) -> list[list[tuple[int, ...]]]:
        """Token ids of each query's choices, the same object for the same choices."""
        encoded: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
        for own in map(tuple, choices):
            if own not in encoded:
                encoded[own] = self.encoder.encode_labels(own)
        return [encoded[tuple(own)] for own in choices]

    def write(self, prefix: Prefix, inputs: Sequence[str], *, max_new_tokens: int) -> list[str]:
        """Greedy answers as text, up to the terminator.

        Raises:
            BudgetError: a query and its answer do not fit behind the prefix.
        """
        answers = generate_answers(
            self.loaded.model,
            prefix,
            [self.encoder.encode_query(text) for text in inputs],
            terminator_id=self.encoder.terminator_id,
            max_new_tokens=max_new_tokens,
        )
        return [str(self.loaded.tokenizer.decode(list(ids), skip_special_tokens=True)).strip() for ids in answers]

    def answer_tokens(self, answers: Sequence[str]) -> int:
        """Tokens of the longest of the answers, its terminator included."""
        return max(len(self.encoder.encode_answer(answer)) for answer in answers)


def check_format(name: str | None) -> None:
    """Whether that is a format, or None.

    Raises:
        UserInputError: it is not.
    """
    if name not in (None, "plain", "chat"):
        raise UserInputError(f"format {name!r} is neither plain nor chat.")


def open_engine(loaded: LoadedModel, format: str | None, context_tokens: int | None) -> NativeEngine:
    """The engine of a model, in the format that it was tuned in unless another is given.

    Raises:
        BudgetError: see `NativeEngine`.
    """
    chosen: Format = loaded.format if format is None else "chat" if format == "chat" else "plain"
    return NativeEngine(loaded, Encoder(loaded.tokenizer, format=chosen), context_tokens=context_tokens)
