"""What the estimators take as X and y, and what they refuse, with the position of what is wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
import scipy.sparse

from estimator_fixtures import labelled_texts
from manyicl import ManyShotClassifier, ManyShotGenerator
from manyicl.errors import UserInputError
from manyicl.estimator.inputs import DataError

TEXTS, ANSWERS = labelled_texts(6)


@pytest.fixture(scope="module")
def make(tiny_model_folder: Callable[..., Path]) -> Callable[..., ManyShotClassifier]:
    return lambda **options: ManyShotClassifier(str(tiny_model_folder()), dtype="float32", random_state=0, **options)


@pytest.mark.parametrize(
    "wrap",
    [
        tuple,
        np.array,
        lambda texts: np.array(texts, dtype=object),
        lambda texts: np.array(texts).reshape(-1, 1),
        lambda texts: [[text] for text in texts],
        lambda texts: pd.Series(texts, index=range(10, 16)),
        lambda texts: pd.Series(texts, dtype="category"),
        lambda texts: pd.DataFrame({"text": texts}),
        pl.Series,
        lambda texts: pl.DataFrame({"text": texts}),
    ],
    ids=["tuple", "array", "objects", "column", "rows", "pandas", "category", "frame", "polars", "polars-frame"],
)
def test_columns_of_every_kind_give_the_answers_of_a_list(make: Callable[..., Any], wrap: Callable[[list[str]], Any]) -> None:
    expected = make().fit(TEXTS, ANSWERS)
    found = make().fit(wrap(TEXTS), ANSWERS)
    assert found.library_ == expected.library_
    assert np.array_equal(found.predict_proba(wrap(TEXTS)), expected.predict_proba(TEXTS))


@pytest.mark.parametrize(
    ("labels", "dtype"),
    [
        (tuple(ANSWERS), "<U7"),
        (pd.Series(ANSWERS), "O"),
        (pd.Series(ANSWERS, dtype="category"), "O"),
        (pl.Series(ANSWERS), "O"),
        (pd.Series([1, 2, 3] * 2), "int64"),
        (pd.Series([1, 2, 3] * 2, dtype="Int64"), "int64"),
        (pl.Series([1, 2, 3] * 2), "int64"),
        (pl.Series([True, False] * 3), "bool"),
        ([1.0, 2.0] * 3, "float64"),
    ],
)
def test_labels_of_every_kind(make: Callable[..., Any], labels: Any, dtype: str) -> None:
    model = make(fit_mode="lazy").fit(TEXTS, labels)
    assert model.classes_.dtype == np.dtype(dtype)
    assert model.classes_.tolist() == sorted(set(labels))
    assert [example.answer for example in model.library_] == [str(label) for label in labels]


NOT_AVAILABLE = float("nan")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], r"^X is empty: 0 sample\(s\) were given, at least 1 is required"),
        (None, r"^X is nothing \(None\)\. Give a list"),
        ("one text", r"^X is a str\. Give a list, an array, or one column of a table"),
        ({"text": TEXTS}, r"^X is a dict\. Give a list"),
        (set(TEXTS), r"^X is a set, which has no order or length"),
        (iter(TEXTS), r"^X is a list_iterator, which has no order or length"),
        (scipy.sparse.csr_array(np.eye(6)), r"^X is a sparse csr_array\. Give a list"),
        (np.array([TEXTS, TEXTS]), r"^X has shape \(2, 6\), not one column"),
        (pd.DataFrame({"a": TEXTS, "b": TEXTS}), r"^X has shape \(6, 2\), not one column\. Choose the column"),
        (pl.DataFrame({"a": TEXTS, "b": TEXTS}), r"^X has shape \(6, 2\), not one column"),
        ([["a", "b"]] * 6, r"^X holds rows of 2 values, not one column"),
        ([*TEXTS[:5], ["a"]], r"^X holds rows of 0 and 1 values, not one column"),
        ([*TEXTS[:2], None, *TEXTS[3:]], r"^X\[2\] is missing: None \(NoneType\)\. Give X as texts"),
        ([*TEXTS[:3], NOT_AVAILABLE, *TEXTS[4:]], r"^X\[3\] is missing: nan \(float\)"),
        (pd.Series([*TEXTS[:4], None, TEXTS[5]]), r"^X\[4\] is missing: nan"),
        (pd.Series([pd.NA, *TEXTS[1:]], dtype="object"), r"^X\[0\] is missing: <NA> \(NAType\)"),
        (pl.Series([*TEXTS[:5], None]), r"^X\[5\] is missing: None"),
        ([*TEXTS[:1], 7, *TEXTS[2:]], r"^X\[1\] is no text: 7 \(int\)\. Give X as texts"),
        ([b"bytes", *TEXTS[1:]], r"^X\[0\] is no text: b'bytes' \(bytes\)"),
        (np.arange(6), r"^X\[0\] is no text: np\.int64\(0\)"),
    ],
)
def test_what_is_no_column_of_texts_is_refused(make: Callable[..., Any], texts: Any, message: str) -> None:
    fitted = make(fit_mode="lazy").fit(TEXTS, ANSWERS)
    for call in (lambda: make().fit(texts, ANSWERS), lambda: fitted.predict(texts), lambda: fitted.partial_fit(texts, ANSWERS)):
        with pytest.raises(DataError, match=message):
            call()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, r"requires y to be passed, but the target y is None"),
        (ANSWERS[:5], r"^X has 6 texts and y has 5 values\. Give one for each"),
        (["music"] * 6, r"^y has one class only, 'music'\. Classification takes at least two"),
        ([*ANSWERS[:2], None, *ANSWERS[3:]], r"^y\[2\] is missing: None"),
        ([*ANSWERS[:5], NOT_AVAILABLE], r"^y\[5\] is missing: nan"),
        (np.array([*ANSWERS[:4], None, "a"], dtype=object), r"^y\[4\] is missing: None"),
        (pd.Series([*ANSWERS[:1], None, *ANSWERS[2:]]), r"^y\[1\] is missing: nan"),
        (pl.Series([*ANSWERS[:1], None, *ANSWERS[2:]]), r"^y\[1\] is missing: None"),
        (pl.Series([1, 2, None] * 2), r"^y\[2\] is missing: np\.float64\(nan\)"),
        (pd.Series([1, 2, pd.NA] * 2, dtype="Int64"), r"^y\[2\] is missing: np\.float64\(nan\)"),
        ([1, *ANSWERS[1:]], r"^y mixes labels of the types int \(first y\[0\]\) and str \(first y\[1\]\)"),
        (np.array([*ANSWERS[:3], 1, 2, 3], dtype=object), r"^y mixes labels of the types str \(first y\[0\]\) and int"),
        (["a ", "a", "b", "b", "c", "c"], r"^the labels 'a' and 'a ' have the same word 'a'\. Rename one"),
        (["", "a", "b", "b", "c", "c"], r"^the label '' has no word"),
        ([0.5, 1.5, 2.5, 0.5, 1.5, 2.5], r"Unknown label type: continuous"),
        (np.eye(6, dtype=int), r"y should be a 1d array"),
        ([["a"], ["b"]] * 3, r"^y\[0\] is a list, which is no label"),
        (np.array([{1}, {2}] * 3, dtype=object), r"^y\[0\] is a set, which is no label"),
    ],
)
def test_what_are_no_labels_is_refused(make: Callable[..., Any], labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().fit(TEXTS, labels)


def test_errors_are_those_of_the_package_and_value_errors(make: Callable[..., Any]) -> None:
    with pytest.raises(UserInputError) as caught:
        make().fit([], [])
    assert isinstance(caught.value, ValueError)


def test_labels_unseen_at_partial_fit_are_named(make: Callable[..., Any]) -> None:
    model = make().fit(TEXTS, ANSWERS)
    with pytest.raises(DataError, match=r"^y\[1\] is 'sport', which is not among the 3 classes \['music', 'travel', 'weather'\]"):
        model.partial_fit(TEXTS[:2], ["music", "sport"])
    assert len(model.library_) == 6
    with pytest.raises(DataError, match=r"^classes must be passed on the first call to partial_fit"):
        make().partial_fit(TEXTS, ANSWERS)
    with pytest.raises(DataError, match=r"^classes=\['music', 'sport'\] is not the same as on last call"):
        model.partial_fit(TEXTS[:1], ["music"], classes=["music", "sport"])
    with pytest.raises(DataError, match=r"^y has one class only, 'music'"):
        make().partial_fit(TEXTS[:1], ["music"], classes=["music"])


def test_many_labels_of_few_texts_are_no_regression(make: Callable[..., Any]) -> None:
    texts = [f"text {number}" for number in range(30)]
    for labels in ([f"label {number}" for number in range(30)], list(range(30))):
        model = make(fit_mode="lazy").partial_fit(texts, labels, classes=labels)
        assert len(model.classes_) == 30


def test_a_class_may_be_named_before_it_is_shown(make: Callable[..., Any]) -> None:
    model = make().partial_fit(TEXTS[:1], ["music"], classes=["sport", "music"])
    assert model.classes_.tolist() == ["music", "sport"]
    assert model.predict_proba(TEXTS).shape == (6, 2)
    model.partial_fit(TEXTS[1:2], ["sport"])
    assert [example.answer for example in model.library_] == ["music", "sport"]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"selection": "best"}, r"^selection='best' is unknown\. Use one of 'random', 'nearest', 'hybrid'"),
        ({"fit_mode": "eager"}, r"^fit_mode='eager' is unknown"),
        (
            {"calibration": "best"},
            r"^calibration='best' is unknown\. Use one of None, 'contextual', 'domain_context', 'mutual_inf",
        ),
        (
            {"calibration": "contextual", "selection": "hybrid"},
            r"^calibration='contextual' measures labels after the block alone, but",
        ),
        ({"format": "xml"}, r"^format='xml' is unknown\. Use one of 'plain', 'chat'"),
        ({"n_estimators": 0}, r"^n_estimators=0 must be a whole number of at least 1\."),
        ({"num_nearest": None}, r"^num_nearest=None must be a whole number of at least 1\."),
        ({"num_shots": 2.5}, r"^num_shots=2\.5 must be a whole number of at least 1 or None\."),
        ({"context_tokens": True}, r"^context_tokens=True must be a whole number"),
        ({"instruction": None}, r"^instruction=None must be a text"),
        ({"selection": "nearest", "n_estimators": 3}, r"^selection='nearest' has one order, by similarity, which n_estimators=3"),
    ],
)
def test_parameters_are_checked_at_fit(make: Callable[..., Any], parameters: dict[str, Any], message: str) -> None:
    model = make(**parameters)
    with pytest.raises(DataError, match=message):
        model.fit(TEXTS, ANSWERS)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (None, r"requires y to be passed"),
        (ANSWERS[:4], r"^X has 6 texts and y has 4 values"),
        ([*ANSWERS[:5], " "], r"^y\[5\] is empty"),
        ([*ANSWERS[:5], 3], r"^y\[5\] is no text: 3 \(int\)\. Give y as texts"),
        ([None, *ANSWERS[1:]], r"^y\[0\] is missing"),
    ],
)
def test_the_generator_takes_texts_as_answers(tiny_model_folder: Callable[..., Path], answers: Any, message: str) -> None:
    model = ManyShotGenerator(str(tiny_model_folder()), dtype="float32")
    for call in (model.fit, model.partial_fit):
        with pytest.raises(DataError, match=message):
            call(TEXTS, answers)
