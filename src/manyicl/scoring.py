"""Exact label scores and greedy generation on top of a Prefix.

A label's score is the sum of the log-probabilities of all its tokens and the terminator. The labels of a query form a trie
(`label_trie`): the query is computed once and each shared beginning of labels once. Queries of all lengths stand in one row
without padding (`branching`). Cost: query and trie tokens through the model, with attention to the prefix; memory is bounded
by `max_batch_tokens`. Queries of all batches are written together, in as much as an eighth of the free memory, at most 1 GiB.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from manyicl.attention import use_shared_prefix_attention
from manyicl.branching import (
    Branch,
    PastStates,
    check_positions,
    flatten_branches,
    log_probabilities,
    most_probable_tokens,
    plan_batches,
    plan_decoding,
    query_branch,
)
from manyicl.label_trie import LabelTrie, TokenIds, build_trie, build_tries
from manyicl.prefix import Prefix

__all__ = ["LabelTrie", "TokenIds", "build_trie", "generate_answers", "score_labels"]


@torch.inference_mode()
def score_labels(
    model: PreTrainedModel,
    prefix: Prefix,
    queries: Sequence[TokenIds],
    labels: Sequence[Sequence[TokenIds]],
    *,
    normalise: bool = False,
    max_batch_tokens: int | None = None,
) -> list[npt.NDArray[np.float64]]:
    """Log-probability of each label given the prefix and each query.

    Args:
        queries: Token ids of each query, up to the last token before the answer.
        labels: Token ids of each query's labels, terminators included; the same list object for all is encoded once.
        normalise: Divide by the number of tokens, terminator included.
        max_batch_tokens: Tokens in one forward pass at most; a single query may exceed it. None chooses from free memory.

    Returns:
        One array per query, [number of its labels], in natural logarithms.

    Raises:
        BudgetError: a query does not fit what is left of the model's positions; nothing is cut off.
    """
    use_shared_prefix_attention(model)
    tries = build_tries(labels)
    check_positions(model, prefix, [len(query) + trie.num_answer_tokens for query, trie in zip(queries, tries, strict=True)])
    lengths = [len(query) + len(trie.tokens) for query, trie in zip(queries, tries, strict=True)]
    scores: list[npt.NDArray[np.float64]] = [np.empty(0)] * len(queries)
    for batch in plan_batches(model, lengths, [1 + len(trie.tokens) for trie in tries], max_batch_tokens=max_batch_tokens):
        edges = _score_edges(model, prefix, [queries[i] for i in batch], [tries[i] for i in batch])
        for index, own in zip(batch, edges, strict=True):
            scores[index] = tries[index].totals(own, normalise=normalise)
    return scores


def _score_edges(
    model: PreTrainedModel, prefix: Prefix, queries: Sequence[TokenIds], tries: Sequence[LabelTrie]
) -> list[npt.NDArray[np.float64]]:
    """Log-probability of every edge of each query's trie, from one forward pass."""
    branches = [query_branch(query, trie) for query, trie in zip(queries, tries, strict=True)]
    row = flatten_branches(branches, prefix, model.device)
    ends = [int(start) + len(query) - 1 for start, query in zip(row.starts, queries, strict=True)]
    sources = np.concatenate([end + trie.edge_columns for end, trie in zip(ends, tries, strict=True)])
    tokens = np.concatenate([trie.edge_tokens for trie in tries])
    found = log_probabilities(model, row, sources, tokens)
    return np.split(found, np.cumsum([len(trie.edges) for trie in tries])[:-1])


@torch.inference_mode()
def generate_answers(
    model: PreTrainedModel,
    prefix: Prefix,
    queries: Sequence[TokenIds],
    *,
    terminator_id: int,
    max_new_tokens: int,
    max_batch_tokens: int | None = None,
) -> list[TokenIds]:
    """Greedy answers to each query, up to and without the terminator, at most `max_new_tokens` long.

    Raises:
        BudgetError: a query and its answer do not fit what is left of the model's positions.
    """
    use_shared_prefix_attention(model)
    check_positions(model, prefix, [len(query) + max_new_tokens for query in queries])
    answers: list[TokenIds] = [()] * len(queries)
    lengths = [len(query) for query in queries]
    batches = plan_batches(model, lengths, [1] * len(queries), max_batch_tokens=max_batch_tokens)
    for group in plan_decoding(model, batches, lengths, max_new_tokens, max_batch_tokens=max_batch_tokens):
        generated = _generate_group(model, prefix, queries, group, terminator_id, max_new_tokens)
        for index, answer in zip((index for batch in group for index in batch), generated, strict=True):
            answers[index] = answer
    return answers


def _generate_group(
    model: PreTrainedModel,
    prefix: Prefix,
    queries: Sequence[TokenIds],
    group: Sequence[Sequence[int]],
    terminator_id: int,
    max_new_tokens: int,
) -> list[TokenIds]:
    """Greedy answers to the queries of batches that are written together; one that has reached its terminator leaves."""
    lengths = np.array([len(queries[index]) for batch in group for index in batch])
    num_places = int(lengths.max()) + max_new_tokens
    own_places = num_places if len(group) == 1 else 0  # Those of several are copied.
    read = [_read_queries(model, prefix, [queries[index] for index in batch], own_places) for batch in group]
    tokens = np.concatenate([own for _, own in read])
    seen = np.arange(lengths.max()) < lengths[:, None]
    past = read[0][0]
    if len(read) > 1:
        own_lines = np.split(seen, np.cumsum([len(batch) for batch in group])[:-1])
        past, seen = PastStates.join([(own, lines) for (own, _), lines in zip(read, own_lines, strict=True)], max_new_tokens)
    del read
    answers: list[list[int]] = [[] for _ in lengths]
    active = np.arange(len(lengths))
    for step in range(max_new_tokens):
        going = np.flatnonzero(tokens != terminator_id)
        for line in going:
            answers[active[line]].append(int(tokens[line]))
        if not len(going) or step + 1 == max_new_tokens:
            break
        if len(going) < len(active):
            kept = past.keep(going.tolist())
            active, tokens, seen = active[kept], tokens[kept], seen[kept]
        seen = np.concatenate([seen, np.ones((len(active), 1), dtype=bool)], axis=1)
        branches = [
            Branch(tokens[line : line + 1], lengths[index : index + 1] + step, seen[line : line + 1])
            for line, index in enumerate(active)
        ]
        row = flatten_branches(branches, prefix, model.device, past=past)
        tokens = np.array(most_probable_tokens(model, row, row.starts))
    return [tuple(answer) for answer in answers]


def _read_queries(
    model: PreTrainedModel, prefix: Prefix, queries: Sequence[TokenIds], num_places: int
) -> tuple[PastStates, npt.NDArray[np.int64]]:
    """One pass over the queries of a batch: their keys and values, and the first token after each."""
    past = PastStates(num_places)
    row = flatten_branches([query_branch(query) for query in queries], prefix, model.device, past=past)
    ends = row.starts + np.array([len(query) for query in queries]) - 1
    return past, np.array(most_probable_tokens(model, row, ends))
