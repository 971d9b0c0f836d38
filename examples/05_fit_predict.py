"""fit and predict: labelled texts in a scikit-learn classifier, and what its options cost and bring.

Shows the accuracy and the milliseconds per query of one block of demonstrations, of two orders averaged, of retrieved
demonstrations and of both, on a held-out built-in task of 34 labels; then more examples without another prefill, a choice by
validation, and a saved copy.
Costs under a minute on two cores, after the default model's first conversion.
"""

import tempfile
import time
from typing import Any

import numpy as np
from sklearn.model_selection import GridSearchCV, ShuffleSplit

from manyicl import ManyShotClassifier, load_suite

NUM_EXAMPLES = 170
NUM_QUERIES = 20
OPTIONS: dict[str, dict[str, Any]] = {
    "one block of 34": {"num_shots": 34},
    "two orders averaged": {"num_shots": 34, "n_estimators": 2},
    "nearest 4 per query": {"selection": "nearest", "num_nearest": 4},
    "block of 30, nearest 4": {"selection": "hybrid", "num_shots": 30, "num_nearest": 4},
    "block of 34, not kept": {"num_shots": 34, "fit_mode": "lazy"},
}


def main() -> None:
    task = load_suite("builtin").tasks["library_desk"]
    texts, labels = (
        [example.input for example in task.train[:NUM_EXAMPLES]],
        [example.answer for example in task.train[:NUM_EXAMPLES]],
    )
    queries, gold = (
        [example.input for example in task.test[:NUM_QUERIES]],
        [example.answer for example in task.test[:NUM_QUERIES]],
    )
    print(f"{task.name}: {len(texts)} labelled texts, {len(task.labels)} labels, {NUM_QUERIES} queries")

    for name, parameters in OPTIONS.items():
        start = time.perf_counter()
        classifier = ManyShotClassifier("default", random_state=0, instruction=task.instruction, **parameters).fit(texts, labels)
        fitted = time.perf_counter()
        accuracy = classifier.score(queries, gold)
        seconds = (time.perf_counter() - fitted) / NUM_QUERIES
        print(f"{name:22}  accuracy {accuracy:.2f}   fit {fitted - start:5.2f} s   query {1000 * seconds:6.1f} ms")

    classifier = ManyShotClassifier("default", random_state=0, instruction=task.instruction)
    classifier.partial_fit(texts[:16], labels[:16], classes=list(task.labels))
    start = time.perf_counter()
    classifier.partial_fit(texts[16:32], labels[16:32])
    print(f"{classifier.num_demonstrations_} demonstrations, the last 16 appended in {time.perf_counter() - start:.2f} s")

    grid = {"selection": ["random", "nearest"], "num_shots": [16], "num_nearest": [4]}
    one_split = ShuffleSplit(1, test_size=10, random_state=0)
    search = GridSearchCV(ManyShotClassifier("default", random_state=0), grid, cv=one_split).fit(texts, labels)
    print(f"validation takes selection={search.best_params_['selection']!r} (accuracy {search.best_score_:.2f})")

    with tempfile.TemporaryDirectory() as folder:
        classifier.save_pretrained(folder)
        again = ManyShotClassifier.from_pretrained(folder)
        print("the saved copy says the same:", np.array_equal(again.predict_proba(queries), classifier.predict_proba(queries)))


if __name__ == "__main__":
    main()
