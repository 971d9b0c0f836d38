"""Number formats by name: bfloat16 only where the processor has instructions for it."""

import platform

import pytest
import torch

from manyicl import dtypes
from manyicl.dtypes import has_fast_bfloat16, resolve_dtype
from manyicl.errors import ModelError


@pytest.mark.parametrize(
    ("machine", "has_onednn", "has_avx512_bf16", "has_amx", "expected"),
    [
        ("x86_64", True, True, False, True),
        ("AMD64", True, False, True, True),
        ("x86_64", True, False, False, False),  # Any AVX-512: oneDNN emulates it.
        ("x86_64", False, False, False, False),
        ("aarch64", True, False, False, True),
        ("aarch64", False, False, False, False),
    ],
)
def test_bfloat16_is_fast_where_there_are_instructions_for_it(
    monkeypatch, machine, has_onednn, has_avx512_bf16, has_amx, expected
):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_onednn)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    assert has_fast_bfloat16() == expected


def test_bfloat16_is_refused_where_torch_has_none_and_warned_of_where_it_is_emulated(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for is_fast, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(dtypes, "has_fast_bfloat16", lambda is_fast=is_fast: is_fast)
        assert resolve_dtype("auto") == expected
        assert resolve_dtype("float32") == torch.float32
    dtypes._warn_of_emulation.cache_clear()
    monkeypatch.setattr(dtypes, "multiplies_in_bfloat16", lambda: True)
    assert [resolve_dtype("bfloat16"), resolve_dtype("bfloat16")] == [torch.bfloat16] * 2
    assert [record.message for record in caplog.records] == [
        "this processor has no bfloat16 instructions and emulates them; float32 is several times faster here"
    ]
    monkeypatch.setattr(dtypes, "multiplies_in_bfloat16", lambda: False)
    with pytest.raises(ModelError, match=r"this processor has no bfloat16 \(AVX-512 or AMX\)\. Use dtype float32, or auto\."):
        resolve_dtype("bfloat16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_dtype("bfloat16") == torch.bfloat16
