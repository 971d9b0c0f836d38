"""Prefix: the demonstrations that queries share, prefilled once.

In: ordered demonstrations of one task. Out: keys and values of every layer, on the model's device and in its dtype. Cost:
one forward pass over the demonstrations; memory is 2 · layers · K · D · tokens numbers, said before it is taken when it is
much. A prefix is never altered: it is read by queries, cut to its first k demonstrations without copying (shots are nested),
and extended without computing again. An extension is written into spare room behind the prefix where nobody else has
used that (see `prefix_states.StatesBuffer`), and is copied otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from manyicl.attention import Branches, LayerStates, use_shared_prefix_attention
from manyicl.encoding import Encoder
from manyicl.errors import BudgetError, PrefixError
from manyicl.planning import check_memory, pass_bytes, prefix_bytes
from manyicl.prefix_states import Int8States, StatesBuffer, name_tensors, to_int8
from manyicl.tasks.task import Example

PREFILL_CHUNK_TOKENS = 2048


@dataclass(frozen=True)
class Prefix:
    """Prefilled demonstrations.

    Attributes:
        token_ids: The tokens, opening included.
        stops: `stops[k]` is the number of tokens of the opening and the first k demonstrations.
        states: Keys and values [1, K, P, D] per layer, positions applied; an `Int8States` gives a layer's anew at each access.
        buffer: The room that the states are a view of; None for states that came from elsewhere.
    """

    token_ids: tuple[int, ...]
    stops: tuple[int, ...]
    states: Sequence[LayerStates]
    buffer: StatesBuffer | None = field(default=None, repr=False, compare=False)

    @property
    def num_shots(self) -> int:
        """Demonstrations in the prefix."""
        return len(self.stops) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens in the prefix, P."""
        return len(self.token_ids)

    @property
    def num_bytes(self) -> int:
        """Memory of the keys and values, in bytes; spare room is not counted."""
        return sum(tensor.numel() * tensor.element_size() for tensor in name_tensors(self.states).values())

    @property
    def is_int8(self) -> bool:
        """Whether keys and values are held as 8-bit integers."""
        return isinstance(self.states, Int8States)

    def trim(self, num_shots: int) -> Prefix:
        """The prefix of the first `num_shots` demonstrations; shares memory with this one.

        Raises:
            BudgetError: the prefix holds fewer demonstrations.
        """
        if not 0 <= num_shots <= self.num_shots:
            raise BudgetError(
                f"the prefix holds {self.num_shots} demonstrations, not {num_shots}. Prefill more, or ask for fewer."
            )
        stop = self.stops[num_shots]
        if isinstance(self.states, Int8States):
            return Prefix(self.token_ids[:stop], self.stops[: num_shots + 1], self.states.trim(stop))
        states = tuple((key[:, :, :stop], value[:, :, :stop]) for key, value in self.states) if stop else ()
        return Prefix(self.token_ids[:stop], self.stops[: num_shots + 1], states, self.buffer)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles hold the states alone: the right to the spare room stays with the original."""
        return Prefix, (self.token_ids, self.stops, self.states)


def prefill(
    model: PreTrainedModel,
    encoder: Encoder,
    demonstrations: Sequence[Example],
    *,
    instruction: str = "",
    max_tokens: int | None = None,
) -> Prefix:
    """Compute the keys and values of an opening and ordered demonstrations.

    Args:
        max_tokens: The most tokens the prefix may have; None takes the model's positions.

    Raises:
        BudgetError: the demonstrations are longer than that, or need more memory than is available.
    """
    opening = encoder.encode_opening(instruction)
    return _lengthen(model, encoder, Prefix((), (0,), ()), opening, demonstrations, max_tokens)


def extend(
    model: PreTrainedModel,
    encoder: Encoder,
    prefix: Prefix,
    demonstrations: Sequence[Example],
    *,
    max_tokens: int | None = None,
) -> Prefix:
    """A longer prefix: the new demonstrations are computed, the old ones are not computed again.

    Raises:
        BudgetError: the prefix would be longer than `max_tokens` (None: the model's positions) or than memory allows.
        PrefixError: its keys and values are held as 8-bit integers.
    """
    if prefix.is_int8:
        raise PrefixError(
            f"a prefix held as int8 ({prefix.num_shots} demonstrations) cannot be extended: its rounding would enter every new "
            "demonstration. Extend the prefix that it was made from, and quantise the result."
        )
    return _lengthen(model, encoder, prefix, (), demonstrations, max_tokens)


def quantise(prefix: Prefix) -> Prefix:
    """The same prefix with keys and values as 8-bit integers: a little over half the memory of bf16, scores a little changed.

    Every forward pass converts each layer once, so that many small batches pay more. The prefix given is left as it is.
    """
    return prefix if prefix.is_int8 else replace(prefix, states=to_int8(prefix.states), buffer=None)


def _lengthen(
    model: PreTrainedModel,
    encoder: Encoder,
    prefix: Prefix,
    opening: tuple[int, ...],
    demonstrations: Sequence[Example],
    max_tokens: int | None,
) -> Prefix:
    """A prefix with the opening, if it is empty so far, and demonstrations appended."""
    limit = int(model.config.get_text_config().max_position_embeddings) if max_tokens is None else max_tokens
    added = list(opening)
    stops = [len(added)] if opening else list(prefix.stops)
    for demonstration in demonstrations:
        encoded = encoder.encode_example(demonstration.input, demonstration.answer)
        added += [*encoded.input_ids, *encoded.answer_ids, *encoded.gap_ids]
        stops.append(prefix.num_tokens + len(added))
    if stops[-1] > limit:
        fitting = max(0, sum(stop <= limit for stop in stops) - 1)
        raise BudgetError(
            f"{len(stops) - 1} demonstrations take {stops[-1]} tokens, more than the {limit} allowed; the first {fitting} fit. "
            "Give fewer demonstrations or a larger max_tokens."
        )
    if not added:
        return prefix
    buffer = _claim_buffer(model, prefix, stops[-1], limit)
    _compute_states(model, tuple(added), prefix.num_tokens, buffer)
    return Prefix(prefix.token_ids + tuple(added), tuple(stops), buffer.view(stops[-1]), buffer)


def _claim_buffer(model: PreTrainedModel, prefix: Prefix, num_tokens: int, limit: int) -> StatesBuffer:
    """The prefix's own buffer where its room is free, else a new one that begins with a copy of its states.

    A first prefill gets exactly what it needs. A prefix that is extended will be extended again, and gets a quarter more.
    """
    device, added = model.device, num_tokens - prefix.num_tokens
    passing = pass_bytes(model.config, min(added, PREFILL_CHUNK_TOKENS), model.dtype)
    remedy = "Give fewer demonstrations or a smaller max_tokens, or free some memory."
    if prefix.buffer is not None and prefix.buffer.claim(prefix.num_tokens, num_tokens):
        return prefix.buffer
    capacity = min(limit, num_tokens + prefix.num_tokens // 4)
    needed = prefix_bytes(model.config, capacity, model.dtype) + passing
    check_memory(needed, purpose=f"a prefix of {num_tokens} tokens", remedy=remedy, device=device)
    buffer = StatesBuffer(capacity)
    buffer.claim(0, num_tokens)
    if prefix.states:
        buffer.write(0, prefix.states)
    return buffer


@torch.inference_mode()
def _compute_states(model: PreTrainedModel, token_ids: tuple[int, ...], seen: int, buffer: StatesBuffer) -> None:
    """Write the states of new tokens behind the `seen` ones; each chunk of tokens attends to what stands before it."""
    use_shared_prefix_attention(model)
    for start in range(0, len(token_ids), PREFILL_CHUNK_TOKENS):
        chunk = token_ids[start : start + PREFILL_CHUNK_TOKENS]
        first = seen + start
        branches = Branches(prefix=buffer.view(first))
        positions = torch.arange(first, first + len(chunk), device=model.device).unsqueeze(0)
        run_branches(model, torch.tensor([chunk], device=model.device), positions, branches, logits_to_keep=1)
        buffer.write(first, [branches.past[layer] for layer in range(len(branches.past))])


def run_branches(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    branches: Branches,
    *,
    logits_to_keep: int | torch.Tensor,
) -> torch.Tensor:
    """Logits [B, ., V] of each branch's last tokens, or of those at given places; keys and values are left in `branches.past`."""
    # A mask of four dimensions is passed through as it is; ours travels in `branches`, so this one only says "make none".
    no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)
    output = model(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=no_mask,
        use_cache=False,
        logits_to_keep=logits_to_keep,
        branches=branches,
    )
    logits: torch.Tensor = output.logits
    return logits
