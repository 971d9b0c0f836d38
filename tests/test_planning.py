"""Forecasts against what is really allocated and counted; what is said and refused before memory is taken."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from manyicl import planning, prefix
from manyicl.encoding import Encoder
from manyicl.errors import BudgetError, ModelError
from manyicl.tasks.task import Example
from plain_fixtures import ARCHITECTURES

CPU = torch.device("cpu")
CONFIG = transformers.LlamaConfig(
    vocab_size=100,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
)


def demonstrations(count: int) -> list[Example]:
    return [Example(f"question {number}", "yes" if number % 2 else "no") for number in range(count)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bytes_are_those_of_a_real_prefix(tiny_loaded: Callable[..., Any], architecture: str) -> None:
    loaded = tiny_loaded(architecture)
    made = prefix.prefill(loaded.model, Encoder(loaded.tokenizer), demonstrations(3))
    assert planning.prefix_bytes(loaded.model.config, made.num_tokens, torch.float32) == made.num_bytes
    assert planning.int8_prefix_bytes(loaded.model.config, made.num_tokens) == prefix.quantise(made).num_bytes


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma"])
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_operations_are_those_that_torch_counts(tiny_model: Callable[..., Any], architecture: str, num_tokens: int) -> None:
    model = tiny_model(architecture)
    model.set_attn_implementation("eager")
    counter = FlopCounterMode(display=False)
    with counter, torch.inference_mode():
        model(input_ids=torch.arange(num_tokens).unsqueeze(0), use_cache=False, logits_to_keep=1)
    config = model.config
    shape = planning.read_shape(config)
    square = 4 * shape.num_layers * shape.num_heads * shape.head_size
    counted = counter.get_total_flops() - square * num_tokens**2  # eager attention computes the unseen half too
    forecast = planning.query_operations(config, num_tokens, prefix_tokens=0)
    assert forecast - square * num_tokens * (num_tokens + 1) // 2 == counted
    assert forecast - planning.prefill_operations(config, num_tokens) == 2 * config.hidden_size * config.vocab_size


@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 300))
def test_a_prefill_in_parts_takes_the_same_operations(cached: int, first: int, second: int) -> None:
    parts = planning.prefill_operations(CONFIG, first, num_cached=cached)
    parts += planning.prefill_operations(CONFIG, second, num_cached=cached + first)
    assert parts == planning.prefill_operations(CONFIG, first + second, num_cached=cached)


def test_operations_of_queries_by_hand() -> None:
    # 12·24 + 24·12 for query and output, 2 · 12·12 for keys and values, 3 · 12·20 for the gated layer.
    assert planning.read_shape(CONFIG).weights_per_layer == 1584
    linear, attention, logits = 2 * 1584 * 3 * 2, 4 * 24 * (11 + 12) * 3, 2 * 12 * 100 * 4
    found = planning.query_operations(CONFIG, 2, prefix_tokens=10, num_queries=5, num_logits=4)
    assert found == 5 * (linear + attention + logits)


def test_memory_is_forecast_for_every_model_and_operations_only_for_those_that_can_be_counted() -> None:
    experts = transformers.MixtralConfig(num_hidden_layers=2, num_key_value_heads=3, head_dim=4)
    assert planning.prefix_bytes(experts, 10, torch.bfloat16) == 2 * 2 * 3 * 4 * 10 * 2
    with pytest.raises(ModelError, match="mixtral has num_local_experts = 8: how many weights"):
        planning.prefill_operations(experts, 10)
    plain = transformers.GPT2Config(n_layer=2, n_head=3, n_embd=12)
    assert planning.prefix_bytes(plain, 10, torch.float32) == 2 * 2 * 12 * 10 * 4
    with pytest.raises(ModelError, match="gpt2 has no intermediate_size"):
        planning.query_operations(plain, 10, prefix_tokens=1)


def test_a_config_without_sizes_is_named() -> None:
    with pytest.raises(ModelError, match=r"config of mamba states no num_attention_heads \(found None\)"):
        planning.prefix_bytes(transformers.MambaConfig(), 1, torch.float32)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 4,000 kB available and no limit on its container."""
    memory = tmp_path / "meminfo"
    memory.write_text("MemTotal:       16000 kB\nMemAvailable:    4000 kB\n", encoding="ascii")
    monkeypatch.setattr(planning, "MEMORY_FILE", memory)
    monkeypatch.setattr(planning, "CONTROL_GROUP", tmp_path)
    return tmp_path


def limit_container(folder: Path, limit: str, used: int, droppable: int) -> None:
    (folder / "memory.max").write_text(f"{limit}\n", encoding="ascii")
    (folder / "memory.current").write_text(f"{used}\n", encoding="ascii")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {droppable}\n", encoding="ascii")


def test_available_memory_is_the_systems_or_what_the_container_leaves(machine: Path) -> None:
    assert planning.available_bytes(CPU) == 4000 * 1024
    limit_container(machine, "max", 10, 0)
    assert planning.available_bytes(CPU) == 4000 * 1024
    limit_container(machine, "1000000", 700_000, 200_000)
    assert planning.available_bytes(CPU) == 500_000
    limit_container(machine, "1000000", 1_700_000, 200_000)
    assert planning.available_bytes(CPU) == 0
    limit_container(machine, "9000000000", 10, 0)
    assert planning.available_bytes(CPU) == 4000 * 1024


@pytest.mark.parametrize("content", ["", "MemTotal: 5 kB\n", "MemAvailable:\n"])
def test_a_system_that_does_not_say_is_not_guessed(machine: Path, content: str) -> None:
    (machine / "meminfo").write_text(content, encoding="ascii")
    assert planning.available_bytes(CPU) is None
    planning.check_memory(10**18, purpose="a prefix", remedy="", device=CPU)


def test_too_much_is_refused_with_sizes_and_remedy(machine: Path) -> None:
    planning.check_memory(4000 * 1024, purpose="a prefix of 9 tokens", remedy="Use fewer.", device=CPU)
    with pytest.raises(BudgetError) as caught:
        planning.check_memory(4000 * 1024 + 1, purpose="a prefix of 9 tokens", remedy="Use fewer.", device=CPU)
    assert str(caught.value) == "a prefix of 9 tokens needs 4.1 MB on cpu, where 4.1 MB are available. Use fewer."


def test_much_is_said_before_and_little_is_not(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(planning, "available_bytes", lambda device: 10**9)
    with caplog.at_level(logging.INFO, logger="manyicl.planning"):
        planning.check_memory(planning.LOGGED_FROM_BYTES, purpose="a prefix", remedy="", device=CPU)
        assert caplog.messages == []
        planning.check_memory(300_000_000, purpose="a prefix of 13,000 tokens", remedy="", device=CPU)
        monkeypatch.setattr(planning, "available_bytes", lambda device: None)
        planning.check_memory(300_000_000, purpose="a prefix", remedy="", device=CPU)
    assert caplog.messages == [
        "a prefix of 13,000 tokens needs 300 MB on cpu, of 1 GB available",
        "a prefix needs 300 MB on cpu, of an unknown amount",
    ]


def test_a_prefix_that_memory_has_no_room_for_is_refused_before_anything_is_computed(
    tiny_loaded: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = tiny_loaded()
    encoder = Encoder(loaded.tokenizer)
    short = prefix.prefill(loaded.model, encoder, demonstrations(2))
    needed = planning.prefix_bytes(loaded.model.config, short.num_tokens, torch.float32)
    needed += planning.pass_bytes(loaded.model.config, short.num_tokens, torch.float32)
    monkeypatch.setattr(planning, "available_bytes", lambda device: needed)
    assert prefix.prefill(loaded.model, encoder, demonstrations(2)).num_tokens == short.num_tokens
    monkeypatch.setattr(planning, "available_bytes", lambda device: needed - 1)
    monkeypatch.setattr(prefix, "run_branches", lambda *arguments, **options: pytest.fail("it was computed"))
    message = rf"a prefix of {short.num_tokens} tokens needs .* on cpu, where .* are available\. Give fewer demonstrations"
    with pytest.raises(BudgetError, match=message):
        prefix.prefill(loaded.model, encoder, demonstrations(2))


@pytest.mark.parametrize(
    ("num_bytes", "shown"),
    [(0, "0 B"), (999, "999 B"), (999.7, "1 kB"), (23_040, "23 kB"), (172_800_000, "173 MB"), (1.4e9, "1.4 GB"), (2e12, "2 TB")],
)
def test_bytes_are_shown_in_three_digits(num_bytes: float, shown: str) -> None:
    assert planning.show_bytes(num_bytes) == shown
