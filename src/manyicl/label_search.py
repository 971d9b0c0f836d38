"""The best label of each query, exactly, without computing every label.

A log-probability is never positive, so the sum over a partial path bounds every label that continues it. The most probable
partial path is extended first, and a query is finished when no open path can beat the best whole label any more. What comes
back is what the argmax of `score_labels` would be; equal scores go to the label that stands first.

    query │ root ─┬─ card −0.9 ─┬─ arrival −1.4 ── T −1.6   found: the best whole label
          │       │             └─ lost −3.1                 open, can only get worse: never computed
          │       └─ transfer −2.2                           open, can only get worse: never computed

Wins for large label sets (from about 30 labels on); scores of the other labels are not known. Costs several passes over few
tokens in place of one pass over all; all unfinished queries share each pass.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from transformers import PreTrainedModel

from manyicl.attention import use_shared_prefix_attention
from manyicl.branching import (
    Branch,
    PastStates,
    check_positions,
    flatten_branches,
    log_probabilities,
    plan_batches,
    query_branch,
)
from manyicl.errors import TaskError
from manyicl.label_trie import LabelTrie, TokenIds, build_tries
from manyicl.prefix import Prefix
from manyicl.scoring import score_labels

# A pass over fewer tokens takes as long as one over these: it is the weights that are read.
PASS_TOKENS = 32
SMALL_TRIE_NODES = 8

ROOT = -1


@dataclass(frozen=True, slots=True)
class BestLabel:
    """The label of the highest score.

    Attributes:
        index: Which of the query's labels.
        log_probability: Its score, as `score_labels` gives it.
        num_nodes: Trie nodes that were computed for this query.
    """

    index: int
    log_probability: float
    num_nodes: int


@torch.inference_mode()
def find_best_labels(
    model: PreTrainedModel,
    prefix: Prefix,
    queries: Sequence[TokenIds],
    labels: Sequence[Sequence[TokenIds]],
    *,
    normalise: bool = False,
    max_batch_tokens: int | None = None,
) -> list[BestLabel]:
    """The label of the highest score for each query: the argmax of `score_labels` with the same arguments.

    Args:
        normalise: Compare means over tokens. An open path is then bounded by its sum over the length of the longest label
            behind it, a weaker bound: more nodes are computed.

    Raises:
        TaskError: a query has no labels.
        BudgetError: a query does not fit what is left of the model's positions.
    """
    if not all(len(own) for own in labels):
        empty = next(place for place, own in enumerate(labels) if not len(own))
        raise TaskError(f"query {empty} of {len(queries)} has no labels. Give every query at least one label.")
    use_shared_prefix_attention(model)
    tries = build_tries(labels)
    longest = [len(query) + trie.num_answer_tokens for query, trie in zip(queries, tries, strict=True)]
    check_positions(model, prefix, longest)
    small = max((len(trie.tokens) for trie in tries), default=0) <= SMALL_TRIE_NODES
    if small or _window_is_active(model, prefix.num_tokens + max(longest)):
        scores = score_labels(model, prefix, queries, labels, normalise=normalise, max_batch_tokens=max_batch_tokens)
        best = [int(own.argmax()) for own in scores]
        return [
            BestLabel(index, float(own[index]), len(trie.tokens)) for index, own, trie in zip(best, scores, tries, strict=True)
        ]
    found: list[BestLabel] = [BestLabel(-1, 0.0, 0)] * len(queries)
    maps = {id(trie): _TrieMap(trie) for trie in tries}
    lengths = [len(query) for query in queries]
    for batch in plan_batches(model, lengths, [1] * len(queries), max_batch_tokens=max_batch_tokens):
        searches = [_Search(queries[i], maps[id(tries[i])], normalise) for i in batch]
        _search_batch(model, prefix, searches)
        for index, search in zip(batch, searches, strict=True):
            found[index] = search.result()
    return found


def _window_is_active(model: PreTrainedModel, num_tokens: int) -> bool:
    """Whether a sliding window hides tokens; distances are then counted along chains, which the past of a search is not."""
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    return window is not None and num_tokens > int(window)


@dataclass(frozen=True)
class _TrieMap:
    """What a search asks of a trie, by column: 0 for the query's last token, 1 + i for node i."""

    trie: LabelTrie

    @cached_property
    def leaving(self) -> list[list[tuple[int, int, int]]]:
        """For each column, its edges as (token, node it leads to or -1, lowest label that ends with it or -1)."""
        nodes = {(parent + 1, token): node for node, (parent, token) in enumerate(zip(self.trie.parents, self.trie.tokens))}  # noqa: B905
        ends: dict[int, int] = {}
        for label, path in enumerate(self.trie.paths):
            ends.setdefault(path[-1], label)
        leaving: list[list[tuple[int, int, int]]] = [[] for _ in range(1 + len(self.trie.tokens))]
        for edge, (column, token) in enumerate(self.trie.edges):
            leaving[column].append((token, nodes.get((column, token), -1), ends.get(edge, -1)))
        return leaving

    @cached_property
    def longest(self) -> list[int]:
        """For each column, tokens of the longest label behind it."""
        return [max(lengths) for lengths, _ in self._behind]

    @cached_property
    def first(self) -> list[int]:
        """For each column, the lowest label behind it."""
        return [min(labels) for _, labels in self._behind]

    @cached_property
    def _behind(self) -> list[tuple[list[int], list[int]]]:
        """For each column, the lengths and the indices of the labels behind it."""
        behind: list[tuple[list[int], list[int]]] = [([], []) for _ in self.leaving]
        for label, path in enumerate(self.trie.paths):
            for edge in path:
                column = self.trie.edges[edge][0]
                behind[column][0].append(len(path))
                behind[column][1].append(label)
        return behind


class _Search:
    """The state of one query's search: open paths, best whole label, and where its nodes' keys and values lie."""

    def __init__(self, query: TokenIds, trie_map: _TrieMap, normalise: bool) -> None:
        self.query = query
        self.map = trie_map
        self.normalise = normalise
        self.sums = {ROOT: 0.0}
        self.places: dict[int, int] = {}
        # Entries (-bound, lowest label behind it, node): the highest bound first, then the label that stands first.
        self.open: list[tuple[float, int, int]] = []
        self.best: tuple[float, int] = (float("inf"), 0)

    def result(self) -> BestLabel:
        """The best label; only once the search is finished."""
        return BestLabel(self.best[1], -self.best[0], len(self.places))

    def is_finished(self) -> bool:
        """Whether no open path can hold a better label, or an equal one that stands earlier."""
        return not self.open or self.open[0][:2] >= self.best

    def choose(self, width: int) -> list[int]:
        """The next nodes to compute, at most `width`, parents first, in the order of their bounds.

        Beyond the best open node, the only continuation of a node that is being computed is taken to be as good as the node:
        a guess that saves passes and changes no result.
        """
        chosen: list[int] = []
        guesses: list[tuple[float, int, int]] = []
        while len(chosen) < width:
            source = self.open if not guesses or (self.open and self.open[0] <= guesses[0]) else guesses
            if not source or source[0][:2] >= self.best:
                break
            bound, label, node = heapq.heappop(source)
            chosen.append(node)
            following = [child for _, child, _ in self.map.leaving[1 + node] if child >= 0]
            if len(following) == 1:
                heapq.heappush(guesses, (bound, label, following[0]))
        return chosen

    def branch(self, nodes: Sequence[int], num_past: int) -> Branch:
        """The tokens of chosen nodes, after `num_past` places of earlier passes."""
        trie = self.map.trie
        visible = np.zeros((len(nodes), num_past + len(nodes)), dtype=bool)
        visible[:, : len(self.query)] = True
        for line, node in enumerate(nodes):
            self.places[node] = num_past + line
            parent = trie.parents[node]
            if parent >= 0:
                place = self.places[parent]
                if place >= num_past:
                    visible[line] = visible[place - num_past]
                else:
                    visible[line, [self.places[seen] for seen in self._chain(parent)]] = True
            visible[line, num_past + line] = True
        tokens = np.array([trie.tokens[node] for node in nodes], dtype=np.int64)
        return Branch(tokens, len(self.query) + trie.depths[list(nodes)], visible)

    def _chain(self, node: int) -> list[int]:
        chain = []
        while node >= 0:
            chain.append(node)
            node = self.map.trie.parents[node]
        return chain

    def take(self, node: int, log_probabilities: Sequence[float], chosen: set[int]) -> None:
        """Note the log-probability of each edge that leaves a computed node; `chosen` are the nodes of the same pass."""
        for (_, child, label), value in zip(self.map.leaving[1 + node], log_probabilities, strict=True):
            total = self.sums[node] + value
            if label >= 0:
                length = self.map.trie.lengths[label] if self.normalise else 1
                self.best = min(self.best, (-total / length, label))
            if child >= 0:
                self.sums[child] = total
                if child not in chosen:
                    length = self.map.longest[1 + child] if self.normalise else 1
                    heapq.heappush(self.open, (-total / length, self.map.first[1 + child], child))


def _search_batch(model: PreTrainedModel, prefix: Prefix, searches: Sequence[_Search]) -> None:
    """Run the searches to their end; each pass computes the next nodes of all that are unfinished."""
    past = PastStates(max(len(search.query) for search in searches) + PASS_TOKENS)
    branches = [query_branch(search.query) for search in searches]
    chosen = [[ROOT] for _ in searches]
    _pass(model, prefix, searches, branches, chosen, past)
    num_past = max(len(search.query) for search in searches)
    active = list(searches)
    while True:
        going = [line for line, search in enumerate(active) if not search.is_finished()]
        if not going:
            return
        if len(going) < len(active):
            active = [active[line] for line in past.keep(going)]
        width = max(1, PASS_TOKENS // len(active))
        chosen = [search.choose(width) for search in active]
        branches = [search.branch(nodes, num_past) for search, nodes in zip(active, chosen, strict=True)]
        _pass(model, prefix, active, branches, chosen, past)
        num_past += max(map(len, chosen))


def _pass(
    model: PreTrainedModel,
    prefix: Prefix,
    searches: Sequence[_Search],
    branches: Sequence[Branch],
    chosen: Sequence[Sequence[int]],
    past: PastStates,
) -> None:
    """Compute one branch of each search and hand every search the log-probabilities that leave its chosen nodes."""
    row = flatten_branches(branches, prefix, model.device, past=past)
    sources: list[int] = []
    tokens: list[int] = []
    for search, branch, nodes, start in zip(searches, branches, chosen, row.starts, strict=True):
        # The chosen nodes are the last tokens of their branch; at first, the query's last token.
        first = int(start) + len(branch.token_ids) - len(nodes)
        for line, node in enumerate(nodes):
            leaving = search.map.leaving[1 + node]
            sources += [first + line] * len(leaving)
            tokens += [token for token, _, _ in leaving]
    values = log_probabilities(model, row, sources, tokens).tolist()
    taken = 0
    for search, nodes in zip(searches, chosen, strict=True):
        members = set(nodes)
        for node in nodes:
            count = len(search.map.leaving[1 + node])
            search.take(node, values[taken : taken + count], members)
            taken += count
