"""Fewer activations: the same losses and gradients as PEFT's and transformers' own, and less kept."""

import pytest
import torch

from manyicl.activations import keep_fewer_activations
from manyicl.config import LoraConfig
from manyicl.modeling import add_lora, load_model

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")
IDS = torch.arange(3, 99).view(2, 48)


def wrapped(folder, dtype="float32", **lora):
    """A LoRA-wrapped model in training mode whose adapters change it."""
    model = add_lora(load_model(folder, dtype=dtype).model, LoraConfig.model_validate({"rank": 4, "alpha": 8} | lora), seed=0)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=draw))
    return model.train()


def loss_and_gradients(model):
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return float(loss.detach()), {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


def kept_bytes(layer, x) -> int:
    """Bytes of the distinct tensors that a layer keeps for the backward pass, weights left out."""
    weights = {weight.untyped_storage().data_ptr() for weight in layer.parameters()}
    kept = {}

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values() if tensor.numel() > layer.in_features * 4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_losses_and_gradients_are_those_of_the_plain_layers(tiny_model_folder, architecture):
    model = wrapped(tiny_model_folder(architecture))
    loss, expected = loss_and_gradients(model)
    model.zero_grad()
    keep_fewer_activations(model)
    lean_loss, found = loss_and_gradients(model)
    assert lean_loss == pytest.approx(loss, abs=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)
        assert gradient.abs().max() > 0


def test_in_bfloat16_gradients_differ_by_rounding_alone(tiny_model_folder):
    exact = loss_and_gradients(wrapped(tiny_model_folder("llama")))[1]
    plain, lean = wrapped(tiny_model_folder("llama"), "bfloat16"), wrapped(tiny_model_folder("llama"), "bfloat16")
    keep_fewer_activations(lean)
    errors = []
    for model in (plain, lean):
        found = loss_and_gradients(model)[1]
        errors.append(
            sum(float((found[name] - exact[name]).norm()) for name in exact) / sum(map(float, map(torch.norm, exact.values())))
        )
    assert errors[1] < 1.5 * errors[0] < 0.1


def test_a_lora_layer_keeps_its_input_once_in_its_own_dtype(tiny_model_folder):
    model = wrapped(tiny_model_folder("llama"), "bfloat16")
    layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
    x = torch.randn(2, 48, layer.in_features).bfloat16().requires_grad_()
    before = kept_bytes(layer, x)
    keep_fewer_activations(model)
    assert kept_bytes(layer, x) == 96 * (layer.in_features + 4) * 2
    assert before >= 2 * 96 * (layer.in_features + 4) * 2


def test_inference_is_that_of_the_plain_layers_to_the_bit(tiny_model_folder):
    model = wrapped(tiny_model_folder("llama")).eval()
    expected = model(input_ids=IDS).logits
    keep_fewer_activations(model)
    assert torch.equal(model(input_ids=IDS).logits, expected)


def test_layers_of_another_kind_are_left_alone(tiny_model_folder):
    model = wrapped(tiny_model_folder("llama"), dropout=0.5)
    keep_fewer_activations(model)
    assert not any("forward" in vars(module) for module in model.modules() if hasattr(module, "lora_A"))
    altered = wrapped(tiny_model_folder("llama"))
    for module in altered.modules():
        if type(module).__name__ == "LlamaMLP":
            module.forward = lambda x, module=module: 2 * module.down_proj(module.act_fn(module.gate_proj(x)) * module.up_proj(x))
    expected, _ = loss_and_gradients(altered)
    altered.zero_grad()
    keep_fewer_activations(altered)
    assert loss_and_gradients(altered)[0] == pytest.approx(expected, abs=1e-5)


def test_an_adapter_that_is_switched_off_or_merged_takes_peft_own_path(tiny_model_folder):
    model = wrapped(tiny_model_folder("llama"))
    with model.disable_adapter():
        expected = model(input_ids=IDS).logits
    keep_fewer_activations(model)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, expected)
    adapted = model(input_ids=IDS).logits
    assert not torch.allclose(adapted, expected, atol=1e-3)
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=IDS).logits, adapted, atol=1e-4, rtol=1e-4)
