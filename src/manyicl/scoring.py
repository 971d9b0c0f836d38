"""Exact label scores and greedy generation on top of a Prefix.

A label's score is the sum of the log-probabilities of all its tokens and the terminator. The labels of a query form a trie:
the query is computed once and each shared beginning of labels once.

    labels   "red" = [5, 9, T]   "rose" = [5, 7, T]   "blue" = [6, T]
    branch   … query | 5   6   9   7             (terminators are predicted, never fed)
    sees       all     q   q   q,5 q,5

    column     query end  5    6    9    7       logits kept, [1 + M]
    predicts   5, 6       9,7  T    T    T

Letters: B branches (one a query), M trie nodes, V vocabulary. Queries are padded on the left, so that the columns whose
logits are needed are the last 1 + M of every branch; padding is masked by position. Cost: query and trie tokens through the
model, with attention to the prefix; memory is bounded by `max_batch_tokens` and `MAX_LOGIT_BYTES`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from manyicl.attention import Branches, use_shared_prefix_attention
from manyicl.errors import BudgetError
from manyicl.prefix import Prefix, run_branches

MAX_LOGIT_BYTES = 256 * 2**20

TokenIds = tuple[int, ...]


@dataclass(frozen=True)
class LabelTrie:
    """The labels of a query as a tree of tokens.

    Attributes:
        tokens: Token of each node that is fed, [M]; parents stand before children.
        parents: Parent of each node, -1 for the query's last token, [M].
        edges: (column, token) pairs whose log-probability is needed; column 0 is the query's last token, 1 + i is node i.
        paths: For each label, the indices of its edges.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    edges: tuple[tuple[int, int], ...]
    paths: tuple[tuple[int, ...], ...]

    @property
    def depths(self) -> list[int]:
        """Distance of each node from the query's last token, minus one."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return depths

    def ancestors(self) -> npt.NDArray[np.bool_]:
        """Whether node i sees node j (itself and its ancestors): bool [M, M]."""
        seen = np.eye(len(self.tokens), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node] |= seen[parent]
        return seen


def build_trie(labels: Sequence[TokenIds]) -> LabelTrie:
    """The trie of label token ids; each label ends with the terminator, which is an edge but no node."""
    tokens: list[int] = []
    parents: list[int] = []
    nodes: dict[TokenIds, int] = {(): -1}
    edges: dict[tuple[int, int], int] = {}
    paths = []
    for label in labels:
        path = []
        for place, token in enumerate(label):
            front = label[:place]
            if front not in nodes:
                nodes[front] = len(tokens)
                tokens.append(front[-1])
                parents.append(nodes[front[:-1]])
            path.append(edges.setdefault((nodes[front] + 1, token), len(edges)))
        paths.append(tuple(path))
    return LabelTrie(tuple(tokens), tuple(parents), tuple(edges), tuple(paths))


@torch.inference_mode()
def score_labels(
    model: PreTrainedModel,
    prefix: Prefix,
    queries: Sequence[TokenIds],
    labels: Sequence[Sequence[TokenIds]],
    *,
    normalise: bool = False,
    max_batch_tokens: int = 4096,
) -> list[npt.NDArray[np.float64]]:
    """Log-probability of each label given the prefix and each query.

    Args:
        queries: Token ids of each query, up to the last token before the answer.
        labels: Token ids of each query's labels, terminators included; the same list object for all is encoded once.
        normalise: Divide by the number of tokens, terminator included.
        max_batch_tokens: Tokens in one forward pass, padding included, at most; a single query may exceed it.

    Returns:
        One array per query, [number of its labels], in natural logarithms.

    Raises:
        BudgetError: a query does not fit what is left of the model's positions; nothing is cut off.
    """
    use_shared_prefix_attention(model)
    tries: dict[int, LabelTrie] = {}
    per_query = [tries.get(id(own)) or tries.setdefault(id(own), build_trie(own)) for own in labels]
    longest = [len(query) + max(trie.depths, default=0) + 1 for query, trie in zip(queries, per_query, strict=True)]
    _check_positions(model, prefix, longest)
    scores: list[npt.NDArray[np.float64]] = [np.empty(0)] * len(queries)
    vocabulary = int(model.config.get_text_config().vocab_size)
    shapes = [(len(query), len(trie.tokens)) for query, trie in zip(queries, per_query, strict=True)]
    for batch in _batches(shapes, max_batch_tokens, MAX_LOGIT_BYTES // (4 * vocabulary)):
        probabilities = _score_edges(model, prefix, [queries[i] for i in batch], [per_query[i] for i in batch])
        for line, index in enumerate(batch):
            edges = probabilities[line]
            totals = np.array([edges[list(path)].sum() for path in per_query[index].paths])
            lengths = np.array([len(path) for path in per_query[index].paths])
            scores[index] = totals / lengths if normalise else totals
    return scores


def _check_positions(model: PreTrainedModel, prefix: Prefix, lengths: Sequence[int]) -> None:
    limit = int(model.config.get_text_config().max_position_embeddings)
    if lengths and prefix.num_tokens + max(lengths) > limit:
        raise BudgetError(
            f"query {int(np.argmax(lengths))} and its answer take {max(lengths)} tokens after a prefix of {prefix.num_tokens}, "
            f"more than the model's {limit} positions. Use fewer demonstrations; queries are never cut."
        )


def _batches(shapes: Sequence[tuple[int, int]], max_tokens: int, max_logits: int) -> Iterator[list[int]]:
    """Indices of branches of (query, answer) lengths, in batches of similar length that keep both limits."""
    order = sorted(range(len(shapes)), key=lambda index: shapes[index])
    batch: list[int] = []
    for index in order:
        candidate = [*batch, index]
        query, nodes = max(shapes[i][0] for i in candidate), max(shapes[i][1] for i in candidate)
        too_many = len(candidate) * (query + nodes) > max_tokens or len(candidate) * (1 + nodes) > max_logits
        if batch and too_many:
            yield batch
            candidate = [index]
        batch = candidate
    if batch:
        yield batch


def _score_edges(
    model: PreTrainedModel, prefix: Prefix, queries: Sequence[TokenIds], tries: Sequence[LabelTrie]
) -> list[npt.NDArray[np.float64]]:
    """Log-probability of every edge of each query's trie, from one forward pass."""
    width, nodes = max(map(len, queries)), max(len(trie.tokens) for trie in tries)
    length = width + nodes
    input_ids = np.zeros((len(queries), length), dtype=np.int64)
    positions = np.zeros_like(input_ids)
    mask = np.zeros((len(queries), length, length), dtype=bool)
    mask[:] = np.eye(length, dtype=bool)  # Padding sees itself, as a row without a key has no softmax.
    for line, (query, trie) in enumerate(zip(queries, tries, strict=True)):
        start, stop = width - len(query), width + len(trie.tokens)
        input_ids[line, start:width] = query
        input_ids[line, width:stop] = trie.tokens
        positions[line, start:width] = np.arange(len(query))
        positions[line, width:stop] = len(query) + np.array(trie.depths, dtype=np.int64)
        mask[line, start:width, start:width] = np.tri(len(query), dtype=bool)
        mask[line, width:stop, start:width] = True
        mask[line, width:stop, width:stop] = trie.ancestors()
    device = model.device
    branches = Branches(prefix=list(prefix.states), mask=torch.from_numpy(mask).to(device))
    logits = run_branches(
        model,
        torch.from_numpy(input_ids).to(device),
        torch.from_numpy(positions).to(device) + prefix.num_tokens,
        branches,
        logits_to_keep=1 + nodes,
    ).float()
    normaliser = logits.logsumexp(dim=-1)
    results = []
    for line, trie in enumerate(tries):
        columns = torch.tensor([column for column, _ in trie.edges], device=device)
        tokens = torch.tensor([token for _, token in trie.edges], device=device)
        results.append((logits[line, columns, tokens] - normaliser[line, columns]).double().cpu().numpy())
    return results


@torch.inference_mode()
def generate_answers(
    model: PreTrainedModel,
    prefix: Prefix,
    queries: Sequence[TokenIds],
    *,
    terminator_id: int,
    max_new_tokens: int,
    max_batch_tokens: int = 16384,
) -> list[TokenIds]:
    """Greedy answers to each query, up to and without the terminator, at most `max_new_tokens` long.

    Raises:
        BudgetError: a query and its answer do not fit what is left of the model's positions.
    """
    use_shared_prefix_attention(model)
    _check_positions(model, prefix, [len(query) + max_new_tokens for query in queries])
    answers: list[TokenIds] = [()] * len(queries)
    vocabulary = int(model.config.get_text_config().vocab_size)
    shapes = [(len(query), 0) for query in queries]
    for batch in _batches(shapes, max_batch_tokens, MAX_LOGIT_BYTES // (4 * vocabulary)):
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
    branches = Branches(prefix=list(prefix.states), mask=mask)
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
