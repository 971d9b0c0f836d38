"""Which demonstrations: BM25 and embeddings rank, ties are broken by the order given, and only what fits is chosen."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyicl.errors import UserInputError
from manyicl.selection import Bm25Similarity, EmbeddingSimilarity, choose_nearest, draw_order, rank_nearest

LIBRARY = ["play some jazz", "play the radio", "book a flight to Rome", "what is the weather in Rome", "jazz jazz jazz", "?!"]


def bm25_score(query: str, text: str, library: list[str]) -> float:
    """Lucene's BM25 from its formula: idf = ln(1 + (N - n + 0.5) / (n + 0.5)), k1 = 1.5, b = 0.75."""
    words, documents = text.lower().split(), [entry.lower().split() for entry in library]
    mean_length = sum(map(len, documents)) / len(documents)
    total = 0.0
    for word in query.lower().split():
        containing = sum(word in document for document in documents)
        if not containing:
            continue
        count = words.count(word)
        rarity = math.log(1 + (len(documents) - containing + 0.5) / (containing + 0.5))
        total += rarity * count / (count + 1.5 * (1 - 0.75 + 0.75 * len(words) / mean_length))
    return total


def test_bm25_scores_follow_the_formula() -> None:
    library = LIBRARY[:5]
    query = "Jazz in Rome or the blues"
    (scores,) = Bm25Similarity(library).scores([query])
    assert scores == pytest.approx([bm25_score(query, text, library) for text in library], abs=1e-5)
    assert (scores > 0).tolist() == [True, True, True, True, True]


def test_bm25_looks_at_words_without_case_or_punctuation_one_letter_words_included() -> None:
    similarity = Bm25Similarity(["x + 1 = 2", "Y, Z!", "ROME."])
    found = [scores.argmax() for scores in similarity.scores(["solve X", "z", "rome?"])]
    assert found == [0, 1, 2]


@pytest.mark.parametrize("query", ["", "?!", "unheard words"])
def test_a_query_without_a_known_word_is_like_nothing(query: str) -> None:
    assert [scores.tolist() for scores in Bm25Similarity(LIBRARY).scores([query])] == [[0.0] * 6]


def test_a_library_without_a_word_is_like_nothing() -> None:
    assert [scores.tolist() for scores in Bm25Similarity(["?", ""]).scores(["jazz"])] == [[0.0, 0.0]]


def count_vowels(texts: list[str]) -> np.ndarray:
    return np.array([[text.count(vowel) for vowel in "aeiou"] for text in texts])


def test_embeddings_are_compared_by_their_cosine() -> None:
    similarity = EmbeddingSimilarity(["aa", "ae", "e", "xyz"], count_vowels)
    scores = list(similarity.scores(["aaaa", "aaee"]))
    assert scores[0] == pytest.approx([1, math.sqrt(0.5), 0, 0])
    assert scores[1] == pytest.approx([math.sqrt(0.5), 1, math.sqrt(0.5), 0])


@pytest.mark.parametrize(
    ("returned", "seen"),
    [
        (np.ones((2, 3)), r"shape \(2, 3\) for 3 texts, 6 of its numbers finite"),
        (np.ones(3), r"shape \(3,\) for 3 texts"),
        (np.array([[1.0], [np.nan], [2.0]]), r"shape \(3, 1\) for 3 texts, 2 of its numbers finite"),
    ],
)
def test_embeddings_of_another_shape_are_refused(returned: np.ndarray, seen: str) -> None:
    with pytest.raises(UserInputError, match=seen):
        EmbeddingSimilarity(["a", "b", "c"], lambda texts: returned)


def test_ranking_is_by_score_then_by_the_order_given() -> None:
    scores = np.array([0.0, 2.0, 0.0, 2.0, 1.0], dtype=np.float32)
    assert rank_nearest(scores, np.array([3, 2, 0, 1, 4]), num=4) == [3, 1, 4, 2]
    assert rank_nearest(scores, np.array([4, 1, 0, 2, 3]), num=9) == [1, 3, 4, 0, 2]


def test_the_nearest_stand_last_and_none_is_repeated() -> None:
    lengths = [5, 5, 5, 5, 5]
    assert choose_nearest([3, 1, 4, 0], lengths, num=3, max_tokens=100) == [4, 1, 3]
    assert choose_nearest([3, 1, 4, 0], lengths, num=3, max_tokens=100, excluded={1, 3}) == [0, 4]
    assert choose_nearest([3, 1, 4, 0], lengths, num=1, max_tokens=100, excluded={3}) == [1]


def test_what_does_not_fit_is_passed_over_whole() -> None:
    lengths = [4, 30, 6, 3]
    assert choose_nearest([1, 2, 0, 3], lengths, num=3, max_tokens=10) == [0, 2]
    assert choose_nearest([1, 2, 0, 3], lengths, num=3, max_tokens=9) == [2]
    assert choose_nearest([1, 2, 0, 3], lengths, num=4, max_tokens=9) == [3, 2]
    assert choose_nearest([1, 2, 0, 3], lengths, num=4, max_tokens=2) == []


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=12),
    num=st.integers(1, 12),
    max_tokens=st.integers(0, 100),
    data=st.data(),
)
def test_chosen_demonstrations_fit_and_are_the_nearest(
    lengths: list[int], num: int, max_tokens: int, data: st.DataObject
) -> None:
    ranking = data.draw(st.permutations(range(len(lengths))))
    excluded = data.draw(st.sets(st.sampled_from(ranking)))
    chosen = choose_nearest(ranking, lengths, num=num, max_tokens=max_tokens, excluded=excluded)
    candidates = [position for position in ranking if position not in excluded][:num]
    assert sum(lengths[position] for position in chosen) <= max_tokens
    assert chosen[::-1] == [position for position in candidates if position in chosen]
    if sum(lengths[position] for position in candidates) <= max_tokens:
        assert chosen[::-1] == candidates


def test_orders_are_pure_uniform_and_different() -> None:
    assert draw_order(50, seed=1, order=0) == draw_order(50, seed=1, order=0)
    orders = {
        tuple(draw_order(50, seed=seed, order=order, batch=batch)) for seed in (1, 2) for order in (0, 1) for batch in (0, 1)
    }
    assert len(orders) == 8
    assert all(sorted(order) == list(range(50)) for order in orders)
    first = Counter(draw_order(4, seed=seed, order=0)[0] for seed in range(4000))
    assert all(abs(count - 1000) < 4 * math.sqrt(4000 * 0.25 * 0.75) for count in first.values())
