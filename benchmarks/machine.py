"""The machine's own limit: bf16 matrix products at a model's shapes, and how many operations a job needs at least.

Shared by the benchmarks of this folder, so that every share of the limit is taken of the same kind of rate, measured in the
same run. Operations are floating-point multiplications and additions, each counted.
"""

import platform
import statistics
import time
from typing import Any

import torch
from torch import nn

_ROWS = 2048
_REPEATS = 7


def linear_shapes(config: Any) -> list[tuple[int, int]]:
    """(in, out) features of the linear layers of one decoder layer of a Llama-like model."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    size = getattr(config, "head_dim", None) or hidden // heads
    keys = config.num_key_value_heads * size
    query, inner = heads * size, config.intermediate_size
    return [(hidden, query), (hidden, keys), (hidden, keys), (query, hidden), (hidden, inner), (hidden, inner), (inner, hidden)]


def measure_matrix_rate(config: Any, dtype: torch.dtype = torch.bfloat16) -> float:
    """Operations per second of the linear layers of one decoder layer, 2,048 tokens at a time: the median of seven passes."""
    layers = [(nn.Linear(i, o, bias=False, dtype=dtype), torch.randn(_ROWS, i, dtype=dtype)) for i, o in linear_shapes(config)]
    operations = sum(2 * _ROWS * i * o for i, o in linear_shapes(config))
    seconds = []
    with torch.inference_mode():
        for repeat in range(_REPEATS + 3):
            start = time.perf_counter()
            for layer, rows in layers:
                layer(rows)
            if repeat >= 3:
                seconds.append(time.perf_counter() - start)
    return operations / statistics.median(seconds)


def training_operations(config: Any, row_tokens: list[int], *, targets: int, lora_rank: int | None) -> float:
    """Operations that updates on rows of these lengths need.

    Forward and backward through the linear layers (2 + 2 a weight and token with frozen weights, 2 + 4 without), the causal half
    of the attention forward (4 · T² · H · D / 2) and backward (twice that), the vocabulary matrix for target tokens only, and
    6 a weight and token for adapters. Nothing is recomputed; element-wise work counts nothing.
    """
    layers = config.num_hidden_layers
    shapes = linear_shapes(config)
    weights = layers * sum(i * o for i, o in shapes)
    adapters = layers * sum(lora_rank * (i + o) for i, o in shapes) if lora_rank else 0
    heads_size = shapes[0][1]
    tokens = sum(row_tokens)
    linear = tokens * ((4 if lora_rank else 6) * weights + 6 * adapters)
    attention = layers * sum(6 * length * length * heads_size for length in row_tokens)
    head = targets * (4 if lora_rank else 6) * config.hidden_size * config.vocab_size
    return float(linear + attention + head)


def describe_machine() -> dict[str, Any]:
    """Processor, threads and versions, as they stand in every result."""
    import transformers

    model = next((line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor())
    return {
        "processor": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _cpuinfo() -> list[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            return stream.read().splitlines()
    except OSError:
        return []
