"""What is chosen for a device and for what is installed; nothing here runs on a GPU."""

from inspect import signature

import pytest
import torch
from transformers import TrainingArguments

from manyicl import accelerators
from manyicl import arguments as arguments_module
from manyicl.accelerators import OWN_KERNELS, Kernels, choose_kernels, select_kernels, use_attention
from manyicl.arguments import training_arguments
from manyicl.attention import IMPLEMENTATION
from manyicl.config import LoraConfig, TrainingConfig
from manyicl.errors import RecipeError
from manyicl.modeling import add_lora
from manyicl.training import prepare_for_training

Config = TrainingConfig.model_validate


@pytest.fixture
def install(monkeypatch):
    """Say which packages are there: install("flash_attn_2", "liger_kernel")."""

    def say(*names):
        for name in ("flash_attn_2", "flash_attn_3", "liger_kernel"):
            monkeypatch.setattr(accelerators, f"is_{name}_available", lambda there=name in names: there)

    return say


@pytest.mark.parametrize(
    ("device", "dtype", "installed", "expected"),
    [
        ("cuda", torch.bfloat16, ("flash_attn_2",), Kernels("flash_attention_2", liger=False)),
        ("cuda", torch.float16, ("flash_attn_2", "flash_attn_3"), Kernels("flash_attention_3", liger=False)),
        ("cuda", torch.bfloat16, ("flash_attn_3", "liger_kernel"), Kernels("flash_attention_3", liger=True)),
        ("cuda", torch.float32, ("flash_attn_2", "flash_attn_3", "liger_kernel"), Kernels("manyicl", liger=True)),
        ("cuda", torch.bfloat16, (), Kernels("manyicl", liger=False)),
        ("cpu", torch.bfloat16, ("flash_attn_2", "flash_attn_3", "liger_kernel"), Kernels("manyicl", liger=False)),
        ("mps", torch.float16, ("flash_attn_2", "flash_attn_3", "liger_kernel"), Kernels("manyicl", liger=False)),
    ],
)
def test_kernels_follow_the_device_the_weights_and_what_is_installed(install, device, dtype, installed, expected):
    install(*installed)
    assert select_kernels("auto", device=device, dtype=dtype) == expected
    assert select_kernels("none", device=device, dtype=dtype) == Kernels(attention=None, liger=False)


@pytest.mark.parametrize(
    ("fields", "has_gpu", "expected"),
    [
        ({}, True, Kernels("flash_attention_2", liger=True)),
        ({"dtype": "float32"}, True, Kernels(IMPLEMENTATION, liger=True)),
        # Whole weights are fp32, also where the passes are cast to bf16.
        ({"tune": "full", "dtype": "bfloat16"}, True, Kernels(IMPLEMENTATION, liger=True)),
        ({"kernels": "none"}, True, Kernels(attention=None)),
        ({}, False, OWN_KERNELS),
    ],
)
def test_a_recipe_gets_the_kernels_of_its_machine(install, monkeypatch, fields, has_gpu, expected):
    install("flash_attn_2", "liger_kernel")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert choose_kernels(Config(fields)) == expected


def test_ligers_losses_are_off_in_the_trainers_options(monkeypatch, tmp_path):
    for kernels, expected in (
        (Kernels(liger=True), (True, {"cross_entropy": False, "fused_linear_cross_entropy": False})),
        (OWN_KERNELS, (False, None)),
    ):
        monkeypatch.setattr(arguments_module, "choose_kernels", lambda config, kernels=kernels: kernels)
        arguments = training_arguments(Config({}), tmp_path, seed=0, validate=False)
        assert (arguments.use_liger_kernel, arguments.liger_kernel_config) == expected


@pytest.mark.parametrize("option", [{"use_liger_kernel": True}, {"liger_kernel_config": {"fused_linear_cross_entropy": True}}])
def test_liger_is_not_set_past_the_recipes_key(tmp_path, option):
    with pytest.raises(RecipeError, match=r"training\.trainer sets '.*liger_kernel.*own: training\.kernels\."):
        training_arguments(Config({"trainer": option}), tmp_path, seed=0, validate=False)


def test_compiling_and_offloading_go_to_the_trainer_on_request(tmp_path, monkeypatch):
    if "activation_checkpointing_kwargs" not in signature(TrainingArguments).parameters:
        pytest.skip("transformers before 5.23 cannot offload activations")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # Which TrainingArguments sets, and which is put back after the test.
    asked = {"torch_compile": True, "activation_checkpointing_kwargs": {"offload": True}}
    config = Config({"gradient_checkpointing": True, "trainer": asked})
    arguments = training_arguments(config, tmp_path, seed=0, validate=False)
    assert (arguments.torch_compile, arguments.torch_compile_backend) == (True, "inductor")
    assert arguments.activation_checkpointing
    assert arguments.activation_checkpointing_kwargs == {"offload": True}


@pytest.mark.parametrize("is_adapted", [False, True])
@pytest.mark.parametrize(
    ("chosen", "takes_flash", "expected"),
    [("flash_attention_2", True, "flash_attention_2"), ("flash_attention_2", False, "manyicl"), ("manyicl", True, "manyicl")],
)
def test_the_model_gets_the_attention_that_it_takes(tiny_model, monkeypatch, is_adapted, chosen, takes_flash, expected):
    model = tiny_model("llama")
    asked = []
    monkeypatch.setattr(type(model), "set_attn_implementation", lambda self, name: asked.append(name))
    monkeypatch.setattr(type(model), "_supports_flash_attn", takes_flash)
    use_attention(add_lora(model, LoraConfig.model_validate({}), seed=0) if is_adapted else model, Kernels(chosen))
    assert asked == [expected]


def test_without_kernels_the_model_stays_as_transformers_loads_it(tiny_model):
    for kernels, attention, num_changed in ((Kernels(attention=None), "sdpa", 0), (OWN_KERNELS, "manyicl", 21)):
        model = add_lora(tiny_model("llama"), LoraConfig.model_validate({}), seed=0)
        prepare_for_training(model, kernels)
        assert model.config._attn_implementation == attention
        # In two blocks seven adapted layers, one gated layer and two norms, and the last norm.
        assert sum("forward" in vars(module) for module in model.modules()) == num_changed
