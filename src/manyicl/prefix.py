"""Prefix: the demonstrations that queries share, prefilled once.

In: ordered demonstrations of one task. Out: keys and values of every layer, on the model's device and in its dtype. Cost:
one forward pass over the demonstrations; memory is 2 · layers · K · D · tokens numbers. A prefix is never altered by a query,
can be cut to its first k demonstrations without copying (shots are nested), and can be extended without recomputing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from manyicl.attention import Branches, LayerStates, use_shared_prefix_attention
from manyicl.encoding import Encoder
from manyicl.errors import BudgetError
from manyicl.tasks.task import Example

PREFILL_CHUNK_TOKENS = 2048


@dataclass(frozen=True)
class Prefix:
    """Prefilled demonstrations.

    Attributes:
        token_ids: The tokens, opening included.
        stops: `stops[k]` is the number of tokens of the opening and the first k demonstrations.
        states: Keys and values [1, K, P, D] per layer, positions applied.
    """

    token_ids: tuple[int, ...]
    stops: tuple[int, ...]
    states: tuple[LayerStates, ...]

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
        """Memory of the keys and values, in bytes."""
        return sum(state.numel() * state.element_size() for layer in self.states for state in layer)

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
        states = tuple((key[:, :, :stop], value[:, :, :stop]) for key, value in self.states) if stop else ()
        return Prefix(self.token_ids[:stop], self.stops[: num_shots + 1], states)


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
        BudgetError: the demonstrations are longer than that.
    """
    opening = encoder.encode_opening(instruction)
    empty = Prefix(opening, (len(opening),), ())
    if opening:
        empty = Prefix(opening, empty.stops, _compute_states(model, opening, Prefix((), (0,), ())))
    return extend(model, encoder, empty, demonstrations, max_tokens=max_tokens)


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
        BudgetError: the prefix would be longer than `max_tokens` (None: the model's positions).
    """
    limit = max_tokens or int(model.config.max_position_embeddings)
    stops, added = list(prefix.stops), []
    for demonstration in demonstrations:
        encoded = encoder.encode_example(demonstration.input, demonstration.answer)
        added += [*encoded.input_ids, *encoded.answer_ids, *encoded.gap_ids]
        stops.append(prefix.num_tokens + len(added))
    if stops[-1] > limit:
        fitting = sum(stop <= limit for stop in stops) - 1
        raise BudgetError(
            f"{len(stops) - 1} demonstrations take {stops[-1]} tokens, more than the {limit} allowed; the first {fitting} fit. "
            "Give fewer demonstrations or a larger max_tokens."
        )
    if not added:
        return prefix
    states = _compute_states(model, tuple(added), prefix)
    return Prefix(prefix.token_ids + tuple(added), tuple(stops), states)


@torch.inference_mode()
def _compute_states(model: PreTrainedModel, token_ids: tuple[int, ...], prefix: Prefix) -> tuple[LayerStates, ...]:
    """Keys and values of prefix and new tokens together; each chunk of tokens attends to what was computed before it."""
    use_shared_prefix_attention(model)
    states = list(prefix.states)
    for start in range(0, len(token_ids), PREFILL_CHUNK_TOKENS):
        chunk = token_ids[start : start + PREFILL_CHUNK_TOKENS]
        branches = Branches(prefix=states)
        seen = prefix.num_tokens + start
        positions = torch.arange(seen, seen + len(chunk), device=model.device).unsqueeze(0)
        run_branches(model, torch.tensor([chunk], device=model.device), positions, branches, logits_to_keep=1)
        new = [branches.past[layer] for layer in range(len(branches.past))]
        if states:
            new = [
                (torch.cat([old[0], fresh[0]], dim=2), torch.cat([old[1], fresh[1]], dim=2))
                for old, fresh in zip(states, new, strict=True)
            ]
        states = new
    return tuple(states)


def run_branches(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    branches: Branches,
    *,
    logits_to_keep: int,
) -> torch.Tensor:
    """Logits [B, logits_to_keep, V] of the last tokens of each branch; keys and values are left in `branches.past`."""
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
