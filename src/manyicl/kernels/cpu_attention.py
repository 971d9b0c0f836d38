"""Attention for bf16 on processors with AVX-512 BF16, and with AMX where there is that.

    query   [B, H, L, D]           any strides, last dimension contiguous
    key     [B or 1, K, T, D]      H is a multiple of K: head h reads key-value head h // (H / K)
    value   [B or 1, K, T, D]      one branch of keys is shared by all B queries
    mask    [B, L, T] bool         what each token sees; None for everything
    output  [B, H, L, D] bf16      laid out as [B, L, H, D]
    lse     [B, H, L] fp32         log-sum-exp of the scaled scores

Letters: B branches, H heads, K key-value heads, L query tokens, T keys, D head size (a multiple of 16, at most 256).

Causal means that token i sees keys up to i + T - L. A token that sees nothing gets output 0 and log-sum-exp minus infinity.
Nothing is copied or repeated per head or branch. Results are the same from run to run for a given number of threads
(torch.get_num_threads()). Scores, sums and gradients are fp32; shares and their gradients meet values and keys as bf16, as in
torch's kernel.

The kernel is compiled on first use, in about five seconds, and kept (see build.py). Where that is not possible, or the
environment variable MANYICL_CPU_KERNEL is "off", `can_attend` says no, after one message. AMX multiplies blocks of rows where
other processors multiply vectors, and sums in another order: the last digits differ. MANYICL_CPU_KERNEL "avx512" leaves it idle,
for results in the digits of those processors; torch's kernel is faster than that where there is AMX.
"""

import ctypes
import functools
import logging
import math
import os
import threading
from typing import Any

import torch
from torch import Tensor

from manyicl.kernels.build import BuildError, cpu_flags, load_library

MOST_HEAD_SIZE = 256
MOST_SPLITS = 16
FEATURES = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"})

AMX_FEATURES = frozenset({"amx_tile", "amx_bf16"})
AMX_FLAGS = ("-DMANYICL_AMX", "-mamx-tile", "-mamx-bf16")
_FILES = ("attention", ("forward.cpp", "backward.cpp"), ("attention.h", "tiles.h", "amx.h"))

logger = logging.getLogger(__name__)
_lock = threading.Lock()


class _Call(ctypes.Structure):
    """What the compiled functions are told; mirrors `Call` in attention.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "mask", "output", "lse")),
        *((name, ctypes.c_void_p) for name in ("output_gradient", "delta", "query_partial")),
        *((name, ctypes.c_void_p) for name in ("query_gradient", "key_gradient", "value_gradient")),
        *((name, ctypes.c_int64) for name in ("branches", "heads", "shared_heads", "length", "total", "size", "key_branches")),
        *((f"{name}_strides", ctypes.c_int64 * 3) for name in ("query", "key", "value", "output", "output_gradient")),
        *((f"{name}_strides", ctypes.c_int64 * 3) for name in ("query_gradient", "key_gradient", "value_gradient")),
        ("mask_strides", ctypes.c_int64 * 2),
        ("scaling", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("is_causal", "splits", "threads")),
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_available() -> bool:
    """Whether the kernel can run here; the first call compiles it, and tells once why it cannot."""
    return _library() is not None


def find_instructions() -> str | None:
    """What the kernel is compiled for, "amx" or "avx512"; None where it cannot run."""
    library = _library()
    return None if library is None else "amx" if library.uses_amx() else "avx512"


def can_attend(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> bool:
    """Whether the kernel takes these tensors and is there."""
    size = query.shape[-1]
    tensors = (query, key, value)
    return (
        all(tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16 and tensor.stride(-1) == 1 for tensor in tensors)
        and size % 16 == 0
        and size <= MOST_HEAD_SIZE
        and value.shape[-1] == size
        and scaling > 0
        and is_available()
    )


def attention_forward(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scaling: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention [B, H, L, D] and its log-sum-exp [B, H, L]; see the module for shapes. Ask `can_attend` first.

    Gradients flow through the attention to query, key and value, and not through the log-sum-exp.
    """
    result: tuple[Tensor, Tensor] = torch.ops.manyicl.attention(query, key, value, mask, is_causal, scaling)
    return result


def _forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scaling: float
) -> tuple[Tensor, Tensor]:
    """The operator's body on a CPU."""
    output, lse = _make_outputs(query, key, value, mask, is_causal, scaling)
    call = _describe(query, key, value, mask, is_causal, scaling)
    call.lse = lse.data_ptr()
    _set(call, "output", output)
    _run("attention_forward", call)
    return output, lse


def _make_outputs(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scaling: float
) -> tuple[Tensor, Tensor]:
    """Outputs without their content, which is also what torch.compile is told of the operator."""
    branches, heads, length, size = query.shape
    return (
        query.new_empty(branches, length, heads, size).transpose(1, 2),
        query.new_empty(branches, heads, length, dtype=torch.float32),
    )


def _backward(
    output_gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    output: Tensor,
    lse: Tensor,
    is_causal: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; those of shared keys and of a head group are summed."""
    output_gradient = output_gradient if output_gradient.stride(-1) == 1 else output_gradient.contiguous()
    gradients = _make_gradients(output_gradient, query, key, value, mask, output, lse, is_causal, scaling)
    call = _describe(query, key, value, mask, is_causal, scaling)
    call.splits = _count_splits(call)
    partial = lse.new_empty(call.splits * query.numel())
    delta = torch.empty_like(lse)
    call.lse, call.delta, call.query_partial = lse.data_ptr(), delta.data_ptr(), partial.data_ptr()
    for name, tensor in (("output", output), ("output_gradient", output_gradient)):
        _set(call, name, tensor)
    for name, tensor in zip(("query_gradient", "key_gradient", "value_gradient"), gradients, strict=True):
        _set(call, name, tensor)
    _run("attention_backward", call)
    return gradients


def _make_gradients(_: Tensor, query: Tensor, key: Tensor, value: Tensor, *__: object) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients without their content, each laid out by token as a projection before it wants them."""
    query_gradient, key_gradient, value_gradient = (
        states.new_empty(states.shape[0], states.shape[2], states.shape[1], states.shape[3]).transpose(1, 2)
        for states in (query, key, value)
    )
    return query_gradient, key_gradient, value_gradient


def _count_splits(call: _Call) -> int:
    """Parts of the keys of each key-value head: the fewest that keep 95% of the threads' time in use, or else the best."""
    pairs, most = call.key_branches * call.shared_heads, min(MOST_SPLITS, max(1, call.total // 192))
    used = {parts: pairs * parts / call.threads / math.ceil(pairs * parts / call.threads) for parts in range(1, most + 1)}
    return next((parts for parts, share in used.items() if share >= 0.95), max(used, key=lambda parts: used[parts]))


def _describe(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scaling: float) -> _Call:
    """The part of a call that forward and backward share."""
    branches, heads, length, size = query.shape
    _check_shapes(query, key, value, mask)
    call = _Call(branches=branches, heads=heads, length=length, size=size, scaling=scaling, is_causal=is_causal)
    call.key_branches, call.shared_heads, call.total = key.shape[:3]
    call.threads = torch.get_num_threads()
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _set(call, name, tensor)
    if mask is not None:
        call.kept = mask = mask if mask.stride(-1) == 1 else mask.contiguous()
        call.mask, call.mask_strides = mask.data_ptr(), mask.stride()[:2]
    return call


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    """Refuse what would read memory out of bounds."""
    branches, heads, length, size = query.shape
    fits = key.shape == value.shape and key.shape[0] in (1, branches) and heads % key.shape[1] == 0 and key.shape[3] == size
    if not fits or any(states.dtype != torch.bfloat16 or states.stride(-1) != 1 for states in (query, key, value)):
        raise ValueError(f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not go together")
    if mask is not None and (mask.shape != (branches, length, key.shape[2]) or mask.dtype != torch.bool):
        raise ValueError(f"the mask is {tuple(mask.shape)} {mask.dtype}, not {(branches, length, key.shape[2])} torch.bool")


def _set(call: _Call, name: str, tensor: Tensor) -> None:
    """Hand a tensor's address and its strides to a call."""
    setattr(call, name, tensor.data_ptr())
    setattr(call, f"{name}_strides", tensor.stride()[:3])


def _run(function: str, call: _Call) -> None:
    """Run a compiled function, which lets other Python threads run meanwhile."""
    library = _library()
    if library is None:
        raise RuntimeError("the attention kernel is not available here; ask can_attend before calling it")
    if getattr(library, function)(ctypes.byref(call)) != 0:
        raise MemoryError(f"{function}: no memory for the buffers of {call.threads} threads")


def _library() -> ctypes.CDLL | None:
    """The compiled kernel, or None where it cannot run."""
    with _lock:
        return _load_once()


def _has_amx() -> bool:
    """Whether this process may use the processor's matrix unit, for which the kernel of Linux is asked."""
    return cpu_flags() >= AMX_FEATURES and torch.cpu._init_amx()


def _load_for_amx() -> ctypes.CDLL | None:
    """The kernel compiled for AMX; None, and a message, where the compiler does not know it."""
    try:
        return load_library(*_FILES, AMX_FLAGS)
    except BuildError as error:
        logger.warning("The attention kernel could not be compiled for AMX, and leaves it idle: %s.", error)
        return None


@functools.cache
def _load_once() -> ctypes.CDLL | None:
    """Load or compile the kernel; what hinders it is told here, once."""
    wanted = os.environ.get("MANYICL_CPU_KERNEL", "").lower()
    if wanted == "off":
        logger.info("MANYICL_CPU_KERNEL is off: attention uses torch's kernel.")
        return None
    missing = FEATURES - cpu_flags()
    if missing:
        logger.info("The processor lacks %s: attention uses torch's kernel.", ", ".join(sorted(missing)))
        return None
    try:
        library = _load_for_amx() if wanted != "avx512" and _has_amx() else None
        library = library or load_library(*_FILES)
    except BuildError as error:
        logger.warning("The fast attention kernel is not available, and attention uses torch's kernel: %s.", error)
        return None
    for name, arguments in (("attention_forward", 1), ("attention_backward", 1), ("uses_amx", 0)):
        getattr(library, name).argtypes = (ctypes.POINTER(_Call),) * arguments
        getattr(library, name).restype = ctypes.c_int64
    return library


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Remember what the gradients are computed from; torch names the arguments."""
    query, key, value, mask, ctx.is_causal, ctx.scaling = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, mask, *output)


def _backward_of_operator(ctx: Any, output_gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    """What autograd asks for: a gradient or None per argument."""
    saved = (*ctx.saved_tensors, ctx.is_causal, ctx.scaling)
    return (*torch.ops.manyicl.attention_backward(output_gradient, *saved), None, None, None)


# An operator of torch, not a bare function, so that torch.compile keeps whole layers in one graph. Nothing is compiled by this.
_operators = torch.library.Library("manyicl", "FRAGMENT")
_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? mask"
_operators.define(f"attention({_INPUTS}, bool is_causal, float scaling) -> (Tensor, Tensor)")
_operators.define(
    f"attention_backward(Tensor output_gradient, {_INPUTS}, Tensor output, Tensor lse, bool is_causal, float scaling)"
    " -> (Tensor, Tensor, Tensor)"
)
_operators.impl("attention", _forward, "CPU")
_operators.impl("attention_backward", _backward, "CPU")
torch.library.register_fake("manyicl::attention", _make_outputs, lib=_operators)
torch.library.register_fake("manyicl::attention_backward", _make_gradients, lib=_operators)
torch.library.register_autograd("manyicl::attention", _backward_of_operator, setup_context=_keep_for_backward, lib=_operators)
