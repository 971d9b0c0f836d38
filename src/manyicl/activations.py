"""Fewer activations kept between the forward and the backward pass of LoRA training, with the same results.

In: a LoRA-wrapped model, changed in place; its weights, their names and what is saved stay as they are. Three changes, each made
only where the module is of the shape it knows:

    LoRA layer   y = x Wᵀ + s (x Aᵀ) Bᵀ as one operation that keeps x in its own dtype and x Aᵀ [N, rank]; PEFT's own keeps a
                 copy of x in fp32 for every layer, three of the same x for queries, keys and values
    gate         act(gate) · up is computed again in the backward pass from the two, which are kept
    norm         computed again from its input

Per token and decoder layer of the default model this keeps about 17 kB in place of 60. Costs the element-wise work of gates and
norms twice, and saves conversions between dtypes, which take longer. Gradients of A and B are summed in fp32 and rounded to the
dtype of x once.

Letters: N tokens, I and O features in and out.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False, determinism_check="none")


class _LoraLinear(torch.autograd.Function):
    """x [N, I] through a frozen weight [O, I] with adapters A [rank, I] and B [O, rank]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        low = x @ a.to(x.dtype).t()
        output = nn.functional.linear(x, weight, bias)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scaling = scaling
        return output.addmm_(low, b.to(x.dtype).t(), alpha=scaling)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        low_gradient = (gradient @ b.to(x.dtype)).mul_(ctx.scaling)
        a_gradient = (low_gradient.t() @ x).to(a.dtype)
        b_gradient = (gradient.t() @ low).to(b.dtype).mul_(ctx.scaling)
        x_gradient = (gradient @ weight).addmm_(low_gradient, a.to(x.dtype)) if ctx.needs_input_grad[0] else None
        return x_gradient, None, None, a_gradient, b_gradient, None


def keep_fewer_activations(model: nn.Module) -> None:
    """Change a LoRA-wrapped model so that training keeps less; its inference is left alone."""
    for module in list(model.modules()):
        if _is_plain_lora(module):
            _wrap(module, _lora_forward)
        elif _is_gated(module):
            _wrap(module, _gated_forward)
        elif type(module).__name__.endswith("RMSNorm") and not any(weight.requires_grad for weight in module.parameters()):
            _wrap(module, _norm_forward)


def _wrap(module: nn.Module, forward: Callable[..., Tensor]) -> None:
    module.forward = partial(forward, module, module.forward)


def _is_plain_lora(module: Any) -> bool:
    """Whether a module is PEFT's LoRA over a frozen linear layer, with one adapter and nothing beside it."""
    if not hasattr(module, "lora_A") or not isinstance(getattr(module, "base_layer", None), nn.Linear):
        return False
    names = list(module.active_adapters)
    return (
        len(names) == 1 == len(module.lora_A)
        and names[0] in module.lora_A
        and isinstance(module.lora_dropout[names[0]], nn.Identity)
        and not module.lora_variant
        and module.lora_B[names[0]].bias is None
        and not module.base_layer.weight.requires_grad
    )


@torch.no_grad()
def _is_gated(module: Any) -> bool:
    """Whether a module computes down(act(gate(x)) · up(x)) and nothing else, found out on two random tokens."""
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return False
    weight = next(module.gate_proj.parameters())
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, module.gate_proj.in_features, generator=draw).to(weight.device, weight.dtype)
    return torch.equal(module(x), module.down_proj(module.act_fn(module.gate_proj(x)) * module.up_proj(x)))


def _lora_forward(module: Any, own: Callable[..., Tensor], x: Tensor, *arguments: Any, **options: Any) -> Tensor:
    base = module.base_layer
    is_plain = module.training and not (module.disable_adapters or module.merged or arguments or options)
    if not is_plain or x.dtype != base.weight.dtype or torch.is_autocast_enabled(x.device.type):
        return own(x, *arguments, **options)
    name = module.active_adapters[0]
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    flat = _LoraLinear.apply(x.flatten(0, -2), base.weight, base.bias, a, b, module.scaling[name])  # type: ignore[no-untyped-call]
    output: Tensor = flat.view(*x.shape[:-1], -1)
    return output


def _gated_forward(module: Any, own: Callable[..., Tensor], x: Tensor) -> Tensor:
    if not module.training:
        return own(x)
    gated = _recompute(lambda gate, up: module.act_fn(gate) * up, module.gate_proj(x), module.up_proj(x))
    output: Tensor = module.down_proj(gated)
    return output


def _norm_forward(module: nn.Module, own: Callable[..., Tensor], *arguments: Any, **options: Any) -> Tensor:
    if not module.training or not any(isinstance(each, Tensor) and each.requires_grad for each in arguments):
        return own(*arguments, **options)
    output: Tensor = _recompute(own, *arguments, **options)
    return output
