"""Shared-prefix attention: many branches against one prefix whose keys and values are never copied.

A branch is a query with its label continuations, or a query being answered. Attention to the prefix and attention inside
the branch are computed apart and merged by their log-sum-exp, which is exact:

    softmax over [prefix | branch] = w · softmax over prefix + (1 - w) · softmax over branch,  w = σ(lse_prefix - lse_branch)

    prefix   K, V  [1, K, P, D]    one copy, read by every branch; head groups are folded into the query axis
    branch   q     [B, H, L, D]    k, v  [B, K, L, D]    mask  [B, L, L]

Letters: B branches, H heads, K key-value heads, L tokens of a branch, P tokens of the prefix, D head size.

Everything a forward pass needs travels in its `branches` argument and never as state of a module, so that threads can share
a model. Layers with soft-capping, attention sinks or an active sliding window take the plain path of `_attend_plainly`,
which is correct and slower. Without `branches` the call is handed to transformers' own attention.

bf16 on a CPU goes through our kernel where it can run (`kernels/cpu_attention.py`), which reads shared and grouped keys in
place; without `branches` only where attention is causal and nothing else, as in training, gradients included. Rows in which
several sequences are packed go through it sequence by sequence, so that no token meets those of another (`packed_arguments`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from manyicl.kernels import cpu_attention

IMPLEMENTATION = "manyicl"

LayerStates = tuple[Tensor, Tensor]


@dataclass
class Branches:
    """What the attention of one forward pass is told.

    Attributes:
        prefix: Keys and values [1, K, P, D] per layer, which an `Int8States` makes anew at each access; empty for none.
        mask: Which branch tokens see which, bool [B, L, past + L]; None means causal, with nothing in `past`.
        past: Keys and values [B, K, L, D] per layer of the branches' own earlier tokens; filled with those of this pass.
    """

    prefix: Sequence[LayerStates] = ()
    mask: Tensor | None = None
    past: dict[int, LayerStates] = field(default_factory=dict)

    @cached_property
    def num_prefix_tokens(self) -> int:
        """Tokens of the prefix, P."""
        return self.prefix[0][0].shape[2] if self.prefix else 0

    def append(self, layer: int, key: Tensor, value: Tensor) -> LayerStates:
        """The branches' keys and values of a layer with those of this pass appended, which are also kept."""
        if layer in self.past:
            earlier_key, earlier_value = self.past[layer]
            key, value = torch.cat([earlier_key, key], dim=2), torch.cat([earlier_value, value], dim=2)
        self.past[layer] = (key, value)
        return key, value

    def spread(self, states: Tensor) -> Tensor:
        """Heads of this pass's tokens as the model has them, laid out by branch [B, H, L, D]; here they already are."""
        return states

    def collect(self, states: Tensor) -> Tensor:
        """The reverse of `spread`, for outputs [B, H, L, D] and log-sum-exps [B, H, L]."""
        return states


def use_shared_prefix_attention(model: PreTrainedModel) -> None:
    """Make a model's attention take `branches`; without them it is transformers' SDPA, or our kernel for causal rows."""
    if model.config._attn_implementation != IMPLEMENTATION:
        model.set_attn_implementation(IMPLEMENTATION)


def packed_arguments(model: torch.nn.Module, episode: Tensor) -> dict[str, Any]:
    """What a model is told beside positions of rows in which sequences are packed; nothing where transformers' mask serves.

    Args:
        episode: Number of the sequence that each token belongs to, [B, T]; each sequence is contiguous in its row.
    """
    config = getattr(model, "config", None)
    in_bf16 = getattr(model, "dtype", None) == torch.bfloat16 or (
        torch.is_autocast_enabled(episode.device.type) and torch.get_autocast_dtype(episode.device.type) == torch.bfloat16
    )
    ours = getattr(config, "_attn_implementation", "") == IMPLEMENTATION and episode.device.type == "cpu" and in_bf16
    if not ours or not cpu_attention.is_available():
        return {}
    lengths = [row.unique_consecutive(return_counts=True)[1].tolist() for row in episode]
    # A mask of four dimensions is passed through as it is; ours follows from `packed`, so this one only says "make none".
    return {"packed": lengths, "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool)}


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention [B, L, H, D] of branches that share a prefix; the signature is that of transformers' attention interface."""
    branches: Branches | None = options.pop("branches", None)
    packed: Sequence[Sequence[int]] | None = options.pop("packed", None)
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    plain = {name: options.get(name) for name in ("softcap", "s_aux")}
    if packed is not None:
        is_plain = all(value is None for value in plain.values()) and _attends_causally(module, query, key, options)
        query, key, value = (_cast_as_autocast(states) for states in (query, key, value))
        if is_plain and cpu_attention.can_attend(query, key, value, scaling):
            return _attend_to_packed(query, key, value, packed, scaling).transpose(1, 2), None
        attention_mask = _packed_mask(packed, options.get("sliding_window"))
    if branches is None:
        if any(value is not None for value in plain.values()):
            visible = _visible_without_branches(query, key, attention_mask)
            return _attend_plainly(query, key, value, visible, scaling=scaling, **plain).transpose(1, 2), None
        if _is_causal_only(module, query, key, attention_mask, options):
            query, key, value = (_cast_as_autocast(states) for states in (query, key, value))
            if cpu_attention.can_attend(query, key, value, scaling):
                output, _ = cpu_attention.attention_forward(query, key, value, is_causal=True, scaling=scaling)
                return output.transpose(1, 2), None
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    key, value = branches.append(layer, branches.spread(key), branches.spread(value))
    window = options.get("sliding_window")
    total = branches.num_prefix_tokens + key.shape[2]
    if any(value is not None for value in plain.values()) or (window is not None and total > window):
        spread = branches.spread(query)
        output = _attend_with_joined_prefix(spread, key, value, branches, layer, scaling=scaling, window=window, **plain)
        return branches.collect(output).transpose(1, 2), None
    output, weight = map(branches.collect, _attend_within(branches.spread(query), key, value, branches.mask, scaling))
    if branches.num_prefix_tokens:
        shared, shared_weight = _attend_to_prefix(query, *branches.prefix[layer], scaling)
        share = torch.sigmoid(shared_weight - weight).unsqueeze(-1)
        output = torch.lerp(output.float(), shared.float(), share)
    return output.to(query.dtype).transpose(1, 2), None


def _is_causal_only(
    module: torch.nn.Module, query: Tensor, key: Tensor, attention_mask: Tensor | None, options: dict[str, Any]
) -> bool:
    """Whether a call without branches is causal attention of a row to itself and nothing else, as in training."""
    return attention_mask is None and _attends_causally(module, query, key, options)


def _attends_causally(module: torch.nn.Module, query: Tensor, key: Tensor, options: dict[str, Any]) -> bool:
    """Whether attention, its mask apart, is causal, of a row to itself, and nothing else."""
    is_causal = options.get("is_causal")
    window = options.get("sliding_window")
    return (
        bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        and query.shape[2] == key.shape[2] > 1
        and (window is None or window >= key.shape[2])
        and not options.get("dropout")
        and all(options.get(name) is None for name in ("position_bias", "cache"))
    )


def _attend_to_packed(query: Tensor, key: Tensor, value: Tensor, packed: Sequence[Sequence[int]], scaling: float) -> Tensor:
    """Attention [B, H, T, D] of rows of sequences, each to itself."""
    rows = []
    for place, lengths in enumerate(packed):
        # Split, not sliced: the gradient of a slice would be a whole row of zeros for each sequence.
        parts = zip(*(each[place : place + 1].split(list(lengths), dim=2) for each in (query, key, value)), strict=True)
        outputs = [cpu_attention.attention_forward(*part, is_causal=True, scaling=scaling)[0] for part in parts]
        rows.append(torch.cat(outputs, dim=2))
    return torch.cat(rows)


def _packed_mask(packed: Sequence[Sequence[int]], window: int | None) -> Tensor:
    """Which token of packed rows sees which, bool [B, 1, T, T]."""
    numbers = torch.stack([torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)) for lengths in packed])
    places = torch.arange(numbers.shape[1])
    distance = places[:, None] - places
    visible = (numbers[:, :, None] == numbers[:, None]) & (distance >= 0)
    return (visible if window is None else visible & (distance < window)).unsqueeze(1)


def _cast_as_autocast(states: Tensor) -> Tensor:
    """States in the dtype in which autocast runs attention; torch's own attention is cast by torch."""
    device = states.device.type
    return states.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else states


def _attend_to_prefix(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Attention [B, H, L, D] of every branch token to the whole prefix, and its log-sum-exp [B, H, L]."""
    if cpu_attention.can_attend(query, key, value, scaling):
        return cpu_attention.attention_forward(query, key, value, is_causal=False, scaling=scaling)
    num_branches, num_heads, length, size = query.shape
    num_shared = key.shape[1]
    group = num_heads // num_shared
    folded = query.view(num_branches, num_shared, group, length, size).permute(1, 0, 2, 3, 4)
    folded = folded.reshape(1, num_shared, num_branches * group * length, size)
    output, weight = _flash_attention(folded, key, value, is_causal=False, scaling=scaling)
    output = output.view(num_shared, num_branches, group, length, size).permute(1, 0, 2, 3, 4)
    weight = weight.view(num_shared, num_branches, group, length).permute(1, 0, 2, 3)
    return output.reshape(query.shape), weight.reshape(num_branches, num_heads, length)


def _flash_attention(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp by the device's fused kernel, which never holds the scores."""
    if query.device.type == "cpu":
        output, weight = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, scale=scaling
        )
        return output, weight
    # Not run on this project's machines, which have no GPU.
    result = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scaling)
    return result[0], result[1]


def _attend_within(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> tuple[Tensor, Tensor]:
    """Attention [B, H, L, D] inside each branch, and its log-sum-exp [B, H, L]; head groups fold into the query axis."""
    if cpu_attention.can_attend(query, key, value, scaling):
        return cpu_attention.attention_forward(query, key, value, is_causal=mask is None, scaling=scaling, mask=mask)
    num_branches, num_heads, length, size = query.shape
    num_shared = key.shape[1]
    group = num_heads // num_shared
    if mask is None:
        repeated = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        return _flash_attention(query, *repeated, is_causal=True, scaling=scaling)
    folded = query.reshape(num_branches, num_shared, group * length, size)
    scores = (folded @ key.transpose(2, 3)).float().view(num_branches, num_heads, length, -1) * scaling
    scores = scores.masked_fill(~mask.unsqueeze(1), float("-inf"))
    weight = scores.logsumexp(dim=-1)
    shares = (scores - weight.unsqueeze(-1)).exp().to(value.dtype)
    output = shares.view(num_branches, num_shared, group * length, -1) @ value
    return output.view(query.shape), weight


def _attend_with_joined_prefix(
    query: Tensor, key: Tensor, value: Tensor, branches: Branches, layer: int, *, window: int | None, **options: Any
) -> Tensor:
    """The plain path for layers whose scores are more than a product: prefix and branch are joined (copied) and masked.

    The distance that a sliding window limits is counted in tokens seen, which for a tree of labels is the number of
    visible tokens in between, not the distance in the row.
    """
    num_branches, length, past = query.shape[0], query.shape[2], key.shape[2] - query.shape[2]
    mask = branches.mask
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().expand(num_branches, -1, -1)
    visible = mask
    if branches.num_prefix_tokens:
        prefix_key, prefix_value = branches.prefix[layer]
        key = torch.cat([prefix_key.expand(num_branches, -1, -1, -1), key], dim=2)
        value = torch.cat([prefix_value.expand(num_branches, -1, -1, -1), value], dim=2)
        visible = torch.cat([mask.new_ones(num_branches, length, branches.num_prefix_tokens), mask], dim=2)
    if window is not None:
        # A token's depth is the number of tokens it sees; keys at least `window` deeper tokens ago are out of sight.
        depth = visible.sum(dim=-1)
        key_depth = _key_depths(branches, mask, past)
        visible = visible & (depth.unsqueeze(-1) - key_depth.unsqueeze(1) < window)
    return _attend_plainly(query, key, value, visible, **options)


def _key_depths(branches: Branches, mask: Tensor, past: int) -> Tensor:
    """How many tokens each key's own token saw, itself included: [B, P + past + L]."""
    prefix = torch.arange(1, branches.num_prefix_tokens + 1, device=mask.device).expand(mask.shape[0], -1)
    own = branches.num_prefix_tokens + mask.sum(dim=-1)
    if not past:
        return torch.cat([prefix, own], dim=1)
    # Earlier tokens of a branch being answered are a chain: visible ones count up, padding on the left counts zero.
    earlier = branches.num_prefix_tokens + mask[:, 0, :past].cumsum(dim=-1)
    return torch.cat([prefix, earlier, own], dim=1)


def _attend_plainly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """Reference attention [B, H, L, D] in fp32 with every score held: soft-capping, then the mask, then sinks."""
    group = query.shape[1] // key.shape[1]
    scores = (query.float() @ key.float().repeat_interleave(group, dim=1).transpose(2, 3)) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    # Not -inf: padding that sees nothing would become nan, and nan times a weight of nought is nan in the next layer.
    scores = scores.masked_fill(~visible.unsqueeze(1), torch.finfo(scores.dtype).min)
    if s_aux is not None:
        sink = s_aux.float().view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        shares = torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        shares = scores.softmax(dim=-1)
    return (shares @ value.float().repeat_interleave(group, dim=1)).to(query.dtype)


def _visible_without_branches(query: Tensor, key: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Which keys each token sees, bool [B, L, T], from a mask of transformers' or, without one, causal."""
    length, total = query.shape[2], key.shape[2]
    if attention_mask is None:
        rows = torch.ones(length, total, dtype=torch.bool, device=query.device).tril(total - length)
        return rows.expand(query.shape[0], -1, -1)
    mask = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
    return mask[:, 0, :, :total].expand(query.shape[0], -1, -1)


AttentionInterface.register(IMPLEMENTATION, attend)
# A name registered for attention alone gets no mask, and padding and packing would leak silently.
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
