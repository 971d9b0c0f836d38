"""How answers are judged: scores per answer, aggregates and intervals, all on 0-1. Loads no torch.

`exact_match` and `token_f1` normalise as SQuAD's evaluation does (Rajpurkar et al., 2016). `rouge_l` is the F-measure of the
longest common subsequence of lower-cased words (Lin, 2004) without stemming, so it can differ from the rouge_score package
with its stemmer. `macro_f1` averages over the labels that occur in gold or predictions, and a label never predicted has F1 0.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import stats

from manyicl.tasks.task import Metric

_ARTICLES = re.compile(r"\b(a|an|the)\b")
# A minus right after a number, a letter or a bracket subtracts; it is no sign.
_NUMBER = re.compile(r"(?:(?<![\w.)\]])-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?:\s*/\s*\d+)?")
_WORD = re.compile(r"\w+")


def score_answer(metric: Metric, prediction: str, accepted: Sequence[str]) -> float:
    """The score of one answer, the best over all accepted ones."""
    judge = {
        "accuracy": _exact_match,
        "macro_f1": _exact_match,
        "exact_match": _exact_match,
        "token_f1": _token_f1,
        "rouge_l": _rouge_l,
        "numeric_match": _numeric_match,
    }[metric]
    return max(judge(prediction, gold) for gold in accepted)


def aggregate(metric: Metric, scores: Sequence[float], gold: Sequence[int], predicted: Sequence[int]) -> float:
    """The value of a metric over queries: macro-F1 from label indices, the mean of the scores otherwise."""
    return macro_f1(gold, predicted) if metric == "macro_f1" else float(np.mean(scores))


def macro_f1(gold: Sequence[int], predicted: Sequence[int]) -> float:
    """Mean F1 over the labels that occur in `gold` or `predicted`; a label with no true positive has F1 0."""
    values = []
    for label in set(gold) | set(predicted):
        true = sum(g == label == p for g, p in zip(gold, predicted, strict=True))
        wrong = sum((g == label) != (p == label) for g, p in zip(gold, predicted, strict=True))
        values.append(2 * true / (2 * true + wrong))
    return float(np.mean(values))


def mean_interval(values: Sequence[float], *, confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean, and the ends of Student's t interval over independent values; the interval of one value is undefined (nan)."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, float("nan"), float("nan")
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1)) * float(stats.sem(values))
    return mean, mean - half, mean + half


def bootstrap_interval(
    values: npt.ArrayLike, *, draw: np.random.Generator, confidence: float = 0.95, num_resamples: int = 2000
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean over the first axis of `values`."""
    array = np.asarray(values, dtype=float)
    means = array[draw.integers(0, len(array), (num_resamples, len(array)))].reshape(num_resamples, -1).mean(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _normalise(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def _exact_match(prediction: str, gold: str) -> float:
    """Equality after normalisation; answers that are punctuation alone are compared as they stand."""
    left, right = _normalise(prediction), _normalise(gold)
    return float(left == right) if left or right else float(prediction.strip() == gold.strip())


def _token_f1(prediction: str, gold: str) -> float:
    left, right = _normalise(prediction).split(), _normalise(gold).split()
    if not left or not right:
        return _exact_match(prediction, gold)
    shared = sum((Counter(left) & Counter(right)).values())
    return 2 * shared / (len(left) + len(right))


def _rouge_l(prediction: str, gold: str) -> float:
    left, right = _WORD.findall(prediction.lower()), _WORD.findall(gold.lower())
    if not left or not right:
        return float(prediction.strip() == gold.strip())
    return 2 * _longest_common_subsequence(left, right) / (len(left) + len(right))


def _longest_common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    lengths = [0] * (len(right) + 1)
    for word in left:
        diagonal = 0
        for place, other in enumerate(right, 1):
            above = lengths[place]
            lengths[place] = diagonal + 1 if word == other else max(above, lengths[place - 1])
            diagonal = above
    return lengths[-1]


def read_number(text: str) -> float | None:
    """The last number written in a text: signs, thousands commas, decimals, powers of ten and fractions are understood."""
    found: list[str] = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    if not found:
        return None
    numerator, _, denominator = found[-1].replace(",", "").partition("/")
    if denominator and float(denominator) == 0:
        return None
    return float(numerator) / float(denominator or 1)


def _numeric_match(prediction: str, gold: str) -> float:
    """Equality of numbers, but for what rounding leaves: 0.333333 is 1/3, and 1000001 is not 1000000."""
    left, right = read_number(prediction), read_number(gold)
    return float(left is not None and right is not None and abs(left - right) <= max(1e-6, 1e-9 * abs(right)))
