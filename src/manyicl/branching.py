"""Many branches of different lengths as one row: linear layers see real tokens only, and no padding.

In: the tokens of each branch, where they stand and what they see. Out: log-probabilities of the (token, next token) pairs
that are asked for. Cost: the branches' tokens through the model, with attention to the prefix, and the vocabulary matrix for
the tokens that are asked about, in chunks of at most `LOGIT_CHUNK_BYTES`.

    branch 0   q q q n          row      q q q n q q n n q q q q n     [1, N], what linear layers and the prefix see
    branch 1   q q n n          spread   q q q n .                     [B, L], what attention inside a branch sees;
    branch 2   q q q q n                 q q n n .                             places of padding are masked by position
                                         q q q q n

Letters: B branches, L tokens of the longest, N tokens of all, H heads, K key-value heads, D head size, V vocabulary.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from manyicl.attention import Branches, LayerStates
from manyicl.errors import BudgetError
from manyicl.label_trie import LabelTrie, TokenIds
from manyicl.planning import available_bytes, pass_bytes, prefix_bytes
from manyicl.prefix import Prefix

LOGIT_CHUNK_BYTES = 32 * 2**20
SLICE_BYTES = 2 * 2**20
MAX_LOGIT_BYTES = 256 * 2**20
MAX_SCORE_BYTES = 48 * 2**20
MAX_PAST_BYTES = 2**30
UNKNOWN_FREE_BYTES = 2 * 2**30
MIN_BATCH_TOKENS, MAX_BATCH_TOKENS = 256, {"cpu": 2048, "cuda": 32768}

# What models multiply or cap their logits with after the head; such logits are taken whole from the model itself.
_AFTER_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "output_logits_scale")

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Branch:
    """Tokens that one branch adds in a forward pass.

    Attributes:
        token_ids: The tokens, [L].
        positions: Their distance from the end of the prefix, [L].
        visible: Which of the branch's tokens each sees, those of earlier passes first: [L, past + L].
    """

    token_ids: IntArray
    positions: IntArray
    visible: BoolArray


def _make_places(states: Tensor, num_tokens: int) -> Tensor:
    """Room for `num_tokens` tokens of the kind of [B, K, L, D]."""
    return states.new_empty(*states.shape[:2], num_tokens, states.shape[3])


def _places_of(seen: BoolArray, width: int) -> IntArray:
    """The places that each line sees, in order, [B, width]; the rest names place 0."""
    places = np.zeros((len(seen), width), dtype=np.int64)
    for line, own in enumerate(seen):
        found = np.flatnonzero(own)
        places[line, : len(found)] = found
    return places


def _join_buffers(buffers: Sequence[Tensor], indices: Sequence[Tensor], num_tokens: int) -> Tensor:
    """The places `indices` [B, 1, past, 1] of each buffer's first B branches, as one buffer [sum of B, K, num_tokens, D]."""
    _, num_heads, _, head_size = buffers[0].shape
    room = buffers[0].new_empty(sum(map(len, indices)), num_heads, num_tokens, head_size)
    line = 0
    for buffer, index in zip(buffers, indices, strict=True):
        stop = line + len(index)
        room[line:stop, :, : index.shape[2]] = torch.take_along_dim(buffer[: len(index)], index, dim=2)
        line = stop
    return room


class PastStates:
    """Keys and values of the branches' earlier tokens, per layer, in buffers that new ones are written into.

    What is stored is never copied as a whole while the buffers last; when they are full, they double.

    Args:
        num_tokens: Places [B, K, num_tokens, D] that are made at first.
    """

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._buffers: dict[int, LayerStates] = {}
        self._num_used: dict[int, int] = {}

    def append(self, layer: int, key: Tensor, value: Tensor) -> LayerStates:
        """All keys and values [B, K, past + L, D] of a layer, those of this pass [B, K, L, D] last."""
        start = self._num_used.get(layer, 0)
        self._num_used[layer] = stop = start + key.shape[2]
        buffers = self._buffers.get(layer)
        if buffers is None or buffers[0].shape[2] < stop:
            size = max(stop, self._num_tokens if buffers is None else 2 * buffers[0].shape[2])
            grown = _make_places(key, size), _make_places(value, size)
            for new, old in zip(grown, buffers or (), strict=False):
                new[:, :, :start] = old[: len(new), :, :start]
            self._buffers[layer] = buffers = grown
        for buffer, states in zip(buffers, (key, value), strict=True):
            buffer[: len(states), :, start:stop] = states
        return buffers[0][: len(key), :, :stop], buffers[1][: len(value), :, :stop]

    @classmethod
    def join(cls, parts: Sequence[tuple["PastStates", BoolArray]], num_free: int) -> tuple["PastStates", BoolArray]:
        """The branches of all parts, one part after the other; each part is emptied, and what no branch sees is dropped.

        Args:
            parts: States, with the places of theirs that each branch sees, [B, past].
            num_free: Places for later tokens, beside those of the longest branch.

        Returns:
            The states, each branch's places to the left, and which of them it sees; the others hold the state of another place.
        """
        counts = np.concatenate([seen.sum(axis=1) for _, seen in parts])
        longest = int(counts.max())
        joined = cls(longest + num_free)
        device = next(iter(parts[0][0]._buffers.values()))[0].device
        indices = [torch.from_numpy(_places_of(seen, longest)).to(device)[:, None, :, None] for _, seen in parts]
        for layer in list(parts[0][0]._buffers):
            own = [part._buffers.pop(layer) for part, _ in parts]
            joined._num_used[layer] = longest
            joined._buffers[layer] = (
                _join_buffers([key for key, _ in own], indices, longest + num_free),
                _join_buffers([value for _, value in own], indices, longest + num_free),
            )
        for part, _ in parts:
            part._num_used.clear()
        return joined, np.arange(longest) < counts[:, None]

    def keep(self, lines: Sequence[int]) -> list[int]:
        """Forget all branches but `lines`; the last of these take the places of those that leave.

        Returns:
            The kept lines, in the order in which later passes must give their branches.
        """
        order = list(range(len(lines)))
        holes = [place for place in order if place not in set(lines)]
        movers = [line for line in lines if line >= len(lines)]
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        if holes:
            for layer, buffers in self._buffers.items():
                for buffer in buffers:
                    buffer[holes, :, : self._num_used[layer]] = buffer[movers, :, : self._num_used[layer]]
        return order


@dataclass
class FlatBranches(Branches):
    """Branches of different lengths in one row.

    Attributes:
        places: The row's token at each place of each branch, int64 [B, L]; padding names token 0 and is masked.
        homes: The place (counted through [B, L]) of each of the row's tokens, int64 [N].
        earlier: Keys and values of the branches' earlier tokens, which those of this pass join; None where no pass follows.
    """

    places: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))
    homes: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    earlier: PastStates | None = None

    @property
    def is_padded(self) -> bool:
        """Whether the branches differ in length."""
        return self.places.numel() != self.homes.numel()

    def append(self, layer: int, key: Tensor, value: Tensor) -> LayerStates:
        """The branches' keys and values [B, K, past + L, D]; kept only on request."""
        return (key, value) if self.earlier is None else self.earlier.append(layer, key, value)

    def spread(self, states: Tensor) -> Tensor:
        """Heads [1, H, N, D] of the row, laid out by branch: [B, H, L, D]."""
        rows = states[0].transpose(0, 1)
        if self.is_padded:
            rows = rows.index_select(0, self.places.flatten())
        return rows.view(*self.places.shape, *rows.shape[1:]).transpose(1, 2)

    def collect(self, states: Tensor) -> Tensor:
        """The reverse of `spread` for outputs [B, H, L, D] and log-sum-exps [B, H, L]."""
        rows = states.transpose(1, 2).flatten(0, 1)
        if self.is_padded:
            rows = rows.index_select(0, self.homes)
        return rows.transpose(0, 1).unsqueeze(0)


@dataclass(frozen=True)
class FlatRow:
    """One forward pass: `input_ids` and `position_ids` are int64 [1, N]; `starts` is where each branch begins in the row."""

    input_ids: Tensor
    position_ids: Tensor
    branches: FlatBranches
    starts: IntArray


def flatten_branches(
    branches: Sequence[Branch],
    prefix: Prefix,
    device: torch.device,
    *,
    past: PastStates | None = None,
) -> FlatRow:
    """Lay branches out as one row behind a prefix.

    Args:
        past: The branches' earlier tokens; given, those of this pass join them.
    """
    lengths = np.array([len(branch.token_ids) for branch in branches], dtype=np.int64)
    starts = np.concatenate([[0], lengths.cumsum()])
    longest = int(lengths.max())
    num_past = branches[0].visible.shape[1] - lengths[0]
    inside = np.arange(longest) < lengths[:, None]
    places = np.where(inside, starts[:-1, None] + np.arange(longest), 0)
    mask = np.zeros((len(branches), longest, num_past + longest), dtype=bool)
    mask[:, :, num_past:] = np.eye(longest, dtype=bool)  # Padding sees itself, as a row without a key has no softmax.
    for line, branch in enumerate(branches):
        length = lengths[line]
        mask[line, :length, : num_past + length] = branch.visible
    flat = FlatBranches(
        prefix=prefix.states,
        mask=torch.from_numpy(mask).to(device),
        places=torch.from_numpy(places).to(device),
        homes=torch.from_numpy(np.flatnonzero(inside)).to(device),
        earlier=past,
    )
    token_ids = torch.from_numpy(np.concatenate([branch.token_ids for branch in branches])).to(device)
    positions = torch.from_numpy(np.concatenate([branch.positions for branch in branches])).to(device)
    return FlatRow(token_ids.unsqueeze(0), positions.unsqueeze(0) + prefix.num_tokens, flat, starts[:-1])


def query_branch(query: TokenIds, trie: LabelTrie | None = None) -> Branch:
    """A query, followed by the nodes of its label trie."""
    width = len(query)
    chain = np.tri(width, dtype=bool)
    if trie is None or not trie.tokens:
        return Branch(np.array(query, dtype=np.int64), np.arange(width), chain)
    visible = np.zeros((width + len(trie.tokens),) * 2, dtype=bool)
    visible[:width, :width] = chain
    visible[width:, :width] = True
    visible[width:, width:] = trie.ancestors
    return Branch(
        np.concatenate([np.array(query, dtype=np.int64), np.array(trie.tokens, dtype=np.int64)]),
        np.concatenate([np.arange(width), width + trie.depths]),
        visible,
    )


def log_probabilities(
    model: PreTrainedModel, row: FlatRow, sources: npt.ArrayLike, tokens: npt.ArrayLike
) -> npt.NDArray[np.float64]:
    """Log-probability [E] of each of `tokens` after the row's token at the same place of `sources`."""
    return judge_tokens(model, row, sources, tokens, with_best=False)[0]


def judge_tokens(
    model: PreTrainedModel, row: FlatRow, sources: npt.ArrayLike, tokens: npt.ArrayLike, *, with_best: bool = True
) -> tuple[npt.NDArray[np.float64], BoolArray]:
    """Log-probability [E] of each of `tokens` after its source, and whether it is the most probable token there, bool [E]."""
    wanted, targets = np.asarray(sources, dtype=np.int64), np.asarray(tokens, dtype=np.int64)
    needed, lines = np.unique(wanted, return_inverse=True)
    order = np.argsort(lines, kind="stable")
    device = row.input_ids.device
    result, is_best = np.empty(len(targets), dtype=np.float64), np.zeros(len(targets), dtype=bool)
    stops = np.searchsorted(lines[order], np.arange(len(needed) + 1))
    for start, logits in _logit_chunks(model, row, torch.from_numpy(needed).to(device)):
        # The normalised logits are made in slices that stay in a processor's cache, and are dropped at once.
        lines_per_slice = max(1, SLICE_BYTES // (4 * logits.shape[1])) if device.type == "cpu" else len(logits)
        for first in range(0, len(logits), lines_per_slice):
            part = torch.log_softmax(logits[first : first + lines_per_slice], dim=-1, dtype=torch.float32)
            members = order[stops[start + first] : stops[start + first + len(part)]]
            own = torch.from_numpy(lines[members] - start - first).to(device)
            picked = part[own, torch.from_numpy(targets[members]).to(device)]
            result[members] = picked.double().cpu().numpy()
            if with_best:
                is_best[members] = part.argmax(dim=-1).cpu().numpy()[lines[members] - start - first] == targets[members]
    return result, is_best


def most_probable_tokens(model: PreTrainedModel, row: FlatRow, sources: npt.ArrayLike) -> list[int]:
    """The most probable next token after each of the row's tokens `sources`, which stand in rising order."""
    needed = torch.from_numpy(np.asarray(sources, dtype=np.int64)).to(row.input_ids.device)
    found: list[int] = []
    for _, logits in _logit_chunks(model, row, needed):
        found += logits.argmax(dim=-1).tolist()
    return found


def _logit_chunks(model: PreTrainedModel, row: FlatRow, needed: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first line, logits [lines, V]) of the needed tokens of the row, in the model's dtype."""
    arguments = _arguments(row)
    if not head_is_plain(model):
        yield 0, model(**arguments, logits_to_keep=needed).logits[0]
        return
    hidden = model.get_decoder()(**arguments).last_hidden_state[0].index_select(0, needed)
    head = model.get_output_embeddings()
    lines = max(1, LOGIT_CHUNK_BYTES // (4 * head.weight.shape[0]))
    for start in range(0, len(needed), lines):
        yield start, head(hidden[start : start + lines])


def _arguments(row: FlatRow) -> dict[str, Any]:
    # A mask of four dimensions is passed through as it is; ours travels in `branches`, so this one only says "make none".
    no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=row.input_ids.device)
    return {
        "input_ids": row.input_ids,
        "position_ids": row.position_ids,
        "attention_mask": no_mask,
        "use_cache": False,
        "branches": row.branches,
    }


_HEADS: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()


@torch.inference_mode()
def head_is_plain(model: PreTrainedModel) -> bool:
    """Whether logits are what the output head makes of the decoder's last states, so that they can be made in chunks.

    Found out once a model: by its config, and by comparing the two on eight tokens.
    """
    if model not in _HEADS:
        config = model.config.get_text_config()
        altered = any(getattr(config, name, None) not in (None, 1, 1.0) for name in _AFTER_HEAD)
        probe = torch.arange(8, device=model.device).unsqueeze(0) % config.vocab_size
        whole = model(input_ids=probe, use_cache=False).logits
        states = model.get_decoder()(input_ids=probe, use_cache=False).last_hidden_state
        _HEADS[model] = not altered and torch.equal(whole, model.get_output_embeddings()(states))
    return _HEADS[model]


def check_positions(model: PreTrainedModel, prefix: Prefix, lengths: Sequence[int]) -> None:
    """Refuse queries that do not fit behind the prefix; `lengths` are the tokens of each with its answer.

    Raises:
        BudgetError: one takes more than what is left of the model's positions.
    """
    limit = int(model.config.get_text_config().max_position_embeddings)
    if lengths and prefix.num_tokens + max(lengths) > limit:
        raise BudgetError(
            f"query {int(np.argmax(lengths))} and its answer take {max(lengths)} tokens after a prefix of {prefix.num_tokens}, "
            f"more than the model's {limit} positions. Use fewer demonstrations; queries are never cut."
        )


def plan_batches(
    model: PreTrainedModel, num_tokens: Sequence[int], num_logits: Sequence[int], *, max_batch_tokens: int | None
) -> Iterator[list[int]]:
    """Indices of branches of similar length, in batches that keep every limit; a single branch may exceed them.

    Args:
        num_tokens: Tokens of each branch.
        num_logits: Tokens of each branch whose logits are needed.
        max_batch_tokens: Tokens in a batch at most; None takes `choose_batch_tokens`. Batches are made even.
    """
    config = model.config.get_text_config()
    limit = max_batch_tokens or choose_batch_tokens(model)
    total = sum(num_tokens)
    even = min(limit, -(-total // max(1, -(-total // limit))) + max(num_tokens, default=0))
    most_scores = MAX_SCORE_BYTES // (4 * int(config.num_attention_heads))
    most_logits = total if head_is_plain(model) else MAX_LOGIT_BYTES // (4 * int(config.vocab_size))
    batch: list[int] = []
    tokens = logits = 0
    for index in sorted(range(len(num_tokens)), key=lambda index: num_tokens[index]):
        length = num_tokens[index]
        too_many = tokens + length > even or logits + num_logits[index] > most_logits
        if batch and (too_many or (len(batch) + 1) * length**2 > most_scores):
            yield batch
            batch, tokens, logits = [], 0, 0
        batch.append(index)
        tokens, logits = tokens + length, logits + num_logits[index]
    if batch:
        yield batch


def plan_decoding(
    model: PreTrainedModel,
    batches: Iterable[list[int]],
    num_tokens: Sequence[int],
    max_new_tokens: int,
    *,
    max_batch_tokens: int | None,
) -> Iterator[list[list[int]]]:
    """Batches that are read one by one and then written together, as a token takes about as long for many branches as for few.

    Args:
        batches: As `plan_batches` gives them for the same tokens and limit.
        max_new_tokens: Tokens that each branch may write.
    """
    config = model.config.get_text_config()
    most = max_batch_tokens or choose_batch_tokens(model)
    if not head_is_plain(model):
        most = min(most, MAX_LOGIT_BYTES // (4 * int(config.vocab_size)))
    free = available_bytes(model.device)
    budget = min(MAX_PAST_BYTES, (UNKNOWN_FREE_BYTES if free is None else free) // 8)
    most_places = budget // prefix_bytes(config, 1, model.dtype)
    group: list[list[int]] = []
    for batch in batches:
        count = sum(map(len, group)) + len(batch)
        longest = max(num_tokens[index] for own in (*group, batch) for index in own)
        if group and (count > most or count * (longest + max_new_tokens) > most_places):
            yield group
            group = []
        group.append(batch)
    if group:
        yield group


def choose_batch_tokens(model: PreTrainedModel) -> int:
    """Tokens of one forward pass that take at most an eighth of the free memory.

    Between `MIN_BATCH_TOKENS` and what the kind of device needs to reach its full rate; more would only cost memory.
    """
    config = model.config
    bytes_per_token = pass_bytes(config, 2, model.dtype) - pass_bytes(config, 1, model.dtype)
    free = available_bytes(model.device)
    affordable = UNKNOWN_FREE_BYTES if free is None else free
    most = MAX_BATCH_TOKENS.get(model.device.type, MAX_BATCH_TOKENS["cpu"])
    return max(MIN_BATCH_TOKENS, min(most, affordable // 8 // bytes_per_token))
