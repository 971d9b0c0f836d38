"""scikit-learn's conventions: its own checks, clone, pipelines, cross-validation, grid search and the HTML representation.

`check_estimator` checks nothing of an estimator of texts, so its API checks are called by name, and all of it runs on
`NumericRows`, which differs from the classifier only in writing numeric rows as text.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import sklearn
from sklearn.base import BaseEstimator, clone, is_classifier
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import estimator_checks, get_tags
from sklearn.utils.validation import check_is_fitted, validate_data

from estimator_fixtures import labelled_texts
from manyicl import ManyShotClassifier, ManyShotGenerator
from manyicl.estimator import shared_models

TEXTS, ANSWERS = labelled_texts(18)

API_CHECKS = (
    "check_do_not_raise_errors_in_init_or_set_params",
    "check_estimator_cloneable",
    "check_estimator_repr",
    "check_estimator_sparse_tag",
    "check_estimator_tags_renamed",
    "check_get_params_invariance",
    "check_mixin_order",
    "check_no_attributes_set_in_init",
    "check_parameters_default_constructible",
    "check_set_params",
    "check_valid_tag_types",
)
# How many checks of scikit-learn 1.9 pass on numeric rows; other versions have others, and must run as many as stand last.
NUM_CHECKS = {"NumericRows": (54, 45), "NumericRowsGenerator": (41, 30)}


class NumericRows(ManyShotClassifier):
    """The classifier on numeric rows, each written as text, so that checks that bring numbers can run."""

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.input_tags.one_d_array, tags.input_tags.string = True, False, False
        tags.classifier_tags.poor_score = True  # The model is random.
        return tags

    def _write(self, X: Any, **options: Any) -> list[str]:
        return [" ".join(f"{number:.3g}" for number in row) for row in validate_data(self, X, **options)]

    def fit(self, X: Any, y: Any) -> Self:
        return super().fit(self._write(X), y)

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> Self:
        return super().partial_fit(self._write(X, reset=not self.__sklearn_is_fitted__()), y, classes)

    def predict_log_proba(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        return super().predict_log_proba(self._write(X, reset=False))


class NumericRowsGenerator(ManyShotGenerator):
    """The generator on numeric rows, with numeric targets written as text and answers read as numbers."""

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.input_tags.one_d_array, tags.input_tags.string = True, False, False
        return tags

    def _write(self, X: Any, **options: Any) -> list[str]:
        return [" ".join(f"{number:.3g}" for number in row) for row in validate_data(self, X, **options)]

    def fit(self, X: Any, y: Any) -> Self:
        return super().fit(self._write(X), None if y is None else [str(answer) for answer in y])

    def partial_fit(self, X: Any, y: Any) -> Self:
        return super().partial_fit(self._write(X, reset=not self.__sklearn_is_fitted__()), [str(answer) for answer in y])

    def predict(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        return np.array([float(sum(answer.encode())) for answer in super().predict(self._write(X, reset=False))])

    def score(self, X: Any, y: Any) -> float:
        return float(np.mean(self.predict(X) == y))


@pytest.fixture(scope="module")
def folder(tiny_model_folder: Callable[..., Path]) -> str:
    return str(tiny_model_folder())


@pytest.fixture
def classifier(folder: str) -> ManyShotClassifier:
    return ManyShotClassifier(folder, dtype="float32", random_state=0)


@pytest.mark.parametrize("name", API_CHECKS)
@pytest.mark.parametrize("kind", [ManyShotClassifier, ManyShotGenerator])
def test_scikit_learns_api_checks(kind: type[BaseEstimator], name: str) -> None:
    getattr(estimator_checks, name)(kind.__name__, kind())


# sklearn 1.9 casts its own NaN targets to integers in check_supervised_y_no_nan.
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")
# sklearn 1.9 warns of the default of its own parameter.
@pytest.mark.filterwarnings("ignore:Estimator's parameters have changed:FutureWarning")
@pytest.mark.parametrize("kind", [NumericRows, NumericRowsGenerator])
def test_scikit_learns_checks_on_numeric_rows(kind: type[BaseEstimator], folder: str) -> None:
    estimator = kind(folder, dtype="float32", random_state=0, context_tokens=1024)
    results = estimator_checks.check_estimator(estimator, on_fail=None, on_skip=None)
    failed = {result["check_name"]: result["exception"] for result in results if result["status"] not in ("passed", "skipped")}
    assert failed == {}
    assert [result["check_name"] for result in results if result["status"] == "skipped"] == ["check_array_api_input"]
    passed = sum(result["status"] == "passed" for result in results)
    exactly, at_least = NUM_CHECKS[kind.__name__]
    assert passed == exactly if sklearn.__version__.startswith("1.9.") else passed >= at_least


def test_check_estimator_says_that_it_checks_nothing_of_texts() -> None:
    with pytest.warns(sklearn.exceptions.SkipTestWarning, match="Can't test estimator ManyShotClassifier"):
        results = estimator_checks.check_estimator(ManyShotClassifier())
    assert len(results) <= 1


def test_tags_say_text_and_kind() -> None:
    for estimator, kind in ((ManyShotClassifier(), "classifier"), (ManyShotGenerator(), None)):
        tags = get_tags(estimator)
        assert (tags.input_tags.one_d_array, tags.input_tags.string, tags.input_tags.two_d_array) == (True, True, False)
        assert tags.target_tags.required
        assert tags.estimator_type == kind
    assert is_classifier(ManyShotClassifier())


def test_clone_copies_parameters_and_no_weights(classifier: ManyShotClassifier) -> None:
    classifier.fit(TEXTS, ANSWERS)
    other = clone(classifier.set_params(num_nearest=3))
    assert other.get_params() == classifier.get_params()
    assert sorted(vars(other)) == sorted(other.get_params())
    with pytest.raises(NotFittedError, match="This ManyShotClassifier instance is not fitted yet"):
        other.predict(TEXTS)


@pytest.mark.parametrize("kind", [ManyShotClassifier, ManyShotGenerator])
def test_what_is_not_fitted_says_so(kind: type[BaseEstimator], tmp_path: Path) -> None:
    calls = [lambda: kind().predict(TEXTS), lambda: kind().open_prefixes(), lambda: kind().save_pretrained(tmp_path / "a")]
    if kind is ManyShotClassifier:
        calls += [
            lambda: kind().predict_proba(TEXTS),
            lambda: kind().predict_log_proba(TEXTS),
            lambda: kind().score(TEXTS, ANSWERS),
        ]
    for call in calls:
        with pytest.raises(NotFittedError):
            call()
    assert not (tmp_path / "a").exists()


def test_in_a_pipeline(classifier: ManyShotClassifier) -> None:
    upper = FunctionTransformer(lambda texts: [text.upper() for text in texts])
    pipeline = make_pipeline(upper, classifier).fit(TEXTS, ANSWERS)
    alone = clone(classifier).fit([text.upper() for text in TEXTS], ANSWERS)
    queries = ["play it", "go there"]
    assert np.array_equal(pipeline.predict_proba(queries), alone.predict_proba([query.upper() for query in queries]))
    assert pipeline.classes_.tolist() == ["music", "travel", "weather"]
    assert pipeline.score(TEXTS, ANSWERS) == alone.score([text.upper() for text in TEXTS], ANSWERS)


def test_cross_validation_loads_the_model_once(classifier: ManyShotClassifier, monkeypatch: pytest.MonkeyPatch) -> None:
    shared_models._models.clear()
    loaded = []
    load = shared_models.load_model
    monkeypatch.setattr(shared_models, "load_model", lambda name, **options: loaded.append(name) or load(name, **options))
    found = cross_val_score(classifier, np.array(TEXTS), ANSWERS, cv=3)
    assert len(loaded) == 1
    folds = sklearn.model_selection.StratifiedKFold(3).split(TEXTS, ANSWERS)
    expected = []
    for train, test in folds:
        model = clone(classifier).fit([TEXTS[i] for i in train], [ANSWERS[i] for i in train])
        expected.append(np.mean(model.predict([TEXTS[i] for i in test]) == np.array(ANSWERS)[test]))
    assert found.tolist() == expected


@pytest.mark.parametrize("num_jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_grid_search(classifier: ManyShotClassifier, num_jobs: int) -> None:
    grid = {"selection": ["random", "nearest"], "num_nearest": [2], "num_shots": [3, None]}
    search = GridSearchCV(classifier, grid, cv=2, n_jobs=num_jobs, scoring="neg_log_loss").fit(TEXTS, ANSWERS)
    assert sorted(map(str, search.cv_results_["params"])) == sorted(
        str({"num_nearest": 2, "num_shots": shots, "selection": selection})
        for shots in (3, None)
        for selection in ("random", "nearest")
    )
    scores = search.cv_results_["mean_test_score"]
    assert scores[1] == scores[3] != scores[0] != scores[2]
    assert search.best_score_ == scores.max()
    best = clone(classifier).set_params(**search.best_params_).fit(TEXTS, ANSWERS)
    np.testing.assert_allclose(search.predict_proba(TEXTS[:3]), best.predict_proba(TEXTS[:3]), rtol=0, atol=1e-6)


def test_grid_search_over_the_generator(folder: str) -> None:
    generator = ManyShotGenerator(folder, dtype="float32", random_state=0, max_answer_tokens=4)
    search = GridSearchCV(generator, {"num_shots": [1, 4]}, cv=2).fit(TEXTS, ANSWERS)
    assert search.best_score_ == max(search.cv_results_["mean_test_score"])
    assert search.best_estimator_.num_demonstrations_ == search.best_params_["num_shots"]


@pytest.mark.parametrize("is_fitted", [False, True])
def test_the_html_representation_shows_it_and_computes_nothing(classifier: ManyShotClassifier, is_fitted: bool) -> None:
    if is_fitted:
        classifier.set_params(fit_mode="lazy").fit(TEXTS, ANSWERS)
        shared_models._models.clear()
    html = classifier._repr_html_()
    assert "ManyShotClassifier" in html
    assert "n_estimators" in html
    assert len(shared_models._models) == 0 or not is_fitted


def test_transform_output_is_irrelevant(classifier: ManyShotClassifier) -> None:
    with sklearn.config_context(transform_output="pandas"):
        probabilities = classifier.fit(TEXTS, ANSWERS).predict_proba(TEXTS[:2])
    assert type(probabilities) is np.ndarray
