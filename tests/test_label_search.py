"""Best-first search finds what the argmax of full scoring is, over random tries and architectures, ties included."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyicl import label_search
from manyicl.encoding import Encoder
from manyicl.errors import BudgetError, TaskError
from manyicl.label_search import find_best_labels
from manyicl.label_trie import build_trie
from manyicl.prefix import Prefix, prefill
from manyicl.scoring import score_labels
from manyicl.tasks.task import Example

T = 256
EMPTY = Prefix((), (0,), ())


@pytest.fixture(autouse=True)
def _search_small_tries_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_search, "SMALL_TRIE_NODES", 0)


def random_labels(rng: random.Random, most: int) -> list[tuple[int, ...]]:
    """Labels over four tokens, so that many share beginnings; some twice."""
    return [(*(rng.randrange(4) for _ in range(rng.randint(1, 5))), T) for _ in range(rng.randint(1, most))]


def assert_same_as_full_scoring(
    model: Any, prefix: Prefix, queries: list[Any], labels: list[Any], *, normalise: bool, **options: Any
) -> int:
    """Checks index and score of each query; the number of nodes that were computed."""
    full = score_labels(model, prefix, queries, labels, normalise=normalise)
    found = find_best_labels(model, prefix, queries, labels, normalise=normalise, **options)
    for scores, best in zip(full, found, strict=True):
        assert best.index == int(np.argmax(scores))
        assert best.log_probability == pytest.approx(float(scores.max()), abs=1e-4)
    return sum(best.num_nodes for best in found)


@settings(max_examples=8)
@given(seed=st.integers(0, 2**32), normalise=st.booleans(), width=st.sampled_from([1, 4, 64]))
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3", "gemma", "gemma2"])
def test_the_argmax_of_full_scoring_is_found(
    tiny_model: Callable[..., Any], byte_tokenizer: Any, architecture: str, seed: int, normalise: bool, width: int
) -> None:
    rng = random.Random(seed)
    model = tiny_model(architecture)
    prefix = prefill(model, Encoder(byte_tokenizer), [Example("ab", "c"), Example("d", "e")][: rng.randint(0, 2)])
    queries = [tuple(rng.randrange(256) for _ in range(rng.randint(1, 9))) for _ in range(rng.randint(1, 5))]
    labels = [random_labels(rng, 12) for _ in queries]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(label_search, "PASS_TOKENS", width)
        budget = rng.choice([None, 10])
        assert_same_as_full_scoring(model, prefix, queries, labels, normalise=normalise, max_batch_tokens=budget)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32), normalise=st.booleans())
def test_equal_scores_go_to_the_label_that_stands_first(tiny_model: Callable[..., Any], seed: int, normalise: bool) -> None:
    model, rng = tiny_model("llama", seed=3), random.Random(seed)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()  # Every token is as probable as any other.
    labels = random_labels(rng, 12)
    best = find_best_labels(model, EMPTY, [(7, 8, 9)], [labels], normalise=normalise)[0]
    shortest = min(map(len, labels))
    assert best.index == (0 if normalise else next(place for place, label in enumerate(labels) if len(label) == shortest))


def test_labels_with_the_same_tokens_tie_too(tiny_model: Callable[..., Any]) -> None:
    labels = [(4, T), (5, 6, T), (5, 6, T), (4, T)]
    assert find_best_labels(tiny_model(), EMPTY, [(1, 2)], [labels])[0].index in (0, 1)


def test_much_of_a_large_trie_is_never_computed(tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_search, "PASS_TOKENS", 1)
    rng = random.Random(0)
    labels = list(dict.fromkeys((*(rng.randrange(40) for _ in range(4)), T) for _ in range(150)))
    queries = [tuple(rng.randrange(256) for _ in range(5)) for _ in range(6)]
    num_nodes = len(build_trie(labels).tokens)
    model = tiny_model()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(10)  # As sure of its next token as a trained model.
    computed = assert_same_as_full_scoring(model, EMPTY, queries, [labels] * 6, normalise=False)
    assert num_nodes > 400
    assert computed < 0.6 * 6 * num_nodes


def test_an_active_sliding_window_is_scored_in_full(tiny_model: Callable[..., Any]) -> None:
    labels = [(4, 5, T), (6, T), (4, 7, 8, T)]
    query = tuple(range(30, 50))
    nodes = assert_same_as_full_scoring(tiny_model("gemma3"), EMPTY, [query], [labels], normalise=False)
    assert nodes == len(build_trie(labels).tokens)


def test_small_tries_are_scored_in_one_pass(tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_search, "SMALL_TRIE_NODES", 8)
    labels = [(4, T), (5, T)]
    found = find_best_labels(tiny_model(), EMPTY, [(1, 2)], [labels])[0]
    scores = score_labels(tiny_model(), EMPTY, [(1, 2)], [labels])[0]
    assert (found.index, found.log_probability, found.num_nodes) == (int(scores.argmax()), float(scores.max()), 2)


def test_a_query_without_labels_is_refused(tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(TaskError, match=r"query 1 of 2 has no labels. Give every query at least one label"):
        find_best_labels(tiny_model(), EMPTY, [(1,), (2,)], [[(3, T)], []])


def test_a_query_that_does_not_fit_is_refused(tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(BudgetError, match="query 0 and its answer take 12 tokens"):
        find_best_labels(tiny_model(max_position_embeddings=11), EMPTY, [tuple(range(10))], [[(3, T)]])


def test_no_queries_have_no_answers(tiny_model: Callable[..., Any]) -> None:
    assert find_best_labels(tiny_model(), EMPTY, [], []) == []
