"""ManyShotClassifier: labelled texts in, the probability of each label out; nothing is tuned."""

from collections.abc import Sequence
from typing import Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt
from sklearn.base import ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from manyicl.calibration import CONTENT_FREE_INPUTS, draw_domain_inputs, score_contextual, score_mutual_information
from manyicl.dtypes import Dtype
from manyicl.engines.native import NativeEngine
from manyicl.estimator.base import STORE_MAX_BYTES, FitMode, ManyShotEstimator, QueryGroup
from manyicl.estimator.inputs import DataError, as_labels, as_texts, check_same_length, label_words
from manyicl.estimator.shared_models import Format
from manyicl.scoring import score_labels
from manyicl.selection import Embed, Selection
from manyicl.tasks.task import Example

Calibration = Literal["contextual", "domain_context", "mutual_information"]


class ManyShotClassifier(ClassifierMixin, ManyShotEstimator):  # type: ignore[misc]
    """Classifies texts by in-context learning: `fit` places labelled texts in the context of a language model.

    The score of a label is the exact log-probability of its words, `str(label)`, after the demonstrations and the query; the
    probabilities of all labels are then made to sum to one. Nothing is tuned: `fit` costs one pass over the demonstrations.

    Args:
        model: `default`, a local folder, a hub id, a `.gguf` file or a finished run's folder. Models are loaded once per process
            and shared; clones and pickles carry no weights.
        selection: Which demonstrations a query sees. "random": one block for all queries, prefilled once. "nearest": the
            `num_nearest` most similar ones, computed for every query. "hybrid": a block, then `num_nearest` similar ones.
        num_shots: The most demonstrations in the block; None takes as many as fit the context.
        num_nearest: Demonstrations retrieved per query by "nearest" and "hybrid".
        embed: Takes a list of texts and returns their embeddings [number of texts, size]; None compares words by BM25.
        n_estimators: Orders of demonstrations whose probabilities are averaged; each costs a prefill, a prefix and a scoring.
        fit_mode: What is kept of the prefilled blocks. "prefill": keys and values in memory, 2 · layers · key-value heads · head
            size · tokens numbers per order. "store": on disk, mapped at each call, and found again
            by any process that fits the same demonstrations. "lazy": nothing; each call of predict prefills.
        store_max_bytes: The most that all prefixes in the cache folder may take; those used longest ago make room.
        instruction: A sentence before the demonstrations; empty for none.
        format: "plain", or "chat" for the tokenizer's own template.
        context_tokens: Tokens that demonstrations, query and answer have together; None takes the model's positions.
        normalise: Divide a label's score by its number of tokens, terminator included: a mean in place of the sum, which is no
            log-probability of the words any more.
        calibration: What is taken off a label's score for what the model says without the query; None for nothing. "contextual":
            the mean share of the label after content-free inputs. "domain_context": after 20 inputs of random words of the
            demonstrations. "mutual_information": its score after an empty input. Costs 3, 20 or 1 more queries per call and
            order; wins where a model favours a label whatever it reads. Only with selection "random". See `manyicl.calibration`.
        dtype: "auto", "bfloat16" or "float32".
        random_state: Seeds the order of demonstrations, and which of them are in the block when not all fit.

    Attributes:
        classes_: The labels, sorted, in the dtype given.
        library_: Every example given to fit and partial_fit, in order.
        blocks_: For each order, the positions in `library_` of the demonstrations in its block.
        num_demonstrations_: Demonstrations in each block.
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
        n_estimators: int = 1,
        fit_mode: FitMode = "prefill",
        store_max_bytes: int = STORE_MAX_BYTES,
        instruction: str = "",
        format: Format = "plain",
        context_tokens: int | None = None,
        normalise: bool = False,
        calibration: Calibration | None = None,
        dtype: Dtype = "auto",
        random_state: Any = None,
    ) -> None:
        self.model = model
        self.selection = selection
        self.num_shots = num_shots
        self.num_nearest = num_nearest
        self.embed = embed
        self.n_estimators = n_estimators
        self.fit_mode = fit_mode
        self.store_max_bytes = store_max_bytes
        self.instruction = instruction
        self.format = format
        self.context_tokens = context_tokens
        self.normalise = normalise
        self.calibration = calibration
        self.dtype = dtype
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> Self:
        """Place labelled texts in the context, in random order, and prefill them as `fit_mode` says.

        Args:
            X: Texts: a list, an array (n,) or (n, 1), or one column of a pandas or polars table.
            y: Their labels: strings, integers or booleans.

        Raises:
            DataError: X or y is not that, a value is missing, or there is one class only.
            BudgetError: no demonstration fits the context.
            ModelError: the model cannot be loaded.
        """
        texts, labels = self._read(X, y)
        self._take_classes(np.unique(labels))
        return self._start(texts, self._words_of(labels))

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> Self:
        """Append labelled texts behind the demonstrations; what stands there is not computed again.

        What does not fit the context is left out of the block and counted in `num_left_out_`.

        Args:
            classes: Every label that may come; needed at the first call, and the same at later ones.

        Raises:
            DataError: as in `fit`; or a label is not among the classes, or `classes` is missing or has changed.
        """
        texts, labels = self._read(X, y)
        is_first = not self.__sklearn_is_fitted__()
        if is_first and classes is None:
            raise DataError("classes must be passed on the first call to partial_fit: every label that may come.")
        given = self.classes_ if classes is None else np.unique(as_labels(classes, name="classes"))
        if is_first:
            self._take_classes(given)
            return self._start(texts, self._words_of(labels))
        if given.tolist() != self.classes_.tolist():
            raise DataError(
                f"classes={given.tolist()} is not the same as on last call to partial_fit or fit, {self.classes_.tolist()}. "
                "Leave it out, or call fit for other classes."
            )
        return self._append(self._engine(), texts, self._words_of(labels))

    def predict(self, X: Any) -> npt.NDArray[Any]:
        """The most probable label of each text, in the dtype of `classes_`.

        Raises:
            BudgetError: a text does not fit the context even without demonstrations; texts are never cut.
        """
        best = self.predict_log_proba(X).argmax(axis=1)
        return np.asarray(self.classes_[best])

    def predict_proba(self, X: Any) -> npt.NDArray[np.float64]:
        """Probabilities [number of texts, number of classes], in the order of `classes_`; each row sums to one."""
        return np.asarray(np.exp(self.predict_log_proba(X)))

    def predict_log_proba(self, X: Any) -> npt.NDArray[np.float64]:
        """Natural logarithms of `predict_proba`, exact where that underflows."""
        check_is_fitted(self)
        texts = as_texts(X)
        engine = self._engine()
        labels = engine.encoder.encode_labels(label_words(self.classes_.tolist()))
        mean = np.full((len(texts), len(self.classes_)), -np.inf)
        for groups in self._group_queries(engine, texts):
            scores = np.empty_like(mean)
            for group in groups:
                scores[group.places] = self._score(engine, group, labels)
            mean = np.logaddexp(mean, scores - np.logaddexp.reduce(scores, axis=1, keepdims=True))
        return mean - np.logaddexp.reduce(mean, axis=1, keepdims=True)

    def _score(self, engine: NativeEngine, group: QueryGroup, labels: list[tuple[int, ...]]) -> list[npt.NDArray[np.float64]]:
        """Scores of the labels after each query, calibrated as asked for."""
        model, repeated, encode = engine.loaded.model, [labels] * len(group.places), engine.encoder.encode_query
        if self.calibration is None:
            return score_labels(model, group.prefix, group.token_ids, repeated, normalise=self.normalise)
        if self.calibration == "mutual_information":
            return score_mutual_information(
                model, group.prefix, group.token_ids, repeated, bare_query=encode(""), normalise=self.normalise
            )
        contexts = [encode(text) for text in self._context_inputs(self.library_)]
        return score_contextual(model, group.prefix, group.token_ids, repeated, contexts=contexts, normalise=self.normalise)

    def _context_inputs(self, library: Sequence[Example]) -> list[str]:
        if self.calibration == "domain_context":
            return draw_domain_inputs(library, seed=self._seed)
        return list(CONTENT_FREE_INPUTS) if self.calibration == "contextual" else []

    def _check_parameters(self) -> None:
        super()._check_parameters()
        known = (None, *get_args(Calibration))
        if self.calibration not in known:
            raise DataError(f"calibration={self.calibration!r} is unknown. Use one of {', '.join(map(repr, known))}.")
        if self.calibration is not None and self.selection != "random":
            raise DataError(
                f"calibration={self.calibration!r} measures labels after the block alone, but selection={self.selection!r} puts "
                "retrieved demonstrations before each query. Use selection='random', or calibration=None."
            )

    @staticmethod
    def _read(X: Any, y: Any) -> tuple[list[str], npt.NDArray[Any]]:
        texts, labels = as_texts(X), as_labels(y)
        check_same_length(texts, labels)
        return texts, labels

    def _take_classes(self, classes: npt.NDArray[Any]) -> None:
        if len(classes) < 2:
            raise DataError(f"y has one class only, {classes.tolist()[0]!r}. Classification takes at least two classes.")
        label_words(classes.tolist())
        self.classes_ = classes

    def _words_of(self, labels: npt.NDArray[Any]) -> list[str]:
        """The words of each label.

        Raises:
            DataError: a label is not among the classes; its position is named.
        """
        known = self.classes_.tolist()
        word_of = dict(zip(known, label_words(known), strict=True))
        for position, label in enumerate(labels.tolist()):
            if label not in word_of:
                raise DataError(
                    f"y[{position}] is {label!r}, which is not among the {len(known)} classes {known[:20]}. "
                    "Name every label in `classes` at the first partial_fit, or call fit."
                )
        return [word_of[label] for label in labels.tolist()]

    def _answer_tokens(self, engine: NativeEngine, library: Sequence[Example]) -> int:
        return max(len(engine.encoder.encode_answer(word)) for word in label_words(self.classes_.tolist()))
