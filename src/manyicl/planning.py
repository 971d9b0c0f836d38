"""Forecasts of memory and work, from a model's config alone: known before anything is allocated or computed.

In: a config and numbers of tokens. Out: bytes, and floating-point operations (multiplications and additions, each counted).
Cost: none. Lost: element-wise work counts as nothing, and the memory of a forward pass is an estimate from above; keys and
values are exact.

    keys and values   2 · N · K · D · P numbers
    linear layers     2 · weights a token          attention   4 · N · H · D a token and token seen

Letters: N layers, H heads, K key-value heads, D head size, P tokens of the prefix.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from manyicl.errors import BudgetError, ModelError

logger = logging.getLogger(__name__)

LOGGED_FROM_BYTES = 256 * 2**20
MEMORY_FILE = Path("/proc/meminfo")
CONTROL_GROUP = Path("/sys/fs/cgroup")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a decoder of Llama's kind: grouped heads and a gated layer of three matrices."""

    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_size: int
    hidden_size: int
    inner_size: int
    vocabulary_size: int

    @property
    def weights_per_layer(self) -> int:
        """Weights of one layer that every token meets."""
        attention = 2 * self.hidden_size * self.head_size * (self.num_heads + self.num_key_value_heads)
        return attention + 3 * self.hidden_size * self.inner_size


def read_shape(config: Any) -> ModelShape:
    """The sizes that a transformers config states; of its text part where it has several.

    Raises:
        ModelError: the config lacks one that keys and values depend on.
    """
    text = config.get_text_config()
    heads, hidden = _read_size(text, "num_attention_heads"), _read_size(text, "hidden_size")
    return ModelShape(
        num_layers=_read_size(text, "num_hidden_layers"),
        num_heads=heads,
        num_key_value_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_size=int(getattr(text, "head_dim", None) or hidden // heads),
        hidden_size=hidden,
        inner_size=int(getattr(text, "intermediate_size", None) or 4 * hidden),
        vocabulary_size=_read_size(text, "vocab_size"),
    )


def _read_size(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    if not isinstance(value, int):
        raise ModelError(f"the config of {config.model_type} states no {name} (found {value!r}), which the forecast needs.")
    return value


def _read_countable_shape(config: Any) -> ModelShape:
    """The sizes of a model whose operations follow from them."""
    text = config.get_text_config()
    experts = next((name for name in _EXPERTS if getattr(text, name, None)), None)
    if experts or not getattr(text, "intermediate_size", None):
        found = f"{experts} = {getattr(text, experts)}" if experts else "no intermediate_size"
        raise ModelError(
            f"the config of {text.model_type} has {found}: how many weights a token meets does not follow from it. "
            "Operations are counted for layers of Llama's kind only; memory is forecast for all."
        )
    return read_shape(config)


def prefix_bytes(config: Any, num_tokens: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of `num_tokens` tokens, exactly."""
    shape = read_shape(config)
    return 2 * shape.num_layers * shape.num_key_value_heads * shape.head_size * num_tokens * dtype.itemsize


def int8_prefix_bytes(config: Any, num_tokens: int) -> int:
    """Bytes of the same keys and values as 8-bit integers with their scales and offsets (fp32), exactly.

    A scale and an offset stand for each channel of the keys and for each token of the values.
    """
    shape = read_shape(config)
    numbers = 2 * shape.head_size * num_tokens
    return shape.num_layers * shape.num_key_value_heads * (numbers + 2 * 4 * (shape.head_size + num_tokens))


def pass_bytes(config: Any, num_tokens: int, dtype: torch.dtype) -> int:
    """Bytes that a forward pass over `num_tokens` new tokens needs for a while, beside weights and prefix.

    An estimate from above: their keys and values, the widest moment of one layer (states, heads with fp32 copies of prefix and
    own part, the gated layer) and the logits of one token.
    """
    shape = read_shape(config)
    heads = shape.num_heads * shape.head_size
    numbers = 4 * shape.hidden_size + 4 * heads + 4 * shape.inner_size
    layer = num_tokens * (numbers * dtype.itemsize + 6 * heads * torch.float32.itemsize)
    return prefix_bytes(config, num_tokens, dtype) + layer + shape.vocabulary_size * torch.float32.itemsize


def prefill_operations(config: Any, num_tokens: int, *, num_cached: int = 0) -> int:
    """Operations that `num_tokens` new tokens of a prefix need behind `num_cached` that are there already; no logits.

    Raises:
        ModelError: the model's layers are not of Llama's kind.
    """
    seen = num_tokens * num_cached + num_tokens * (num_tokens + 1) // 2
    return _operations(_read_countable_shape(config), num_tokens, num_seen=seen)


def query_operations(config: Any, query_tokens: int, *, prefix_tokens: int, num_queries: int = 1, num_logits: int = 1) -> int:
    """Operations of queries of `query_tokens` tokens each (labels included) behind one prefix.

    Args:
        num_logits: Tokens of each query whose logits are needed: one, and one more for each node of its label trie.

    Raises:
        ModelError: the model's layers are not of Llama's kind.
    """
    shape = _read_countable_shape(config)
    seen = query_tokens * prefix_tokens + query_tokens * (query_tokens + 1) // 2
    logits = 2 * num_logits * shape.hidden_size * shape.vocabulary_size
    return num_queries * (_operations(shape, query_tokens, num_seen=seen) + logits)


def _operations(shape: ModelShape, num_tokens: int, *, num_seen: int) -> int:
    """Operations of linear layers and attention; `num_seen` counts pairs of a token and one that it sees, itself included."""
    attention = 4 * shape.num_heads * shape.head_size * num_seen
    return shape.num_layers * (2 * shape.weights_per_layer * num_tokens + attention)


def available_bytes(device: torch.device) -> int | None:
    """Memory that can still be had on a device; None where the system does not say.

    On a processor that is the system's estimate, or less where a container's limit (control groups, version 2) leaves less.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        fields = dict(line.split(":", 1) for line in MEMORY_FILE.read_text(encoding="ascii").splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return None
    left = _left_in_control_group()
    return free if left is None else min(free, left)


def _left_in_control_group() -> int | None:
    """What the container's limit leaves; cached file pages that can be dropped count as free."""
    try:
        limit = int((CONTROL_GROUP / "memory.max").read_text(encoding="ascii"))  # "max" when there is none
        used = int((CONTROL_GROUP / "memory.current").read_text(encoding="ascii"))
        counters = dict(line.split() for line in (CONTROL_GROUP / "memory.stat").read_text(encoding="ascii").splitlines())
        return max(0, limit - used + int(counters["inactive_file"]))
    except (OSError, KeyError, ValueError):
        return None


def check_memory(num_bytes: int, *, purpose: str, remedy: str, device: torch.device) -> None:
    """Log what is about to be allocated when it is much, and refuse what the device does not have.

    Args:
        purpose: What the memory is for, as the subject of a sentence: "a prefix of 7,500 tokens".
        remedy: What to do when there is too little.

    Raises:
        BudgetError: less than `num_bytes` is available.
    """
    available = available_bytes(device)
    if available is not None and num_bytes > available:
        raise BudgetError(
            f"{purpose} needs {show_bytes(num_bytes)} on {device.type}, where {show_bytes(available)} are available. {remedy}"
        )
    if num_bytes > LOGGED_FROM_BYTES:
        said = "of an unknown amount" if available is None else f"of {show_bytes(available)} available"
        logger.info("%s needs %s on %s, %s", purpose, show_bytes(num_bytes), device.type, said)


def show_bytes(num_bytes: float) -> str:
    """A number of bytes as people read it: 173 MB, 1.4 GB; units are powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"
