"""Our CPU attention kernel against torch's, at the default model's shapes: python benchmarks/attention.py --output FILE

Two kinds of work, bf16: 128 queries of 14 tokens against a shared prefix (forward), and one row with causal attention (forward,
and forward with backward). Both kernels get the same tensors, and their errors against fp32 are checked before anything is timed.
torch's is called as without ours: heads and branches folded for the prefix, `scaled_dot_product_attention` with grouped keys for
rows.

Operations are the multiplications and additions that the work needs, each counted: 4 · H · D per visible (token, key) pair, and
10 · H · D more for the backward pass; a causal row has L · (L + 1) / 2 pairs. The machine's rate is that of bf16 `nn.Linear`
layers at the default model's shapes, in this run and by the same clock. Times are the best of `--repeats`. On a machine that is
busy otherwise take `--threads 1 --clock cpu`, which counts the process's own processor time.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from machine import describe_machine, linear_shapes
from torch import Tensor, nn

from manyicl import attention
from manyicl.kernels import cpu_attention

HEADS, KEY_VALUE_HEADS, HEAD_SIZE, SCALING = 9, 3, 64, 0.125
MODEL = SimpleNamespace(hidden_size=576, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536)
NUM_QUERIES, QUERY_TOKENS = 128, 14
PREFIX_TOKENS = (1_000, 2_700, 7_500)
ROW_TOKENS = (1_024, 2_048, 4_096, 8_192)
LINEAR_TOKENS = 2_048

Function = Callable[[], Any]


def best_seconds(function: Function, clock: Callable[[], float], repeats: int) -> float:
    """The shortest of several runs after one that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        start = clock()
        function()
        seconds.append(clock() - start)
    return min(seconds[1:])


def linear_rate(clock: Callable[[], float], repeats: int) -> float:
    """Operations per second of the linear layers of one decoder layer."""
    layers = [
        (nn.Linear(wide, narrow, bias=False, dtype=torch.bfloat16), torch.randn(LINEAR_TOKENS, wide).bfloat16())
        for wide, narrow in linear_shapes(MODEL)
    ]
    operations = sum(2 * LINEAR_TOKENS * wide * narrow for wide, narrow in linear_shapes(MODEL))
    with torch.inference_mode():
        return operations / best_seconds(lambda: [layer(rows) for layer, rows in layers], clock, 2 * repeats)


def random_states(branches: int, heads: int, tokens: int) -> Tensor:
    """Random states [branches, heads, tokens, D] laid out by token, as a projection leaves them."""
    return torch.randn(branches, tokens, heads, HEAD_SIZE).bfloat16().transpose(1, 2)


def errors_of(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> tuple[float, float]:
    """Error of ours and of torch's: the size of the error over the size of the result (2-norms), the largest of all results.

    Stops the benchmark where ours is over 1%, or over 1.5 times torch's.
    """
    error, torch_error = (
        max(float((one.detach() - right.detach()).norm() / right.detach().norm()) for one, right in zip(some, exact, strict=True))
        for some in (ours, theirs)
    )
    if error > min(0.01, 1.5 * torch_error):
        raise SystemExit(f"the results of ours are {error:.2%} off, torch's {torch_error:.2%}; nothing more is timed")
    return error, torch_error


@dataclass
class Case:
    """One piece of work: attention with our kernel, with torch's, and with torch's in fp32, to compare with."""

    name: str
    operations: float
    ours: Function
    theirs: Function
    exact: Function


def prefix_case(prefix_tokens: int) -> Case:
    """Queries that attend to a prefix."""
    query = random_states(NUM_QUERIES, HEADS, QUERY_TOKENS)
    key, value = (torch.randn(1, KEY_VALUE_HEADS, prefix_tokens, HEAD_SIZE).bfloat16() for _ in range(2))

    def with_torch(dtype: torch.dtype) -> tuple[Tensor, ...]:
        can_attend, cpu_attention.can_attend = cpu_attention.can_attend, lambda *_: False  # type: ignore[assignment]
        try:
            return attention._attend_to_prefix(*(states.to(dtype) for states in (query, key, value)), SCALING)
        finally:
            cpu_attention.can_attend = can_attend

    return Case(
        name=f"prefix of {prefix_tokens} tokens, forward",
        operations=4.0 * NUM_QUERIES * QUERY_TOKENS * prefix_tokens * HEADS * HEAD_SIZE,
        ours=lambda: cpu_attention.attention_forward(query, key, value, is_causal=False, scaling=SCALING),
        theirs=lambda: with_torch(torch.bfloat16),
        exact=lambda: with_torch(torch.float32),
    )


def row_case(row_tokens: int, *, has_backward: bool) -> Case:
    """One row with causal attention."""
    inputs = tuple(random_states(1, heads, row_tokens) for heads in (HEADS, KEY_VALUE_HEADS, KEY_VALUE_HEADS))
    gradient = random_states(1, HEADS, row_tokens)
    for states in inputs:
        states.requires_grad_(has_backward)

    def finish(output: Tensor) -> tuple[Tensor, ...]:
        return (output, *torch.autograd.grad(output, inputs, gradient.to(output.dtype))) if has_backward else (output,)

    def with_torch(dtype: torch.dtype) -> tuple[Tensor, ...]:
        attend = nn.functional.scaled_dot_product_attention
        states = (states.to(dtype) for states in inputs)
        return finish(attend(*states, is_causal=True, scale=SCALING, enable_gqa=True))

    pairs = row_tokens * (row_tokens + 1) / 2
    return Case(
        name=f"row of {row_tokens} tokens, {'forward and backward' if has_backward else 'forward'}",
        operations=(14.0 if has_backward else 4.0) * pairs * HEADS * HEAD_SIZE,
        ours=lambda: finish(cpu_attention.attention_forward(*inputs, is_causal=True, scaling=SCALING)[0]),
        theirs=lambda: with_torch(torch.bfloat16),
        exact=lambda: with_torch(torch.float32),
    )


def measure(case: Case, clock: Callable[[], float], repeats: int, linear: float) -> dict[str, float | str]:
    """The figures of one case, once its results are found right; `linear` are operations per second of nn.Linear."""
    error, torch_error = errors_of(case.ours(), case.theirs(), case.exact())
    seconds, torch_seconds = (best_seconds(function, clock, repeats) for function in (case.ours, case.theirs))
    return {
        "case": case.name,
        "operations": case.operations,
        "relative_error": error,
        "torch_relative_error": torch_error,
        "seconds": seconds,
        "torch_seconds": torch_seconds,
        "times_torch": torch_seconds / seconds,
        "operations_per_second": case.operations / seconds,
        "torch_operations_per_second": case.operations / torch_seconds,
        "share_of_linear_rate": case.operations / seconds / linear,
        "torch_share_of_linear_rate": case.operations / torch_seconds / linear,
    }


def main() -> None:
    """Measure every case and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu divides processor time by threads")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if not cpu_attention.is_available():
        raise SystemExit("the kernel cannot run here; the message above says why")

    def clock() -> float:
        return time.perf_counter() if arguments.clock == "wall" else time.process_time() / arguments.threads

    linear = linear_rate(clock, arguments.repeats)
    cases = [prefix_case(tokens) for tokens in PREFIX_TOKENS]
    cases += [row_case(tokens, has_backward=has_backward) for has_backward in (False, True) for tokens in ROW_TOKENS]
    figures = {
        "clock": arguments.clock,
        "linear_operations_per_second": linear,
        "cases": [measure(case, clock, arguments.repeats, linear) for case in cases],
        "linear_operations_per_second_afterwards": linear_rate(clock, arguments.repeats),
        "machine": describe_machine(),
    }
    text = json.dumps(figures, indent=2)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
