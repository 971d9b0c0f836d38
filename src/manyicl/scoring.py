"""Exact label scores and greedy generation on top of a Prefix.

A label's score is the sum of the log-probabilities of all its tokens and the terminator. The labels of a query form a trie
(`label_trie`): the query is computed once and each shared beginning of labels once. Queries of all lengths stand in one row
without padding (`branching`). Cost: query and trie tokens through the model, with attention to the prefix; memory is bounded
by `max_batch_tokens`.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from manyicl.attention import Branches, use_shared_prefix_attention
from manyicl.branching import check_positions, flatten_branches, log_probabilities, plan_batches, query_branch
from manyicl.label_trie import LabelTrie, TokenIds, build_trie, build_tries
from manyicl.prefix import Prefix, run_branches

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
    for batch in plan_batches(model, lengths, [1] * len(queries), max_batch_tokens=max_batch_tokens):
        generated = _generate_batch(model, prefix, [queries[i] for i in batch], terminator_id, max_new_tokens)
        for index, answer in zip(batch, generated, strict=True):
            answers[index] = answer
    return answers


def _generate_batch(
    model: PreTrainedModel, prefix: Prefix, queries: Sequence[TokenIds], terminator_id: int, max_new_tokens: int
) -> list[TokenIds]:
    """Greedy answers of one batch; a branch that has reached its terminator leaves the batch."""
    device, width = model.device, max(map(len, queries))
    input_ids = torch.zeros(len(queries), width, dtype=torch.long, device=device)
    positions = torch.zeros_like(input_ids)
    mask = torch.eye(width, dtype=torch.bool, device=device).repeat(len(queries), 1, 1)
    real = torch.zeros(len(queries), width, dtype=torch.bool, device=device)
    for line, query in enumerate(queries):
        start = width - len(query)
        input_ids[line, start:] = torch.tensor(query, device=device)
        positions[line, start:] = torch.arange(len(query), device=device)
        mask[line, start:, start:] = torch.ones(len(query), len(query), dtype=torch.bool, device=device).tril()
        real[line, start:] = True
    positions += prefix.num_tokens
    branches = Branches(prefix=prefix.states, mask=mask)
    answers: list[list[int]] = [[] for _ in queries]
    active = list(range(len(queries)))
    for step in range(max_new_tokens):
        tokens = run_branches(model, input_ids, positions, branches, logits_to_keep=1)[:, -1].argmax(dim=-1)
        going = [line for line, token in enumerate(tokens.tolist()) if token != terminator_id]
        for line in going:
            answers[active[line]].append(int(tokens[line]))
        if not going or step + 1 == max_new_tokens:
            break
        if len(going) < len(active):
            kept = torch.tensor(going, device=device)
            tokens, positions, real = tokens[kept], positions[kept], real[kept]
            branches.past = {layer: (key[kept], value[kept]) for layer, (key, value) in branches.past.items()}
            active = [active[line] for line in going]
        input_ids, positions = tokens.unsqueeze(1), positions[:, -1:] + 1
        real = torch.cat([real, real.new_ones(len(active), 1)], dim=1)
        branches.mask = real.unsqueeze(1)
    return [tuple(answer) for answer in answers]
