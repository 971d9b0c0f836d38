"""The trie of labels: nodes, edges, what sees what, totals."""

import numpy as np

from manyicl.label_trie import build_trie, build_tries

T = 99
RED, ROSE, BLUE = (5, 9, T), (5, 7, T), (6, T)


def test_shared_beginnings_are_one_node_and_terminators_are_none() -> None:
    trie = build_trie([RED, ROSE, BLUE])
    assert trie.tokens == (5, 9, 7, 6)
    assert trie.parents == (-1, 0, 0, -1)
    assert trie.edges == ((0, 5), (1, 9), (2, T), (1, 7), (3, T), (0, 6), (4, T))
    assert trie.paths == ((0, 1, 2), (0, 3, 4), (5, 6))
    assert trie.depths.tolist() == [0, 1, 1, 0]
    assert trie.lengths.tolist() == [3, 3, 2]
    assert trie.num_answer_tokens == 3
    assert trie.edge_columns.tolist() == [0, 1, 2, 1, 3, 0, 4]
    assert trie.edge_tokens.tolist() == [5, 9, T, 7, T, 6, T]


def test_a_node_sees_itself_and_its_ancestors_only() -> None:
    assert build_trie([RED, ROSE, BLUE]).ancestors.astype(int).tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 0, 1, 0],
        [0, 0, 0, 1],
    ]


def test_a_label_that_begins_like_another_has_its_own_terminator() -> None:
    trie = build_trie([(5, T), (5, 9, T)])
    assert trie.tokens == (5, 9)
    assert trie.paths == ((0, 1), (0, 2, 3))
    assert trie.edges[1] == (1, T)
    assert trie.edges[3] == (2, T)


def test_totals_are_sums_or_means_along_paths() -> None:
    trie = build_trie([RED, ROSE, BLUE])
    edges = np.array([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0])
    assert trie.totals(edges).tolist() == [-6.0, -10.0, -13.0]
    assert trie.totals(edges, normalise=True).tolist() == [-2.0, -10.0 / 3, -6.5]


def test_the_same_list_of_labels_is_made_into_a_trie_once() -> None:
    shared, other = [RED, BLUE], [RED, BLUE]
    first, second, third = build_tries([shared, other, shared])
    assert first is third
    assert first is not second
    assert first.tokens == second.tokens
