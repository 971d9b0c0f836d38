"""Contrasts: values by hand, intervals against plain loops, pairing, and what is read where shots do not fit."""

import numpy as np
import pytest

from manyicl.metrics import macro_f1
from manyicl.records import EvaluationRecord, QueryScores
from manyicl.results.contrasts import (
    Cells,
    Estimate,
    Term,
    _resampled_values,
    estimate,
    headline_draws,
    headline_value,
    majority_value,
    ratio_estimate,
    task_estimate,
    task_value,
    terms_at,
    verdict,
)


def make(task="alpha", *, family="classification", metric="accuracy", model="ours", shots=4, seed=0, **fields):
    """A record of ten queries whose predictions are right at the places in `right`."""
    gold = fields.pop("gold", [number % 2 for number in range(10)])
    right = fields.pop("right", range(10))
    predicted = [label if place in right else 1 - label for place, label in enumerate(gold)]
    scores = [float(label == guess) for label, guess in zip(gold, predicted, strict=True)]
    value = macro_f1(gold, predicted) if metric == "macro_f1" else float(np.mean(scores))
    content = {
        "method": "ours",
        "model": model,
        "task": task,
        "family": family,
        "role": "held_out",
        "metric": metric,
        "shots": shots,
        "num_demonstrations": shots if isinstance(shots, int) else 9,
        "seed": seed,
        "value": value,
        "num_queries": len(gold),
        "prefix_tokens": 0,
        "query_tokens": 0,
        "seconds": 0.0,
        "prefill_seconds": 0.0,
        "fingerprint": "f",
        "queries": QueryScores(ids=list(range(len(gold))), scores=scores, gold=gold, predicted=predicted),
    }
    return EvaluationRecord.model_validate(content | fields)


def test_the_headline_is_the_mean_over_families_of_means_over_tasks():
    tasks = {
        "a": [Term(1.0, [make("a", right=range(4)), make("a", right=range(6), seed=1)])],  # 50
        "b": [Term(1.0, [make("b", right=range(10))])],  # 100
        "c": [Term(1.0, [make("c", family="nli", right=range(1))])],  # 10
    }
    assert task_value(tasks["a"]) == pytest.approx(50.0)
    assert headline_value(tasks) == pytest.approx((75.0 + 10.0) / 2)


def test_a_difference_of_a_model_with_itself_is_zero_in_every_draw():
    records = [make(right=range(5)), make(right=range(7), seed=1)]
    draws = headline_draws({"alpha": [Term(1.0, records), Term(-1.0, records)]}, num_draws=200)
    assert draws.tolist() == [0.0] * 200


def test_paired_draws_are_those_of_the_differences_of_queries():
    """Model b is right where a is and at one more query: the difference is 10 points times how often that query is drawn."""
    left, right = make(right=range(5)), make(model="b", right=range(6))
    draws = headline_draws({"alpha": [Term(1.0, [right]), Term(-1.0, [left])]}, num_draws=4000)
    assert set(np.round(draws, 6)) <= {10.0 * count for count in range(11)}
    assert draws.mean() == pytest.approx(10.0, abs=0.6)
    found = task_estimate([Term(1.0, [right]), Term(-1.0, [left])])
    assert (found.value, found.low, found.high) == (pytest.approx(10.0), 0.0, pytest.approx(30.0))


def test_the_interval_of_one_task_is_that_of_the_binomial():
    gold = [0] * 100
    record = make(gold=gold, right=range(60))
    found = estimate({"alpha": [Term(1.0, [record])]}, num_draws=4000)
    assert found.value == pytest.approx(60.0)
    assert (found.low, found.high) == (pytest.approx(50.4, abs=1.0), pytest.approx(69.6, abs=1.0))


def test_tasks_are_drawn_within_their_family():
    """One family of a certain and an impossible task: 0, 50 or 100 as they are drawn; the other family always 50."""
    tasks = {
        "a": [Term(1.0, [make("a", right=range(10))])],
        "b": [Term(1.0, [make("b", right=())])],
        "c": [Term(1.0, [make("c", family="nli", gold=[0] * 10, right=range(10))])],
    }
    draws = headline_draws(tasks, num_draws=2000)
    values, counts = np.unique(np.round(draws, 6), return_counts=True)
    assert values.tolist() == [50.0, 75.0, 100.0]
    assert counts / 2000 == pytest.approx([0.25, 0.5, 0.25], abs=0.04)


def test_orders_are_drawn_alike_for_all_terms():
    """Both models swing alike from order to order, so that their difference does not."""
    left = [make(gold=[0] * 10, right=range(10)), make(gold=[0] * 10, right=(), seed=1)]
    right = [record.model_copy(update={"model": "b"}) for record in left]
    alone = headline_draws({"alpha": [Term(1.0, left)]}, num_draws=500)
    together = headline_draws({"alpha": [Term(1.0, left), Term(-1.0, right)]}, num_draws=500)
    assert set(alone) == {0.0, 50.0, 100.0}
    assert set(together) == {0.0}


def test_macro_f1_of_a_draw_is_that_of_its_queries():
    draw = np.random.default_rng(0)
    gold = draw.integers(0, 3, 30).tolist()
    predicted = draw.integers(0, 4, 30).tolist()
    record = make(metric="macro_f1").model_copy(
        update={
            "num_queries": 30,
            "queries": QueryScores(ids=list(range(30)), scores=[0.0] * 30, gold=gold, predicted=predicted),
        }
    )
    queries = draw.integers(0, 30, (50, 30))
    expected = [macro_f1([gold[i] for i in line], [predicted[i] for i in line]) for line in queries]
    assert _resampled_values(record, queries) == pytest.approx(expected)


def test_cells_of_different_queries_are_not_paired():
    short = make(gold=[0, 1], right=range(2))
    with pytest.raises(ValueError, match="alpha: cells of 10 and other numbers of queries"):
        headline_draws({"alpha": [Term(1.0, [make()]), Term(-1.0, [short])]})


def test_a_ratio_is_taken_draw_by_draw():
    gained, whole = make(right=range(4)), make(model="b", right=range(8))
    zero = make(model="base", right=())
    numerator = {"alpha": [Term(1.0, [gained]), Term(-1.0, [zero])]}
    denominator = {"alpha": [Term(1.0, [whole]), Term(-1.0, [zero])]}
    found = ratio_estimate(numerator, numerator)
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)
    half = ratio_estimate(numerator, denominator)
    assert half.value == pytest.approx(0.5)
    assert 0.0 <= half.low < 0.4 < 0.6 < half.high <= 1.0  # Right at a part of the same queries, so never above one.


def test_a_ratio_over_a_gain_that_may_be_none_has_no_interval():
    one, two = make(right=range(1)), make(model="b", right=range(2))
    base = {"alpha": [Term(1.0, [one])]}
    found = ratio_estimate({"alpha": [Term(1.0, [two])]}, base)
    assert found.value == pytest.approx(2.0)
    assert found.as_json() == {"value": 2.0, "low": None, "high": None, "num_tasks": 1}


@pytest.mark.parametrize(("metric", "expected"), [("accuracy", 70.0), ("macro_f1", 100 * macro_f1([0] * 7 + [1] * 3, [0] * 10))])
def test_the_majority_label(metric, expected):
    assert majority_value(make(gold=[0] * 7 + [1] * 3, metric=metric)) == pytest.approx(expected)


def test_shots_that_do_not_fit_are_read_at_what_fits():
    records = [make(shots=4), make(shots="max", num_demonstrations=9, right=range(3))]
    cells = Cells(records)
    assert cells.find("ours", "alpha", 4) == [records[0]]
    assert cells.find("ours", "alpha", 16) == [records[1]]
    assert cells.find("ours", "alpha", 8) == []  # Would fit, and was not evaluated.
    assert cells.find("ours", "alpha", 4, condition="symbols") == []


def test_of_two_records_of_an_order_the_first_counts():
    """Orders are paired by their place, so a record that is there twice would move those after it."""
    records = [make(seed=1, right=range(3)), make(seed=0, right=range(8)), make(seed=0, right=range(2)), make(seed=1)]
    found = Cells(records).find("ours", "alpha", 4)
    assert [(record.seed, record.value) for record in found] == [(0, 0.8), (1, 0.3)]
    assert len(Cells(records).of_method("ours", "alpha")) == 2
    assert len(Cells([make(), make(condition="chat"), make(shots=0), make(model="other")]).of_method("ours", "alpha")) == 4


def test_a_contrast_with_a_missing_cell_is_empty():
    cells = Cells([make(shots=4), make("beta", shots=4), make(shots=4, model="b")])
    assert set(terms_at(cells, ["alpha", "beta"], [(1.0, "ours", 4)])) == {"alpha", "beta"}
    assert terms_at(cells, ["alpha", "beta"], [(1.0, "ours", 4), (-1.0, "b", 4)]) == {}


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0.1, 2, "holds"), (-2, -0.1, "fails"), (-1, 1, "not shown"), (0, 1, "not shown")]
)
def test_verdicts(low, high, expected):
    assert verdict(Estimate(0.5, low, high, 3)) == expected
