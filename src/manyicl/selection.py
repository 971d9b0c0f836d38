r"""Which demonstrations a query sees, when there are more examples than fit or some help a query more than others.

    random    [ d7 d2 d9 d4 … ] query            one block for all queries, prefilled once
    nearest   [ ] d3 d8 d5 query                 the most similar examples of each query, the most similar last
    hybrid    [ d7 d2 d9 … ] d3 d8 query         the block, then a few similar ones that are not in it

In: texts of a library of examples, and of queries. Out: positions in the library. Similarity is BM25 over lower-cased words
(`\w+`, no stemming, no stop words: their weight is near zero anyway), or the cosine of embeddings that the caller computes.
Cost: BM25 indexes tens of thousands of texts a second and ranks a query in under a millisecond per 10,000 examples; what costs is
that demonstrations chosen per query are computed for every query. Loads no torch.
"""

import random
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal, Protocol, get_args

import bm25s
import numpy as np
import numpy.typing as npt

from manyicl.errors import UserInputError

Selection = Literal["random", "nearest", "hybrid"]
SELECTIONS: tuple[str, ...] = get_args(Selection)

Embed = Callable[[list[str]], npt.ArrayLike]

_WORD = re.compile(r"\w+")


class Similarity(Protocol):
    """How similar each example of a library is to a query."""

    def scores(self, queries: Sequence[str]) -> Iterator[npt.NDArray[np.float32]]:
        """One array per query, [number of examples]; larger is more similar."""


class Bm25Similarity:
    """BM25 over the words of a library's inputs (Lucene's variant, k1 = 1.5, b = 0.75); 0 where no word is shared."""

    def __init__(self, texts: Sequence[str]) -> None:
        words = [_words(text) for text in texts]
        self._num_texts = len(words)
        self._index = bm25s.BM25(backend="numpy") if any(words) else None
        if self._index is not None:
            self._index.index(words, show_progress=False)

    def scores(self, queries: Sequence[str]) -> Iterator[npt.NDArray[np.float32]]:
        """One array per query, [number of texts]."""
        for query in queries:
            known = self._index.get_tokens_ids(_words(query)) if self._index is not None else []
            if self._index is None or not known:
                yield np.zeros(self._num_texts, dtype=np.float32)
            else:
                yield np.asarray(self._index.get_scores_from_ids(known), dtype=np.float32)


class EmbeddingSimilarity:
    """The cosine between embeddings of a library's inputs and of a query.

    Args:
        embed: Takes a list of texts and returns their embeddings, [number of texts, size].

    Raises:
        UserInputError: `embed` returns another shape, or numbers that are not finite.
    """

    def __init__(self, texts: Sequence[str], embed: Embed) -> None:
        self._embed = embed
        self._library = self._directions(texts)

    def _directions(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Embeddings scaled to length one, [number of texts, size]."""
        found = np.asarray(self._embed(list(texts)), dtype=np.float32)
        if found.ndim != 2 or len(found) != len(texts) or not np.isfinite(found).all():
            raise UserInputError(
                f"embed returned shape {found.shape} for {len(texts)} texts, {np.isfinite(found).sum()} of its numbers finite. "
                "It must return one row of finite numbers per text."
            )
        lengths = np.linalg.norm(found, axis=1, keepdims=True)
        return np.divide(found, np.where(lengths > 0, lengths, 1), dtype=np.float32)

    def scores(self, queries: Sequence[str]) -> Iterator[npt.NDArray[np.float32]]:
        """One array per query, [number of texts]."""
        yield from self._directions(queries) @ self._library.T


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def draw_order(num_examples: int, *, seed: int, order: int, batch: int = 0) -> list[int]:
    """A uniformly random order of positions, a pure function of (seed, order, batch)."""
    positions = list(range(num_examples))
    random.Random(f"{seed}/demonstrations/{order}/{batch}").shuffle(positions)
    return positions


def rank_nearest(scores: npt.NDArray[Any], tie_break: npt.NDArray[np.int64], *, num: int) -> list[int]:
    """Positions of the `num` largest scores, largest first; equal ones in the order of `tie_break`, where each stands once."""
    ranked = tie_break[np.argsort(-scores[tie_break], kind="stable")[:num]]
    return [int(position) for position in ranked]


def choose_nearest(
    ranking: Sequence[int], lengths: Sequence[int], *, num: int, max_tokens: int, excluded: Collection[int] = ()
) -> list[int]:
    """The demonstrations of one query in the order in which they stand before it: the most similar last.

    The first `num` of `ranking` that are not `excluded` (as they stand in the shared block already) are taken whole, the most
    similar first; one that does not fit what is left of `max_tokens` is passed over, and counts.

    Args:
        lengths: Tokens of each example of the library.
    """
    candidates = [position for position in ranking if position not in excluded][:num]
    chosen, left = [], max_tokens
    for position in candidates:
        if lengths[position] <= left:
            chosen.append(position)
            left -= lengths[position]
    return chosen[::-1]
