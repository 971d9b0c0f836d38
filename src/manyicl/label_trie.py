"""The labels of a query as a tree of tokens, so that what labels share is computed once.

    labels   "red" = [5, 9, T]   "rose" = [5, 7, T]   "blue" = [6, T]
    branch   … query | 5   9   7   6             (terminators are predicted, never fed)
    sees       all     q   q,5 q,5 q

    column     query end  5    9    7    6       column 0 is the query's last token, 1 + i is node i
    predicts   5, 6       9,7  T    T    T

Each label ends with the terminator, which tells a label from a longer one that begins like it. Letters: M nodes, E edges.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

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

    @cached_property
    def depths(self) -> npt.NDArray[np.int64]:
        """Distance of each node from the query's last token, minus one, [M]."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return np.array(depths, dtype=np.int64)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each label, its terminator included."""
        return np.array([len(path) for path in self.paths], dtype=np.int64)

    @cached_property
    def edge_columns(self) -> npt.NDArray[np.int64]:
        """Column that each edge leaves, [E]."""
        return np.array([column for column, _ in self.edges], dtype=np.int64)

    @cached_property
    def edge_tokens(self) -> npt.NDArray[np.int64]:
        """Token that each edge stands for, [E]."""
        return np.array([token for _, token in self.edges], dtype=np.int64)

    @property
    def num_answer_tokens(self) -> int:
        """Tokens of the longest label, its terminator included."""
        return int(self.lengths.max(initial=1))

    @cached_property
    def ancestors(self) -> npt.NDArray[np.bool_]:
        """Whether node i sees node j (itself and its ancestors): bool [M, M]."""
        seen = np.eye(len(self.tokens), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node] |= seen[parent]
        return seen

    def totals(self, edges: npt.NDArray[np.float64], *, normalise: bool = False) -> npt.NDArray[np.float64]:
        """Score of each label from the log-probability of each edge: the sum along its path, or the mean."""
        sums = np.array([edges[list(path)].sum() for path in self.paths], dtype=np.float64)
        return sums / self.lengths if normalise else sums


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


def build_tries(labels: Sequence[Sequence[TokenIds]]) -> list[LabelTrie]:
    """The trie of each query's labels; the same list object is made into a trie once."""
    made: dict[int, LabelTrie] = {}
    for own in labels:
        if id(own) not in made:
            made[id(own)] = build_trie(own)
    return [made[id(own)] for own in labels]
