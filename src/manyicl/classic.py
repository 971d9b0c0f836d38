"""A baseline without a language model, so that a reader sees what a task takes: TF-IDF with logistic regression, or the nearest.

    label set            logistic regression on TF-IDF of words and pairs of words (scikit-learn's defaults, C = 10)
    options per query    the option most similar to the query's input
    free text            the answer of the most similar demonstration

In: the same demonstrations in the same order as every method; `max` is all of them, as there is no context to fill. Cost: well
under a second a task.
"""

from collections.abc import Sequence

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from manyicl.methods import Answer
from manyicl.tasks.task import Example, Task


class ClassicBaseline:
    """TF-IDF with logistic regression or nearest neighbours, as a method."""

    name = "classic"
    fingerprint = "tfidf(1, 2)/logistic-regression(C=10)/nearest"

    def open(self, task: Task, demonstrations: Sequence[Example], queries: Sequence[Example]) -> "OpenedClassic":
        """Keep the demonstrations; nothing is fitted before the first answer."""
        return OpenedClassic(task, demonstrations)


class OpenedClassic:
    """Demonstrations of one task."""

    def __init__(self, task: Task, demonstrations: Sequence[Example]) -> None:
        self.task = task
        self.demonstrations = demonstrations

    @property
    def num_demonstrations(self) -> int:
        """All demonstrations that were given."""
        return len(self.demonstrations)

    def prefix_tokens(self, num_shots: int) -> int:
        """None are read."""
        return 0

    def query_tokens(self, query: Example) -> int:
        """None are read."""
        return 0

    def answer(self, queries: Sequence[Example], num_shots: int) -> list[Answer]:
        """Answers from the first `num_shots` demonstrations; without any, the first label or an empty text."""
        demonstrations = self.demonstrations[:num_shots]
        if self.task.labels:
            return self._classify(queries, demonstrations)
        if self.task.is_choice:
            return [self._choose_option(query) for query in queries]
        if not demonstrations:
            return [Answer("") for _ in queries]
        nearest = _similarity([each.input for each in demonstrations], [query.input for query in queries]).argmax(axis=1)
        return [Answer(demonstrations[place].answer) for place in nearest]

    def _classify(self, queries: Sequence[Example], demonstrations: Sequence[Example]) -> list[Answer]:
        labels = self.task.labels
        seen = [labels.index(each.answer) for each in demonstrations]
        if len(set(seen)) < 2:
            only = seen[0] if seen else 0
            return [Answer(labels[only], only) for _ in queries]
        vectorizer = _vectorizer()
        features = vectorizer.fit_transform([each.input for each in demonstrations])
        model = LogisticRegression(C=10.0, max_iter=1000).fit(features, seen)
        chosen = model.predict(vectorizer.transform([query.input for query in queries]))
        return [Answer(labels[index], int(index)) for index in chosen]

    def _choose_option(self, query: Example) -> Answer:
        choices = self.task.choices(query)
        best = int(_similarity([query.input], choices).argmax())
        return Answer(choices[best], best)


def _vectorizer() -> TfidfVectorizer:
    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")


def _similarity(library: Sequence[str], texts: Sequence[str]) -> "np.ndarray[tuple[int, int], np.dtype[np.float64]]":
    """Cosine of each text with each text of the library: [texts, library]."""
    vectorizer = _vectorizer().fit([*library, "placeholder"])  # A library of punctuation alone would have no words.
    return np.asarray((vectorizer.transform(texts) @ vectorizer.transform(library).T).todense())
