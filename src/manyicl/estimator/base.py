"""What both estimators share: the library of examples, the cached blocks of demonstrations, and the context of each query.

    fit          X, y ──► library_ ──► blocks_[order] ──► prefix of each order (computed, kept as fit_mode says)
    partial_fit  X, y appended to library_, and to each block and its prefix as long as they fit; nothing is computed again
    query        prefix of the block │ retrieved demonstrations, query      ──► scores or text

Room is given in this order: the query and its longest answer, which are never cut; the block; the retrieved demonstrations. A
query that leaves too little room sees fewer demonstrations, whole ones, and one warning counts these queries.
"""

import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from manyicl.default_model import cache_folder
from manyicl.dtypes import Dtype
from manyicl.engines.native import NativeEngine
from manyicl.errors import BudgetError
from manyicl.estimator.inputs import DataError
from manyicl.estimator.shared_models import Format, share_model
from manyicl.prefix import Prefix, extend
from manyicl.prefix_files import PrefixFacts, identify_prefix
from manyicl.prefix_store import PrefixStore, prefix_key
from manyicl.selection import (
    SELECTIONS,
    Bm25Similarity,
    Embed,
    EmbeddingSimilarity,
    Selection,
    Similarity,
    choose_nearest,
    draw_order,
    rank_nearest,
)
from manyicl.tasks.task import Example

FitMode = Literal["prefill", "store", "lazy"]
STORE_MAX_BYTES = 10 * 2**30

# What the prefixes depend on: changed after fit, they would no longer be those of these parameters.
FIXED_AT_FIT = ("model", "dtype", "format", "instruction", "context_tokens", "selection", "num_shots", "n_estimators", "embed")


class KeptInMemory:
    """What is kept between calls and made again where it is missing; pickled and copied as empty, as it holds no information."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.prefixes: dict[int, Prefix] = {}
        self.similarity: Similarity | None = None
        self.lengths: list[int] = []

    def __reduce__(self) -> tuple[type["KeptInMemory"], tuple[()]]:
        """An empty one."""
        return KeptInMemory, ()


@dataclass(frozen=True, slots=True)
class QueryContext:
    """What a query is answered after.

    Attributes:
        num_shots: Demonstrations of the cached block.
        token_ids: Retrieved demonstrations and the query: what is computed for this query.
        num_retrieved: How many demonstrations are among these.
    """

    num_shots: int
    token_ids: tuple[int, ...]
    num_retrieved: int


@dataclass(frozen=True, slots=True)
class QueryGroup:
    """Queries that are answered after the same demonstrations of a block.

    Attributes:
        places: Position of each query in X.
        token_ids: What is computed for each query.
    """

    prefix: Prefix
    places: list[int]
    token_ids: list[tuple[int, ...]]


def _count_tokens(engine: NativeEngine, examples: Sequence[Example]) -> list[int]:
    return [engine.encoder.count_example(example.input, example.answer) for example in examples]


class ManyShotEstimator(BaseEstimator, ABC):  # type: ignore[misc]
    """The part of an estimator that keeps demonstrations; subclasses answer queries.

    Attributes:
        library_: Every example given to fit and partial_fit, in order.
        blocks_: For each order, the positions in `library_` of the demonstrations in its cached block.
        num_demonstrations_: Demonstrations in each block.
        num_left_out_: Examples that no query sees: beyond the block for "random", longer than the context otherwise.
        fingerprint_: Hash of the model that the prefixes belong to.
    """

    model: Any
    selection: Selection
    num_shots: int | None
    num_nearest: int
    embed: Embed | None
    fit_mode: FitMode
    store_max_bytes: int
    instruction: str
    format: Format
    context_tokens: int | None
    dtype: Dtype
    random_state: Any

    def open_prefixes(self) -> list[Prefix]:
        """The prefilled block of each order, computed where it is not kept.

        A method, as scikit-learn's HTML representation reads every property of a fitted estimator.
        """
        check_is_fitted(self)
        engine = self._engine()
        return [self._prefix(engine, order) for order in range(len(self.blocks_))]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the fitted estimator to a folder that another machine opens: JSON and safetensors, no weights, no pickle.

        Raises:
            NotFittedError: it is not fitted.
            DataError: a parameter or label cannot be written as JSON.
            StorageError: the disk is full or the folder cannot be written.
        """
        from manyicl.estimator.saving import save_estimator

        save_estimator(self, Path(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, model: Any = None, embed: Embed | None = None) -> Self:
        """The estimator that `save_pretrained` wrote.

        Args:
            model: Name of the model on this machine; None takes the name that it was fitted with. Its files must be the same.
            embed: The function that it was fitted with, where it was.

        Raises:
            DataError: the folder holds none, a broken one, another kind, or one of another model; or `embed` is missing.
            ModelError: the model cannot be loaded.
        """
        from manyicl.estimator.saving import load_estimator

        estimator: Self = load_estimator(cls, Path(folder), model=model, embed=embed)
        return estimator

    def __sklearn_is_fitted__(self) -> bool:
        """Whether there are demonstrations."""
        return bool(getattr(self, "library_", None))

    def __sklearn_tags__(self) -> Any:
        """One column of texts, no missing values, with a target."""
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.one_d_array = True
        tags.input_tags.string = True
        tags.target_tags.required = True
        return tags

    # Fitting.

    def _start(self, texts: Sequence[str], answers: Sequence[str]) -> Self:
        """Forget everything, and take these as the library."""
        self._check_parameters()
        engine = share_model(self.model, self.dtype).engine(self.format, self.context_tokens)
        self._seed = int(check_random_state(self.random_state).randint(2**31))
        self._fixed = {name: getattr(self, name) for name in FIXED_AT_FIT if hasattr(self, name)}
        self._kept = KeptInMemory()
        self._num_batches = 0
        self._tie_break: list[int] = []
        self.fingerprint_ = engine.loaded.fingerprint
        self.library_: list[Example] = []
        self.blocks_: list[list[int]] = [[] for _ in range(getattr(self, "n_estimators", 1))]
        return self._append(engine, texts, answers)

    def _append(self, engine: NativeEngine, texts: Sequence[str], answers: Sequence[str]) -> Self:
        """Add examples to the library, and to the blocks those that fit, behind what stands there; all of it, or nothing."""
        first = len(self.library_)
        library = [*self.library_, *map(Example, texts, answers)]
        lengths = self._lengths(engine) + _count_tokens(engine, library[first:])
        fresh = [
            [first + place for place in draw_order(len(texts), seed=self._seed, order=order, batch=self._num_batches)]
            for order in range(len(self.blocks_))
        ]
        added: list[list[int]] = [[] for _ in self.blocks_]
        if self.selection != "nearest":
            room = self._block_room(engine, library, lengths)
            added = [self._fill(order, lengths, room, block) for order, block in zip(fresh, self.blocks_, strict=True)]
        # The same number in every order, so that each sees a query after equally many.
        num_added = min(map(len, added))
        blocks = [[*block, *new[:num_added]] for block, new in zip(self.blocks_, added, strict=True)]
        num_left_out = self._count_left_out(engine, lengths, len(blocks[0]))
        with self._all_or_nothing():
            self._num_batches += 1
            self._tie_break = [*self._tie_break, *fresh[0]]
            self._kept.lengths = lengths
            self._kept.similarity = None
            num_before = len(self.blocks_[0])
            self.library_ = library
            self.blocks_ = blocks
            self.num_demonstrations_ = len(blocks[0])
            self.num_left_out_ = num_left_out
            if self.selection != "random":
                self._similarity()
            if self.fit_mode != "lazy":
                for order in range(len(blocks)):
                    self._prefix(engine, order, num_before=num_before)
        return self

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Take back what the block has set if it does not come to its end; what was kept in memory is then made again."""
        before = dict(vars(self))
        finished = False
        try:
            yield
            finished = True
        finally:
            if not finished:
                self.__dict__ = before | {"_kept": KeptInMemory()}

    def _check_parameters(self) -> None:
        for name, known in (("selection", SELECTIONS), ("fit_mode", get_args(FitMode)), ("format", get_args(Format))):
            if getattr(self, name) not in known:
                raise DataError(f"{name}={getattr(self, name)!r} is unknown. Use one of {', '.join(map(repr, known))}.")
        optional = ("num_shots", "context_tokens", "max_answer_tokens")
        for name in ("num_nearest", "n_estimators", "store_max_bytes", *optional):
            value = getattr(self, name, None)
            if value is None and (name in optional or not hasattr(self, name)):
                continue
            if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
                raise DataError(f"{name}={value!r} must be a whole number of at least 1{' or None' * (name in optional)}.")
        if self.selection == "nearest" and getattr(self, "n_estimators", 1) > 1:
            raise DataError(
                f"selection='nearest' has one order, by similarity, which n_estimators={self.n_estimators} would repeat. "
                "Use n_estimators=1, or selection='hybrid'."
            )
        if not isinstance(self.instruction, str):
            raise DataError(f"instruction={self.instruction!r} must be a text; an empty one for none.")

    def _lengths(self, engine: NativeEngine) -> list[int]:
        """Tokens of each example of the library."""
        with self._kept.lock:
            if not self._kept.lengths:
                self._kept.lengths = _count_tokens(engine, self.library_)
            return self._kept.lengths

    def _block_room(self, engine: NativeEngine, library: Sequence[Example], lengths: Sequence[int]) -> int:
        """Tokens that the block may have: what queries and retrieved demonstrations probably need is kept free.

        That is the longest input seen, at most a quarter of the context, and its answer; and for "hybrid" `num_nearest` times the
        longest example, at most a quarter of the context.
        """
        context = engine.context_tokens
        inputs = [*(example.input for example in library), *self._context_inputs(library)]
        longest = max(len(engine.encoder.encode_query(text)) for text in inputs)
        room = context - min(longest, context // 4) - self._answer_tokens(engine, library)
        if self.selection == "hybrid":
            room -= min(self.num_nearest * max(lengths), context // 4)
        return room - engine.encoder.count_opening(self.instruction)

    def _fill(self, order: Sequence[int], lengths: Sequence[int], room: int, block: Sequence[int]) -> list[int]:
        """The longest front of `order` that fits behind `block`; one longer than all the room is passed over (see episodes)."""
        left = room - sum(lengths[position] for position in block)
        limit = len(order) if self.num_shots is None else self.num_shots - len(block)
        added: list[int] = []
        for position in (position for position in order if lengths[position] <= room):
            if len(added) >= limit or lengths[position] > left:
                break
            added.append(position)
            left -= lengths[position]
        return added

    def _count_left_out(self, engine: NativeEngine, lengths: Sequence[int], num_shots: int) -> int:
        """Examples that no query sees.

        Raises:
            BudgetError: that is all of them, or all of the block.
        """
        context = engine.context_tokens - engine.encoder.count_opening(self.instruction)
        num_seen = num_shots if self.selection == "random" else sum(length <= context for length in lengths)
        if not num_seen or (self.selection == "hybrid" and not num_shots):
            raise BudgetError(
                f"no demonstration fits the context of {engine.context_tokens} tokens beside a query and its answer: the "
                f"examples take {min(lengths)} to {max(lengths)} tokens. Give a larger context_tokens, or shorter texts."
            )
        return len(lengths) - num_seen

    def _context_inputs(self, library: Sequence[Example]) -> list[str]:
        """Inputs besides those of queries that are placed behind the block."""
        return []

    @abstractmethod
    def _answer_tokens(self, engine: NativeEngine, library: Sequence[Example]) -> int:
        """Tokens that the longest possible answer takes, its terminator included."""

    # What is kept.

    def _engine(self) -> NativeEngine:
        """The engine of the model that this estimator was fitted with.

        Raises:
            DataError: parameters have changed since, or the model has.
        """
        changed = [
            name for name, value in self._fixed.items() if getattr(self, name) is not value and getattr(self, name) != value
        ]
        if changed:
            raise DataError(f"{', '.join(changed)} changed since fit. Call fit again: the demonstrations were prefilled without.")
        engine = share_model(self.model, self.dtype).engine(self.format, self.context_tokens)
        if engine.loaded.fingerprint != self.fingerprint_:
            raise DataError(
                f"the model {self.model!r} is another than at fit: its files have the hash {engine.loaded.fingerprint[:12]}…, "
                f"not {self.fingerprint_[:12]}…. Give the model that it was fitted with, or call fit again."
            )
        return engine

    def _similarity(self) -> Similarity:
        with self._kept.lock:
            if self._kept.similarity is None:
                texts = [example.input for example in self.library_]
                self._kept.similarity = Bm25Similarity(texts) if self.embed is None else EmbeddingSimilarity(texts, self.embed)
            return self._kept.similarity

    def _prefix(self, engine: NativeEngine, order: int, *, num_before: int = 0) -> Prefix:
        """The prefix of an order's block, of which only what is not kept is computed.

        Args:
            num_before: Demonstrations of the block whose prefix the store may hold, from before more were appended.
        """
        if self.fit_mode == "lazy" or not self.blocks_[order]:
            return self._extend(engine, None, order)
        with self._kept.lock:
            if self.fit_mode == "store":
                return self._stored_prefix(engine, order, num_before)
            found = self._kept.prefixes.get(order)
            if found is None or found.num_shots < len(self.blocks_[order]):
                found = self._extend(engine, found, order)
                self._kept.prefixes[order] = found
            return found

    def _stored_prefix(self, engine: NativeEngine, order: int, num_before: int) -> Prefix:
        store, facts, device = self._store(), self._facts(engine), engine.loaded.model.device
        tokens = self._block_tokens(engine, order)
        found = store.get(prefix_key(facts, tokens), device=device)
        if found is not None:
            return found[0]
        lengths = self._lengths(engine)
        stop = len(tokens) - sum(lengths[position] for position in self.blocks_[order][num_before:])
        earlier = store.get(prefix_key(facts, tokens[:stop]), device=device) if num_before else None
        prefix = self._extend(engine, earlier[0] if earlier else None, order)
        store.put(prefix, facts)
        return prefix

    def _store(self) -> PrefixStore:
        return PrefixStore(cache_folder() / "prefixes", max_bytes=self.store_max_bytes)

    def _extend(self, engine: NativeEngine, prefix: Prefix | None, order: int) -> Prefix:
        block = [self.library_[position] for position in self.blocks_[order]]
        if prefix is None:
            return engine.prefill(block, instruction=self.instruction)
        missing = block[prefix.num_shots :]
        return extend(engine.loaded.model, engine.encoder, prefix, missing, max_tokens=engine.context_tokens)

    def _facts(self, engine: NativeEngine) -> PrefixFacts:
        """What is kept on disk beside a prefix of this estimator."""
        identity = identify_prefix(engine.loaded.model, self.fingerprint_, engine.encoder)
        return PrefixFacts(identity=identity, instruction=self.instruction)

    def _block_tokens(self, engine: NativeEngine, order: int) -> tuple[int, ...]:
        """The tokens that the prefix of an order has."""
        encoder = engine.encoder
        ids = list(encoder.encode_opening(self.instruction))
        for position in self.blocks_[order]:
            example = encoder.encode_example(self.library_[position].input, self.library_[position].answer)
            ids += [*example.input_ids, *example.answer_ids, *example.gap_ids]
        return tuple(ids)

    # Queries.

    def _rank(self, texts: Sequence[str]) -> list[list[int]]:
        """For each query, positions in the library, most similar first: enough to find `num_nearest` outside any block."""
        if self.selection == "random":
            return [[] for _ in texts]
        num = self.num_nearest + max(map(len, self.blocks_))
        tie_break = np.array(self._tie_break, dtype=np.int64)
        return [rank_nearest(scores, tie_break, num=num) for scores in self._similarity().scores(texts)]

    def _contexts(
        self, engine: NativeEngine, texts: Sequence[str], rankings: Sequence[Sequence[int]], prefix: Prefix, order: int
    ) -> list[QueryContext]:
        """What each query is answered after, in one order of demonstrations.

        Raises:
            BudgetError: a query and its answer do not fit even without demonstrations; its position is named.
        """
        answer_tokens = self._answer_tokens(engine, self.library_)
        lengths = self._lengths(engine) if self.selection != "random" else []
        contexts = []
        for place, (text, ranking) in enumerate(zip(texts, rankings, strict=True)):
            query = engine.encoder.encode_query(text)
            room = engine.context_tokens - len(query) - answer_tokens
            num_shots = sum(stop <= room for stop in prefix.stops) - 1
            if num_shots < 0:
                raise BudgetError(
                    f"X[{place}] takes {len(query)} tokens and its answer up to {answer_tokens}, more than the context of "
                    f"{engine.context_tokens} has beside its {prefix.stops[0]} opening tokens. Give a larger context_tokens, or "
                    "a shorter text; queries are never cut."
                )
            chosen = choose_nearest(
                ranking,
                lengths,
                num=self.num_nearest,
                max_tokens=room - prefix.stops[num_shots],
                excluded=set(self.blocks_[order][:num_shots]),
            )
            retrieved = [engine.encoder.encode_example(self.library_[p].input, self.library_[p].answer) for p in chosen]
            before = [token for example in retrieved for token in (*example.input_ids, *example.answer_ids, *example.gap_ids)]
            contexts.append(QueryContext(num_shots, (*before, *query), len(chosen)))
        return contexts

    def _group_queries(self, engine: NativeEngine, texts: Sequence[str]) -> Iterator[list[QueryGroup]]:
        """For each order, the queries by the demonstrations of the block that they see; warns at the end of those that see fewer.

        Raises:
            BudgetError: a query and its answer do not fit even without demonstrations.
        """
        rankings = self._rank(texts)
        cut: dict[int, int] = {}
        for order in range(len(self.blocks_)):
            prefix = self._prefix(engine, order)
            contexts = self._contexts(engine, texts, rankings, prefix, order)
            wanted = prefix.num_shots
            if self.selection != "random":
                wanted += min(self.num_nearest, len(self.library_) - prefix.num_shots)
            groups: dict[int, QueryGroup] = {}
            for place, context in enumerate(contexts):
                if context.num_shots not in groups:
                    groups[context.num_shots] = QueryGroup(prefix.trim(context.num_shots), [], [])
                groups[context.num_shots].places.append(place)
                groups[context.num_shots].token_ids.append(context.token_ids)
                seen = context.num_shots + context.num_retrieved
                if seen < wanted:
                    cut[place] = min(seen, cut.get(place, seen))
            yield list(groups.values())
        if cut:
            warnings.warn(
                f"{len(cut)} of {len(texts)} queries leave room for fewer demonstrations than the others see, "
                f"{min(cut.values())} at the least: queries are never cut. Give a larger context_tokens, or a smaller num_shots "
                "or num_nearest.",
                UserWarning,
                stacklevel=3,
            )
