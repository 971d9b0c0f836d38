"""Number formats of weights, by name, and which of them this machine is fast in."""

import logging
import platform
from functools import cache
from typing import Literal

import torch

from manyicl.errors import ModelError

logger = logging.getLogger(__name__)

Dtype = Literal["auto", "bfloat16", "float32"]


def resolve_dtype(dtype: Dtype) -> torch.dtype:
    """The torch type that a name means on this machine; `auto` takes bfloat16 where it is fast and float32 elsewhere.

    Raises:
        ModelError: bfloat16 is asked of a processor on which torch cannot multiply in it.
    """
    if dtype == "float32":
        return torch.float32
    is_fast = torch.cuda.is_available() or has_fast_bfloat16()
    if dtype == "auto":
        return torch.bfloat16 if is_fast else torch.float32
    if not is_fast:
        if not multiplies_in_bfloat16():
            raise ModelError("this processor has no bfloat16 (AVX-512 or AMX). Use dtype float32, or auto.")
        _warn_of_emulation()
    return torch.bfloat16


def has_fast_bfloat16() -> bool:
    """Whether this processor has instructions that multiply in bfloat16."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    if is_x86 and not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return False
    return multiplies_in_bfloat16()


def multiplies_in_bfloat16() -> bool:
    """Whether oneDNN multiplies in bfloat16 here; on any AVX-512 it does, without instructions for it slower than in float32.

    Source: torch 2.13.0, whose public functions do not tell this.
    """
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@cache
def _warn_of_emulation() -> None:
    logger.warning("this processor has no bfloat16 instructions and emulates them; float32 is several times faster here")
