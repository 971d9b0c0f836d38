"""What users hand to an estimator -> texts and label words, or an error that names the position.

    X   list, tuple, NumPy array (n,) or (n, 1), pandas or polars Series or one-column DataFrame   -> list[str]
    y   the same, of strings, integers or booleans                                                 -> NumPy array, as given

Nothing is converted silently: a number is no text, a missing value is an error, and a table of several columns is asked for
its column.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.utils import column_or_1d
from sklearn.utils.multiclass import check_classification_targets

from manyicl.errors import UserInputError


class DataError(UserInputError, ValueError):
    """What was given to an estimator is wrong; a ValueError too, as scikit-learn's conventions want."""


def as_texts(values: Any, *, name: str = "X") -> list[str]:
    """The texts of a column, in order.

    Raises:
        DataError: it is no column, it is empty, or a value is missing or no text; its position is named.
    """
    column = as_column(values, name=name)
    for position, value in enumerate(column):
        if not isinstance(value, str):
            raise DataError(
                f"{name}[{position}] is {'missing' if is_missing(value) else 'no text'}: {value!r} ({type(value).__name__}). "
                f"Give {name} as texts; drop or fill in what is missing."
            )
    return [str(value) for value in column]


def as_labels(values: Any, *, name: str = "y") -> npt.NDArray[Any]:
    """The labels of a column as a NumPy array, each as it was given.

    Raises:
        DataError: there is none, one is missing, or their types are mixed.
        ValueError: scikit-learn takes them for the targets of a regression, or for several columns.
    """
    if values is None:
        raise DataError(f"the estimator requires {name} to be passed, but the target {name} is None. Give one label per text.")
    if isinstance(values, list | tuple):
        # Before NumPy makes strings of everything that stands beside a string.
        _check_kinds(values, name=name)
        values = np.asarray(values)
    elif hasattr(values, "to_numpy"):
        values = values.to_numpy()  # scikit-learn would make floats of pandas' nullable integers.
    column = column_or_1d(values, warn=True)
    if column.dtype == object or column.dtype.kind == "f":
        kind = _check_kinds(column, name=name)
        if column.dtype == object and kind in ("int", "bool"):
            column = column.astype(kind)
    if column.dtype.kind in "fc":
        # Not asked of others, as it takes many labels of few texts for a regression, and warns.
        check_classification_targets(column)
    return np.asarray(column)


def _check_kinds(values: Iterable[Any], *, name: str) -> str:
    """The one type that all values have, after a check that none is missing."""
    kinds: dict[str, int] = {}
    for position, value in enumerate(values):
        if is_missing(value):
            raise DataError(f"{name}[{position}] is missing: {value!r}. Drop the text or fill in its label.")
        kinds.setdefault(type(value).__name__.removesuffix("_"), position)
    strange = {kind: position for kind, position in kinds.items() if not re.fullmatch(r"str|bool|u?int\d*|float\d*", kind)}
    if strange:
        kind, position = next(iter(strange.items()))
        raise DataError(f"{name}[{position}] is a {kind}, which is no label. Use strings, integers or booleans.")
    if "str" in kinds and len(kinds) > 1:
        seen = " and ".join(f"{kind} (first {name}[{position}])" for kind, position in kinds.items())
        raise DataError(f"{name} mixes labels of the types {seen}. Make them all strings, or all integers.")
    return next(iter(kinds)) if len(kinds) == 1 else ""


def as_answers(values: Any) -> list[str]:
    """The free-text answers of a column, none of them empty.

    Raises:
        DataError: there is none, or one is missing, empty or no text.
    """
    if values is None:
        raise DataError("the estimator requires y to be passed, but the target y is None. Give one answer per text.")
    answers = as_texts(values, name="y")
    empty = next((position for position, answer in enumerate(answers) if not answer.strip()), None)
    if empty is not None:
        raise DataError(f"y[{empty}] is empty. Every demonstration needs an answer; drop it or fill it in.")
    return answers


def label_words(labels: Sequence[Any]) -> tuple[str, ...]:
    """The word that stands for each label: str(label), without space around it.

    Raises:
        DataError: a word is empty, or two labels have the same.
    """
    seen: dict[str, Any] = {}
    for label in labels:
        word = str(label).strip()
        if not word:
            raise DataError(f"the label {label!r} has no word that could stand as an answer. Give every class a name.")
        if word in seen:
            raise DataError(f"the labels {seen[word]!r} and {label!r} have the same word {word!r}. Rename one.")
        seen[word] = label
    return tuple(seen)


def as_column(values: Any, *, name: str) -> list[Any]:
    """The values of a column, in order.

    Raises:
        DataError: it is one text, a mapping, several columns, or empty.
    """
    if values is None or isinstance(values, str | bytes | Mapping) or hasattr(values, "tocsr"):
        what = "nothing (None)" if values is None else f"a {'sparse ' * hasattr(values, 'tocsr')}{type(values).__name__}"
        raise DataError(f"{name} is {what}. Give a list, an array, or one column of a table.")
    if hasattr(values, "to_numpy"):
        values = values.to_numpy()
    if not isinstance(values, Sequence | np.ndarray):
        raise DataError(f"{name} is a {type(values).__name__}, which has no order or length. Give a list or an array.")
    if isinstance(values, np.ndarray):
        if values.ndim == 2 and values.shape[1] == 1:
            values = values[:, 0]
        if values.ndim != 1:
            raise DataError(f"{name} has shape {values.shape}, not one column. Choose the column that holds the texts.")
        values = values.tolist() if values.dtype.kind in "US" else list(values)
    column = list(values)
    if not column:
        raise DataError(f"{name} is empty: 0 sample(s) were given, at least 1 is required.")
    widths = {len(value) if isinstance(value, list | tuple | np.ndarray) else 0 for value in column}
    if widths == {1}:
        column = [value[0] for value in column]
    elif widths != {0}:
        raise DataError(
            f"{name} holds rows of {' and '.join(map(str, sorted(widths)))} values, not one column. Choose the column that holds "
            "the texts."
        )
    return column


def is_missing(value: Any) -> bool:
    """Whether a value is None, NaN, NaT or pandas' NA."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, float | np.floating) and math.isnan(value)


def check_same_length(texts: Sequence[str], targets: Sequence[Any] | npt.NDArray[Any]) -> None:
    """Check that there is one target per text.

    Raises:
        DataError: there is not.
    """
    if len(texts) != len(targets):
        raise DataError(f"X has {len(texts)} texts and y has {len(targets)} values. Give one for each, in the same order.")
