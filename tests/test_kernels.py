"""The CPU attention kernel against fp64 on the same bf16 inputs, and what happens where there is none."""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from manyicl import attention
from manyicl.kernels import cpu_attention

# branches of queries, of keys, heads, key-value heads, query tokens, keys, head size, causal
SHAPES = [
    (1, 1, 9, 3, 300, 300, 64, True),
    (1, 1, 9, 3, 2, 513, 64, True),
    (3, 1, 9, 3, 14, 500, 64, False),
    (3, 3, 4, 2, 7, 20, 32, True),
    (2, 2, 4, 4, 33, 70, 128, True),
    (2, 2, 3, 1, 1, 1, 64, True),
    (2, 1, 6, 2, 5, 258, 64, False),
    (2, 2, 3, 1, 5, 9, 80, True),
    (1, 1, 2, 2, 20, 1000, 256, False),
    (4, 1, 2, 1, 1, 47, 16, False),
    (2, 1, 3, 3, 40, 40, 48, True),
]


@pytest.fixture(params=["amx", "avx512"])
def _kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel as it is compiled for processors with and without AMX."""
    if request.param == "amx" and not cpu_attention._has_amx():
        pytest.skip("the processor has no AMX")
    monkeypatch.setenv("MANYICL_CPU_KERNEL", request.param)
    cpu_attention._load_once.cache_clear()
    library = cpu_attention._library()
    if library is None:
        pytest.skip("the kernel needs a processor with AVX512-BF16 and a C++ compiler")
    assert library.uses_amx() == (request.param == "amx")
    assert cpu_attention.find_instructions() == request.param
    yield
    cpu_attention._load_once.cache_clear()


@pytest.fixture
def _fresh_loader() -> Iterator[None]:
    """Let a test load the library anew, and forget what it found."""
    cpu_attention._load_once.cache_clear()
    yield
    cpu_attention._load_once.cache_clear()


def random_bf16(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def random_inputs(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Query (a transposed view), key and value for one line of SHAPES."""
    branches, key_branches, heads, shared, length, total, size, _ = shape
    query = random_bf16(branches, length, heads, size, seed=1).transpose(1, 2)
    return query, random_bf16(key_branches, shared, total, size, seed=2), random_bf16(key_branches, shared, total, size, seed=3)


def attention_layer() -> torch.nn.Module:
    """What transformers hands to an attention function as the module: 6 heads on 2 key-value heads."""
    layer = torch.nn.Module()
    layer.layer_idx, layer.num_key_value_groups, layer.is_causal = 0, 3, True  # type: ignore[assignment]
    return layer


def visible_keys(query: Tensor, key: Tensor, *, is_causal: bool) -> Tensor:
    length, total = query.shape[2], key.shape[2]
    seen = torch.ones(query.shape[0], length, total, dtype=torch.bool)
    return seen.tril(total - length) if is_causal else seen


def repeat_keys(states: Tensor, query: Tensor) -> Tensor:
    group = query.shape[1] // states.shape[1]
    return states.expand(query.shape[0], -1, -1, -1).repeat_interleave(group, dim=1)


def exact_attention(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Attention and log-sum-exp in fp64, every score held."""
    query, key, value = query.double(), repeat_keys(key, query).double(), repeat_keys(value, query).double()
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~seen.unsqueeze(1), float("-inf"))
    lse = scores.logsumexp(dim=-1)
    return (scores - lse.unsqueeze(-1)).exp().nan_to_num(0.0) @ value, lse


def torch_attention(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scaling: float) -> Tensor:
    mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf")).unsqueeze(1).to(query.dtype)
    key, value = repeat_keys(key, query), repeat_keys(value, query)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=mask, scale=scaling)[0]


def assert_as_exact_as_torch(ours: Tensor, torchs: Tensor, exact: Tensor) -> None:
    our_error, torch_error = (ours - exact).abs(), (torchs - exact).abs()
    assert our_error.max() <= 1.5 * torch_error.max()
    assert our_error.mean() <= 1.5 * torch_error.mean()


@pytest.mark.usefixtures("_kernel")
class TestForward:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_is_as_exact_as_torch(self, shape: tuple[int, ...]) -> None:
        query, key, value = random_inputs(shape)
        seen = visible_keys(query, key, is_causal=bool(shape[-1]))
        output, lse = cpu_attention.attention_forward(query, key, value, is_causal=bool(shape[-1]), scaling=0.2)
        exact, exact_lse = exact_attention(query, key, value, seen, 0.2)
        assert output.dtype == torch.bfloat16
        assert output.shape == query.shape
        assert_as_exact_as_torch(output, torch_attention(query, key, value, seen, 0.2), exact)
        torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("place", [0, 255, 256, 399])
    def test_large_scores_neither_overflow_nor_drown(self, place: int) -> None:
        query, key, value = random_inputs((1, 1, 3, 1, 30, 400, 64, False))
        query[..., 0], key[:, :, place, 0] = 8.0, 60.0  # A score of 8 · 60 / 8 = 60, and of -60 two keys later.
        key[:, :, (place + 2) % 400, 0] = -60.0
        seen = visible_keys(query, key, is_causal=False)
        output, lse = cpu_attention.attention_forward(query, key, value, is_causal=False, scaling=0.125)
        exact, exact_lse = exact_attention(query, key, value, seen, 0.125)
        assert exact_lse.min() > 50
        assert_as_exact_as_torch(output, torch_attention(query, key, value, seen, 0.125), exact)
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=0)

    def test_a_mask_hides_keys(self) -> None:
        query, key, value = random_inputs((4, 4, 6, 2, 24, 300, 64, False))
        seen = torch.rand(4, 24, 300, generator=torch.Generator().manual_seed(4)) < 0.3
        seen[1, 5] = False
        output, lse = cpu_attention.attention_forward(query, key, value, is_causal=False, scaling=0.125, mask=seen)
        exact, exact_lse = exact_attention(query, key, value, seen, 0.125)
        assert (output.double() - exact).abs().max() < 0.01
        torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=1e-5)
        assert output[1, :, 5].abs().max() == 0
        assert (lse[1, :, 5] == float("-inf")).all()

    def test_a_strided_mask_is_read_in_place(self) -> None:
        query, key, value = random_inputs((3, 3, 2, 1, 5, 40, 32, False))
        wide = torch.rand(3, 10, 50, generator=torch.Generator().manual_seed(4)) < 0.5
        crossed = wide[:, :5, :40].transpose(1, 2).contiguous().transpose(1, 2)
        for seen in (wide[:, ::2, 3:43], wide[:1, ::2, 3:43].expand(3, -1, -1), crossed):
            output, _ = cpu_attention.attention_forward(query, key, value, is_causal=False, scaling=0.2, mask=seen)
            copied = cpu_attention.attention_forward(query, key, value, is_causal=False, scaling=0.2, mask=seen.contiguous())[0]
            assert torch.equal(output, copied)

    def test_tokens_before_the_first_key_see_nothing(self) -> None:
        query, key, value = random_inputs((1, 1, 4, 2, 20, 5, 64, True))
        output, lse = cpu_attention.attention_forward(query, key, value, is_causal=True, scaling=0.125)
        assert output[:, :, :15].abs().max() == 0
        assert (lse[:, :, :15] == float("-inf")).all()
        exact, _ = exact_attention(query[:, :, 15:], key, value, visible_keys(query[:, :, 15:], key, is_causal=True), 0.125)
        assert (output[:, :, 15:].double() - exact).abs().max() < 0.01

    def test_any_strides_give_the_same(self) -> None:
        query, key, value = random_inputs((2, 2, 6, 2, 30, 290, 64, True))
        wide = torch.zeros(2, 290, 2, 201, dtype=torch.bfloat16)  # Odd strides: rows are not even aligned to four bytes.
        wide[..., 1:65], wide[..., 70:134] = key.transpose(1, 2), value.transpose(1, 2)
        views = query.contiguous(), wide[..., 1:65].transpose(1, 2), wide[..., 70:134].transpose(1, 2)
        plain = cpu_attention.attention_forward(query, key, value, is_causal=True, scaling=0.125)
        strided = cpu_attention.attention_forward(*views, is_causal=True, scaling=0.125)
        assert torch.equal(plain[0], strided[0])
        assert torch.equal(plain[1], strided[1])

    def test_shared_keys_equal_their_copies(self) -> None:
        query, key, value = random_inputs((5, 1, 6, 2, 11, 300, 64, False))
        copies = key.expand(5, -1, -1, -1).contiguous(), value.expand(5, -1, -1, -1).contiguous()
        shared = cpu_attention.attention_forward(query, key, value, is_causal=False, scaling=0.125)
        copied = cpu_attention.attention_forward(query, *copies, is_causal=False, scaling=0.125)
        assert torch.equal(shared[0], copied[0])
        assert torch.equal(shared[1], copied[1])

    def test_the_number_of_threads_changes_nothing(self) -> None:
        query, key, value = random_inputs((1, 1, 9, 3, 500, 500, 64, True))
        before, results = torch.get_num_threads(), []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(cpu_attention.attention_forward(query, key, value, is_causal=True, scaling=0.125)[0])
        finally:
            torch.set_num_threads(before)
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])

    def test_python_threads_do_not_disturb_each_other(self) -> None:
        inputs = [random_inputs((1, 1, 6, 2, length, length, 64, True)) for length in (40, 300, 77, 512)]

        def attend(index: int) -> Tensor:
            return cpu_attention.attention_forward(*inputs[index % 4], is_causal=True, scaling=0.125)[0]

        alone = [attend(index) for index in range(4)]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(attend, range(40)))
        assert all(torch.equal(output, alone[index % 4]) for index, output in enumerate(together))

    def test_not_a_number_stays_so(self) -> None:
        query, key, value = random_inputs((1, 1, 2, 1, 8, 40, 64, True))
        query[0, 1, 3, 7] = float("nan")
        output, lse = cpu_attention.attention_forward(query, key, value, is_causal=True, scaling=0.125)
        assert output[0, 1, 3].isnan().all()
        assert lse[0, 1, 3].isnan()
        assert int(lse.isnan().sum()) == 1

    def test_no_tokens_or_no_keys(self) -> None:
        query, key, value = random_inputs((2, 2, 2, 1, 3, 4, 32, False))
        output, _ = cpu_attention.attention_forward(query[:, :, :0], key, value, is_causal=False, scaling=0.2)
        assert output.shape == (2, 2, 0, 32)
        output, lse = cpu_attention.attention_forward(query, key[:, :, :0], value[:, :, :0], is_causal=False, scaling=0.2)
        assert output.abs().max() == 0
        assert (lse == float("-inf")).all()


def gradients_of(output: Tensor, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a fixed random sum of the output."""
    return torch.autograd.grad(output, inputs, random_bf16(*output.shape, seed=9).to(output.dtype))


def exact_gradients(inputs: tuple[Tensor, Tensor, Tensor], seen: Tensor, scaling: float) -> tuple[Tensor, ...]:
    """Gradients in fp64; rows that see nothing are left out, because their softmax has none."""
    copies = tuple(states.detach().double().requires_grad_() for states in inputs)
    blind = ~seen.any(dim=-1)
    output, _ = exact_attention(*copies, seen | blind.unsqueeze(-1), scaling)  # type: ignore[arg-type]
    return gradients_of(output.masked_fill(blind[:, None, :, None], 0.0), copies)  # type: ignore[arg-type]


@pytest.mark.usefixtures("_kernel")
class TestBackward:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_is_as_exact_as_torch(self, shape: tuple[int, ...]) -> None:
        inputs = random_inputs(shape)
        seen = visible_keys(inputs[0], inputs[1], is_causal=bool(shape[-1]))
        for states in inputs:
            states.requires_grad_()
        output, _ = cpu_attention.attention_forward(*inputs, is_causal=bool(shape[-1]), scaling=0.2)
        ours = gradients_of(output, inputs)
        torchs = gradients_of(torch_attention(*inputs, seen, 0.2), inputs)
        for our, theirs, exact in zip(ours, torchs, exact_gradients(inputs, seen, 0.2), strict=True):
            assert our.dtype == torch.bfloat16
            assert our.shape == exact.shape
            # Where the exact gradient is zero (one key), torch's error can be zero too.
            assert (our - exact).abs().max() <= 1.5 * (theirs - exact).abs().max() + 1e-5
            assert (our - exact).abs().mean() <= 1.5 * (theirs - exact).abs().mean() + 1e-6

    def test_a_mask_and_tokens_that_see_nothing(self) -> None:
        inputs = random_inputs((2, 2, 6, 2, 24, 210, 64, False))
        seen = torch.rand(2, 24, 210, generator=torch.Generator().manual_seed(4)) < 0.3
        seen[1, 5] = False
        for states in inputs:
            states.requires_grad_()
        output, _ = cpu_attention.attention_forward(*inputs, is_causal=False, scaling=0.125, mask=seen)
        ours = gradients_of(output, inputs)
        for our, exact in zip(ours, exact_gradients(inputs, seen, 0.125), strict=True):
            assert (our - exact).abs().max() <= 0.01 * exact.abs().max()
        assert ours[0][1, :, 5].abs().max() == 0

    def test_more_tokens_than_keys(self) -> None:
        inputs = random_inputs((2, 2, 4, 2, 20, 5, 64, True))
        for states in inputs:
            states.requires_grad_()
        output, _ = cpu_attention.attention_forward(*inputs, is_causal=True, scaling=0.125)
        ours = gradients_of(output, inputs)
        exact = exact_gradients(inputs, visible_keys(inputs[0], inputs[1], is_causal=True), 0.125)
        for our, right in zip(ours, exact, strict=True):
            assert (our - right).abs().max() <= 0.01 * right.abs().max()
        assert ours[0][:, :, :15].abs().max() == 0

    def test_large_scores(self) -> None:
        inputs = random_inputs((1, 1, 3, 1, 200, 200, 64, True))
        inputs[0][..., 0], inputs[1][:, :, 0, 0] = 8.0, 60.0
        seen = visible_keys(inputs[0], inputs[1], is_causal=True)
        for states in inputs:
            states.requires_grad_()
        ours = gradients_of(cpu_attention.attention_forward(*inputs, is_causal=True, scaling=0.125)[0], inputs)
        torchs = gradients_of(torch_attention(*inputs, seen, 0.125), inputs)
        exact = exact_gradients(inputs, seen, 0.125)
        for our, right in zip(ours[:2], exact[:2], strict=True):  # One key takes it all, and the gradients of scores vanish:
            assert right.abs().max() < 1e-20
            assert our.abs().max() < 1e-4  # what is left of terms of about 60 is their rounding in fp32.
        assert_as_exact_as_torch(ours[2], torchs[2], exact[2])

    @pytest.mark.parametrize("threads", [1, 2, 3])
    def test_repeats_bit_for_bit(self, threads: int) -> None:
        inputs = random_inputs((1, 1, 9, 3, 700, 700, 64, True))
        for states in inputs:
            states.requires_grad_()
        before, results = torch.get_num_threads(), []
        try:
            torch.set_num_threads(threads)
            for _ in range(3):
                output, _ = cpu_attention.attention_forward(*inputs, is_causal=True, scaling=0.125)
                results.append(gradients_of(output, inputs))
        finally:
            torch.set_num_threads(before)
        for result in results[1:]:
            assert all(torch.equal(one, other) for one, other in zip(results[0], result, strict=True))
        for our, exact in zip(results[0], exact_gradients(inputs, visible_keys(*inputs[:2], is_causal=True), 0.125), strict=True):
            assert (our - exact).abs().max() <= 0.01 * exact.abs().max()

    def test_a_gradient_with_any_strides(self) -> None:
        inputs = random_inputs((1, 1, 4, 2, 30, 30, 32, True))
        for states in inputs:
            states.requires_grad_()
        output, _ = cpu_attention.attention_forward(*inputs, is_causal=True, scaling=0.2)
        summed = torch.autograd.grad(output.sum(), inputs, retain_graph=True)  # The gradient of a sum has strides of 0.
        given = torch.autograd.grad(output, inputs, torch.ones(output.shape, dtype=output.dtype))
        assert all(torch.equal(one, other) for one, other in zip(summed, given, strict=True))

    def test_layers_compile_to_one_graph(self) -> None:
        inputs = random_inputs((1, 1, 4, 2, 40, 40, 32, True))
        for states in inputs:
            states.requires_grad_()
        layer = attention_layer()

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return attention.attend(layer, query * 2, key, value, None, scaling=0.2)[0] + 1

        compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(*inputs), attend(*inputs))
        ours, theirs = gradients_of(compiled(*inputs), inputs), gradients_of(attend(*inputs), inputs)
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.usefixtures("_kernel")
class TestTraining:
    """attention.py uses the kernel without branches only where attention is causal and nothing else."""

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        calls: list[int] = []
        forward = cpu_attention.attention_forward
        monkeypatch.setattr(cpu_attention, "attention_forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
        return calls

    def test_equals_transformers(self, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
        inputs = random_inputs((2, 2, 6, 2, 70, 70, 64, True))
        for states in inputs:
            states.requires_grad_()
        ours = attention.attend(attention_layer(), *inputs, None, scaling=0.125, dropout=0.0, sliding_window=70)[0]
        our_gradients = gradients_of(ours, inputs)
        assert len(calls) == 1
        monkeypatch.setenv("MANYICL_CPU_KERNEL", "off")
        monkeypatch.setattr(cpu_attention, "can_attend", lambda *_: False)
        theirs = attention.attend(attention_layer(), *inputs, None, scaling=0.125)[0]
        assert len(calls) == 1
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02)
        for our, their in zip(our_gradients, gradients_of(theirs, inputs), strict=True):
            torch.testing.assert_close(our, their, rtol=0, atol=float(0.02 * their.abs().max()))

    def test_autocast_decides_the_dtype(self, calls: list[int]) -> None:
        query, key, value = random_inputs((1, 1, 6, 2, 70, 70, 64, True))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = attention.attend(attention_layer(), query.float(), key.float(), value, None)[0]
        assert output.dtype == torch.bfloat16
        assert len(calls) == 1

    @pytest.mark.parametrize(
        "options",
        [
            {"dropout": 0.5},
            {"is_causal": False},
            {"sliding_window": 69},
            {"position_bias": torch.zeros(1, 6, 70, 70)},
            {"attention_mask": torch.ones(1, 1, 70, 70, dtype=torch.bool)},
            {"softcap": 5.0},
        ],
        ids=lambda options: next(iter(options)),
    )
    def test_anything_else_goes_elsewhere(self, options: dict[str, Any], calls: list[int]) -> None:
        inputs = random_inputs((1, 1, 6, 2, 70, 70, 64, True))
        mask = options.get("attention_mask")
        attention.attend(attention_layer(), *inputs, mask, **{k: v for k, v in options.items() if k != "attention_mask"})
        assert calls == []

    @pytest.mark.parametrize(("length", "total"), [(1, 1), (1, 70), (30, 70)])
    def test_tokens_behind_a_cache_go_elsewhere(self, length: int, total: int, calls: list[int]) -> None:
        attention.attend(attention_layer(), *random_inputs((1, 1, 6, 2, length, total, 64, True)), None)
        assert calls == []


@pytest.mark.usefixtures("_kernel")
@pytest.mark.parametrize(
    ("key_shape", "value_shape", "mask_shape"),
    [
        ((2, 2, 9, 32), (2, 2, 9, 32), (2, 5, 8)),
        ((2, 2, 9, 32), (2, 2, 9, 32), (1, 5, 9)),
        ((2, 2, 9, 32), (2, 2, 8, 32), None),
        ((3, 2, 9, 32), (3, 2, 9, 32), None),
        ((2, 3, 9, 32), (2, 3, 9, 32), None),
        ((2, 2, 9, 48), (2, 2, 9, 48), None),
    ],
)
def test_shapes_that_do_not_go_together_are_refused(
    key_shape: tuple[int, ...], value_shape: tuple[int, ...], mask_shape: tuple[int, ...] | None
) -> None:
    query, key, value = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((2, 4, 5, 32), key_shape, value_shape))
    mask = None if mask_shape is None else torch.ones(mask_shape, dtype=torch.bool)
    with pytest.raises(ValueError, match="do not go together" if mask is None else "the mask is"):
        cpu_attention.attention_forward(query, key, value, is_causal=False, scaling=0.2, mask=mask)


@pytest.mark.usefixtures("_kernel")
@pytest.mark.parametrize(
    ("dtype", "size", "value_size", "scaling", "expected"),
    [
        (torch.bfloat16, 64, 64, 0.125, True),
        (torch.bfloat16, 256, 256, 0.125, True),
        (torch.float32, 64, 64, 0.125, False),
        (torch.bfloat16, 8, 8, 0.125, False),
        (torch.bfloat16, 272, 272, 0.125, False),
        (torch.bfloat16, 64, 32, 0.125, False),
        (torch.bfloat16, 64, 64, -0.125, False),
    ],
)
def test_can_attend_says_what_the_kernel_takes(
    dtype: torch.dtype, size: int, value_size: int, scaling: float, expected: bool
) -> None:
    query, key, value = torch.zeros(1, 2, 3, size), torch.zeros(1, 1, 4, size), torch.zeros(1, 1, 4, value_size)
    assert cpu_attention.can_attend(query.to(dtype), key.to(dtype), value.to(dtype), scaling) is expected


@pytest.mark.usefixtures("_kernel")
def test_can_attend_refuses_a_strided_last_dimension() -> None:
    query, key = random_bf16(1, 2, 3, 64, seed=1), random_bf16(1, 1, 4, 128, seed=2)
    assert cpu_attention.can_attend(query, key[..., :64], key[..., 64:], 0.125)
    assert not cpu_attention.can_attend(query, key[..., ::2], key[..., 64:], 0.125)


@pytest.mark.usefixtures("_kernel")
class TestSharedPrefix:
    """attention.py reaches the kernel, and finds the same as without it."""

    @pytest.mark.parametrize("has_mask", [False, True])
    def test_equals_torch(self, has_mask: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        query, key, value = random_inputs((4, 4, 6, 2, 9, 9, 64, True))
        _, prefix_key, prefix_value = random_inputs((1, 1, 6, 2, 9, 333, 64, False))
        mask = torch.ones(9, 9, dtype=torch.bool).tril().expand(4, -1, -1).clone() if has_mask else None
        if mask is not None:
            mask[:, 5:, 2] = False
        layer = attention_layer()
        calls: list[int] = []
        forward = cpu_attention.attention_forward
        monkeypatch.setattr(cpu_attention, "attention_forward", lambda *a, **k: calls.append(1) or forward(*a, **k))

        def attend() -> Tensor:
            branches = attention.Branches(prefix=[(prefix_key, prefix_value)], mask=mask)
            return attention.attend(layer, query, key, value, None, branches=branches)[0]

        ours = attend()
        assert len(calls) == 2
        monkeypatch.setattr(cpu_attention, "can_attend", lambda *_: False)
        theirs = attend()
        assert len(calls) == 2
        seen = visible_keys(query, key, is_causal=True) if mask is None else mask
        seen = torch.cat([torch.ones(4, 9, 333, dtype=torch.bool), seen], dim=2)
        joined_key = torch.cat([prefix_key.expand(4, -1, -1, -1), key], dim=2)
        joined_value = torch.cat([prefix_value.expand(4, -1, -1, -1), value], dim=2)
        exact = exact_attention(query, joined_key, joined_value, seen, 0.125)[0].transpose(1, 2)
        assert ours.shape == theirs.shape == (4, 9, 6, 64)
        assert_as_exact_as_torch(ours, theirs, exact)


@pytest.mark.usefixtures("_fresh_loader")
class TestFallback:
    def test_switched_off(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        monkeypatch.setenv("MANYICL_CPU_KERNEL", "off")
        with caplog.at_level(logging.INFO):
            assert not cpu_attention.is_available()
            assert not cpu_attention.is_available()
        assert cpu_attention.find_instructions() is None
        assert [(record.levelname, record.message) for record in caplog.records] == [
            ("INFO", "MANYICL_CPU_KERNEL is off: attention uses torch's kernel.")
        ]

    def test_another_processor(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        monkeypatch.setattr(cpu_attention, "cpu_flags", lambda: cpu_attention.FEATURES - {"avx512_bf16"})
        with caplog.at_level(logging.INFO):
            assert not cpu_attention.is_available()
            assert not cpu_attention.is_available()
        assert cpu_attention.find_instructions() is None
        assert [(record.levelname, record.message) for record in caplog.records] == [
            ("INFO", "The processor lacks avx512_bf16: attention uses torch's kernel.")
        ]

    def test_no_compiler_warns_once_and_results_stay(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(cpu_attention, "cpu_flags", lambda: cpu_attention.FEATURES)
        monkeypatch.setenv("MANYICL_CACHE", str(tmp_path))
        monkeypatch.setenv("PATH", "")
        monkeypatch.delenv("CXX", raising=False)
        query, key, value = random_inputs((3, 1, 6, 2, 9, 40, 64, False))
        with caplog.at_level(logging.INFO):
            output, lse = attention._attend_to_prefix(query, key, value, 0.125)
            attention._attend_to_prefix(query, key, value, 0.125)
        exact, exact_lse = exact_attention(query, key, value, visible_keys(query, key, is_causal=False), 0.125)
        assert (output.double() - exact).abs().max() < 0.01
        assert (lse.double() - exact_lse).abs().max() < 1e-3
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "no C++ compiler. Install g++" in caplog.text

    def test_a_compiler_that_does_not_know_amx(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        if not cpu_attention.is_available() or not cpu_attention._has_amx():
            pytest.skip("needs a processor with AMX and a C++ compiler")
        cpu_attention._load_once.cache_clear()
        monkeypatch.setattr(cpu_attention, "AMX_FLAGS", ("-mno-such-feature",))
        library = cpu_attention._library()
        assert library is not None
        assert library.uses_amx() == 0
        assert [record.levelname for record in caplog.records if record.levelno >= logging.WARNING] == ["WARNING"]
        assert "could not be compiled for AMX" in caplog.text
        assert "-mno-such-feature" in caplog.text

    def test_calling_the_kernel_all_the_same_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MANYICL_CPU_KERNEL", "off")
        with pytest.raises(RuntimeError, match="ask can_attend"):
            cpu_attention.attention_forward(*random_inputs(SHAPES[0]), is_causal=True, scaling=0.125)
