"""ManyShotGenerator: texts and their answers in, answers to new texts out; nothing is tuned."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sklearn.utils.validation import check_is_fitted

from manyicl.dtypes import Dtype
from manyicl.engines.native import NativeEngine
from manyicl.estimator.base import STORE_MAX_BYTES, FitMode, ManyShotEstimator
from manyicl.estimator.inputs import DataError, as_answers, as_texts, check_same_length
from manyicl.estimator.shared_models import Format
from manyicl.metrics import score_answer
from manyicl.scoring import generate_answers
from manyicl.selection import Embed, Selection
from manyicl.tasks.task import METRICS, Example, Metric


class ManyShotGenerator(ManyShotEstimator):
    """Answers texts freely by in-context learning: `fit` places texts and their answers in the context of a language model.

    Answers are generated greedily up to the terminator. Parameters that are not explained here are those of `ManyShotClassifier`.

    Args:
        max_answer_tokens: The most tokens that an answer may have, its terminator included; None takes those of the longest
            answer given to fit.
        metric: What `score` is the mean of: "token_f1", "exact_match", "rouge_l" or "numeric_match", each on 0-1.

    Attributes:
        library_: Every example given to fit and partial_fit, in order.
        blocks_: The positions in `library_` of the demonstrations in the block, in a list of one order.
        num_demonstrations_: Demonstrations in the block.
        num_left_out_: Examples that no query sees.
        fingerprint_: Hash of the model.
    """

    def __init__(
        self,
        model: Any = "default",
        *,
        selection: Selection = "random",
        num_shots: int | None = None,
        num_nearest: int = 8,
        embed: Embed | None = None,
        fit_mode: FitMode = "prefill",
        store_max_bytes: int = STORE_MAX_BYTES,
        instruction: str = "",
        format: Format = "plain",
        context_tokens: int | None = None,
        max_answer_tokens: int | None = None,
        metric: Metric = "token_f1",
        dtype: Dtype = "auto",
        random_state: Any = None,
    ) -> None:
        self.model = model
        self.selection = selection
        self.num_shots = num_shots
        self.num_nearest = num_nearest
        self.embed = embed
        self.fit_mode = fit_mode
        self.store_max_bytes = store_max_bytes
        self.instruction = instruction
        self.format = format
        self.context_tokens = context_tokens
        self.max_answer_tokens = max_answer_tokens
        self.metric = metric
        self.dtype = dtype
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> Self:
        """Place texts and their answers in the context, in random order, and prefill them as `fit_mode` says.

        Args:
            X: Texts: a list, an array (n,) or (n, 1), or one column of a pandas or polars table.
            y: Their answers, as texts.

        Raises:
            DataError: X or y is not that, or a value is missing or empty.
            BudgetError: no demonstration fits the context.
            ModelError: the model cannot be loaded.
        """
        return self._start(*self._read(X, y))

    def partial_fit(self, X: Any, y: Any) -> Self:
        """Append texts and their answers behind the demonstrations; what stands there is not computed again.

        Raises:
            DataError: as in `fit`.
        """
        texts, answers = self._read(X, y)
        if not self.__sklearn_is_fitted__():
            return self._start(texts, answers)
        return self._append(self._engine(), texts, answers)

    def predict(self, X: Any) -> npt.NDArray[Any]:
        """The answer to each text, as an array of str objects; an empty one where the model ends at once.

        Raises:
            BudgetError: a text and its answer do not fit the context even without demonstrations; texts are never cut.
        """
        check_is_fitted(self)
        texts = as_texts(X)
        engine = self._engine()
        answers = np.empty(len(texts), dtype=object)
        for groups in self._group_queries(engine, texts):
            for group in groups:
                found = generate_answers(
                    engine.loaded.model,
                    group.prefix,
                    group.token_ids,
                    terminator_id=engine.encoder.terminator_id,
                    max_new_tokens=self._answer_tokens(engine, self.library_),
                )
                for place, ids in zip(group.places, found, strict=True):
                    answers[place] = str(engine.loaded.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()
        return answers

    def score(self, X: Any, y: Any) -> float:
        """The mean of `metric` over the texts, 0-1.

        Raises:
            DataError: the metric is unknown or one of labels; X or y as in `fit`.
        """
        known = [name for name in METRICS if name not in ("accuracy", "macro_f1")]
        if self.metric not in known:
            raise DataError(f"metric={self.metric!r} is unknown for free text. Use one of {', '.join(map(repr, known))}.")
        texts, answers = self._read(X, y)
        pairs = zip(self.predict(texts), answers, strict=True)
        return float(np.mean([score_answer(self.metric, predicted, [answer]) for predicted, answer in pairs]))

    @staticmethod
    def _read(X: Any, y: Any) -> tuple[list[str], list[str]]:
        texts, answers = as_texts(X), as_answers(y)
        check_same_length(texts, answers)
        return texts, answers

    def _answer_tokens(self, engine: NativeEngine, library: Sequence[Example]) -> int:
        if self.max_answer_tokens is not None:
            return self.max_answer_tokens
        return engine.answer_tokens([example.answer for example in library])
