import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyicl.metrics import aggregate, bootstrap_interval, macro_f1, mean_interval, read_number, score_answer
from manyicl.tasks.task import METRICS


@pytest.mark.parametrize(
    ("prediction", "gold", "score"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1.0),
        ("an apple", "Apple", 1.0),
        ("apples", "apple", 0.0),
        ("theatre", "atre", 0.0),
        ("U.S.", "us", 1.0),
        ("", "x", 0.0),
        ("x", "", 0.0),
        ("+", "+", 1.0),
        ("+", "-", 0.0),
        ("the", "a", 0.0),
    ],
)
def test_exact_match(prediction: str, gold: str, score: float) -> None:
    assert score_answer("exact_match", prediction, [gold]) == score


@pytest.mark.parametrize(
    ("prediction", "gold", "score"),
    [
        ("the cat sat", "a cat sat down", 2 * (2 / 2) * (2 / 3) / (2 / 2 + 2 / 3)),
        ("cat cat", "cat", 2 / 3),
        ("cat dog", "dog cat", 1.0),
        ("cat", "dog", 0.0),
        ("", "dog", 0.0),
        ("cat", "", 0.0),
        ("+", "-", 0.0),
        ("+", " + ", 1.0),
    ],
)
def test_token_f1(prediction: str, gold: str, score: float) -> None:
    assert score_answer("token_f1", prediction, [gold]) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "gold", "score"),
    [
        # Lin (2004), section 3: "police kill the gunman" and "the gunman kill police" share two and three words in order.
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("a b c d e", "a x c", 2 * 2 / 8),
        ("A, B!", "a b", 1.0),
        ("", "a", 0.0),
        ("!", "?", 0.0),
        ("?", "?", 1.0),
    ],
)
def test_rouge_l(prediction: str, gold: str, score: float) -> None:
    assert score_answer("rouge_l", prediction, [gold]) == pytest.approx(score)


@given(st.lists(st.sampled_from("abc"), max_size=8), st.lists(st.sampled_from("abc"), max_size=8))
def test_rouge_l_counts_the_longest_common_subsequence(left: list[str], right: list[str]) -> None:
    def longest(i: int, j: int) -> int:
        if i == len(left) or j == len(right):
            return 0
        if left[i] == right[j]:
            return 1 + longest(i + 1, j + 1)
        return max(longest(i + 1, j), longest(i, j + 1))

    wanted = 2 * longest(0, 0) / (len(left) + len(right)) if left and right else float(left == right)
    assert score_answer("rouge_l", " ".join(left), [" ".join(right)]) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("72", 72),
        ("The answer is 1,234.50 dollars.", 1234.5),
        ("12,345,678", 12_345_678),
        ("-3", -3),
        ("\N{MINUS SIGN}3", -3),
        ("(-3)", -3),
        ("10-3", 3),
        ("10 - 3 = 7", 7),
        ("f(x)-2", 2),
        ("x = -.5", -0.5),
        (".5", 0.5),
        ("5.", 5),
        ("3/4", 0.75),
        ("-1 / 2", -0.5),
        ("1/0", None),
        ("1, 2, 3", 3),
        ("1,2", 2),
        ("1e3", 1000),
        ("2.5E-1", 0.25),
        ("$1,000", 1000),
        ("50%", 50),
        ("#### 18", 18),
        ("none", None),
        ("", None),
        ("-", None),
        ("\u0664\u0662", 42),
    ],
)
def test_the_last_number_is_read(text: str, number: float | None) -> None:
    assert read_number(text) == number


@pytest.mark.parametrize(
    ("prediction", "gold", "score"),
    [
        ("so 18 apples", "18", 1.0),
        ("18.0", "18", 1.0),
        ("0.3333333333", "1/3", 1.0),
        ("0.333", "1/3", 0.0),
        ("0.333333", "1/3", 1.0),
        ("1000000", "1000001", 0.0),
        ("3e12", "3,000,000,000,000", 1.0),
        ("no idea", "18", 0.0),
        ("18", "unknown", 0.0),
        ("-18", "18", 0.0),
        ("9" * 400, "9" * 400, 0.0),
    ],
)
def test_numeric_match(prediction: str, gold: str, score: float) -> None:
    assert score_answer("numeric_match", prediction, [gold]) == score


@pytest.mark.parametrize("metric", METRICS)
def test_the_best_accepted_answer_counts(metric) -> None:
    assert score_answer(metric, "12", ["7", "12", "9"]) == 1.0
    assert score_answer(metric, "12", ["7", "9"]) == 0.0


def test_macro_f1_by_hand() -> None:
    # Label 0: F1 2*1/(2+1); label 1: 2*2/(4+2); label 2: never predicted, 0; label 3: never gold, 0.
    gold, predicted = [0, 0, 1, 1, 2], [0, 1, 1, 1, 3]
    assert macro_f1(gold, predicted) == pytest.approx((2 / 3 + 4 / 5 + 0 + 0) / 4)
    assert macro_f1([1, 1], [1, 1]) == 1.0


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30))
def test_macro_f1_is_scikit_learns(pairs: list[tuple[int, int]]) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    gold, predicted = zip(*pairs, strict=True)
    assert macro_f1(gold, predicted) == pytest.approx(metrics.f1_score(gold, predicted, average="macro", zero_division=0.0))


def test_aggregates() -> None:
    assert aggregate("accuracy", [1.0, 0.0, 1.0, 1.0], [0] * 4, [0] * 4) == 0.75
    assert aggregate("macro_f1", [1.0, 0.0], [0, 1], [0, 0]) == pytest.approx((2 / 3 + 0) / 2)
    assert aggregate("rouge_l", [0.25, 0.5], [-1, -1], [-1, -1]) == 0.375


def test_the_interval_is_students() -> None:
    mean, low, high = mean_interval([0.5, 0.6, 0.7])
    # t(0.975, 2) = 4.302653, standard error 0.1 / sqrt(3).
    assert mean == pytest.approx(0.6)
    assert high - mean == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
    assert mean - low == pytest.approx(high - mean)
    assert mean_interval([0.4, 0.4]) == pytest.approx((0.4, 0.4, 0.4))
    one = mean_interval([0.4])
    assert one[0] == 0.4
    assert math.isnan(one[1])
    assert math.isnan(one[2])


def test_the_bootstrap_interval_covers_the_mean_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        low, high = bootstrap_interval(draw.normal(1.0, 2.0, 60), draw=draw, num_resamples=400)
        covered += low <= 1.0 <= high
    assert abs(covered / 300 - 0.95) < 0.05
    same = bootstrap_interval([0.5] * 10, draw=draw)
    assert same == (0.5, 0.5)
    rows = np.array([[0.0, 1.0], [0.5, 0.5]])
    assert bootstrap_interval(rows, draw=draw) == (0.5, 0.5)
    first, second = (bootstrap_interval([0, 1, 1], draw=np.random.default_rng(3)) for _ in range(2))
    assert first == second


def test_normalisation_is_squads() -> None:
    """Against the words of SQuAD's evaluation script, written again."""

    def squad(text: str) -> str:
        text = "".join(letter for letter in text.lower() if letter not in set(r"""!"#$%&'()*+,-./:;<=>?@[\]^_`{|}~"""))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

    for left, right in [("The a-an", "aan"), ("It's  an\tox", "its ox"), ("theme", "me"), ("A.B", "ab"), ("the the", "the")]:
        same = squad(left) == squad(right) and bool(squad(left))
        assert score_answer("exact_match", left, [right]) == float(same)
