"""Packed = unpacked: a row of several sequences trains as the sequences do one by one.

Tolerance in fp32: 1e-5 relative on losses, 1e-5 on gradients.
"""

import pytest
import torch

from manyicl import attention
from manyicl.attention import use_shared_prefix_attention
from manyicl.encoding import Encoder
from manyicl.kernels import cpu_attention
from manyicl.objective import answer_losses, count_units
from manyicl.packing import build_row
from manyicl.training import to_tensors
from model_fixtures import (
    Config,
    count_calls,
    episodes_config,
    gradients_of,
    largest_difference,
    letter_task,
    make_batch,
    reference_loss,
    sequence_of,
)

SEQUENCES = [[0, 1, 2], [3], [4, 5, 6, 7], [8, 9]]


@pytest.fixture(scope="module")
def encoder(byte_tokenizer):
    return Encoder(byte_tokenizer)


def packed_and_alone(model, encoder, rows, config):
    """Loss and gradients of the batch, and of its sequences one by one through whole logits."""
    batch = make_batch(encoder, *rows)
    units = int(count_units(batch, config))
    loss = answer_losses(model, batch, config, in_head=True).total / units
    loss.backward()
    gradients = gradients_of(model)
    expected, expected_units = reference_loss(model, [[sequence_of(encoder, own) for own in row] for row in rows], config)
    (expected / expected_units).backward()
    assert units == expected_units
    return loss.item(), gradients, (expected / expected_units).item(), gradients_of(model)


@pytest.mark.parametrize("normalisation", ["token", "answer", "episode"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma"])
def test_a_packed_row_is_its_sequences_one_by_one(tiny_model, encoder, architecture, normalisation):
    model = tiny_model(architecture)
    loss, gradients, expected, expected_gradients = packed_and_alone(
        model, encoder, [SEQUENCES], Config({"normalisation": normalisation})
    )
    assert loss == pytest.approx(expected, rel=1e-5)
    assert largest_difference(gradients, expected_gradients) < 1e-5


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma"])
def test_padded_rows_of_several_sequences_are_too(tiny_model, encoder, architecture):
    rows = [SEQUENCES[:2], SEQUENCES[2:], [[10, 11, 12, 13, 14]]]
    loss, gradients, expected, expected_gradients = packed_and_alone(tiny_model(architecture), encoder, rows, Config({}))
    assert loss == pytest.approx(expected, rel=1e-5)
    assert largest_difference(gradients, expected_gradients) < 1e-5


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_sliding_windows_stay_inside_their_sequence(tiny_model, encoder, architecture):
    model = tiny_model(architecture)  # A window of 16 tokens, shorter than every example.
    config = Config({})
    batch = make_batch(encoder, SEQUENCES)
    loss = answer_losses(model, batch, config, in_head=architecture == "gemma3").total
    expected, _ = reference_loss(model, [[sequence_of(encoder, own) for own in SEQUENCES]], config)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "gemma"])
def test_it_also_holds_for_a_model_that_has_answered_queries(tiny_model, encoder, architecture):
    model = tiny_model(architecture)
    use_shared_prefix_attention(model)
    loss, gradients, expected, expected_gradients = packed_and_alone(model, encoder, [SEQUENCES[:3]], Config({}))
    assert loss == pytest.approx(expected, rel=1e-5)
    assert largest_difference(gradients, expected_gradients) < 1e-5


def test_without_positions_that_restart_the_test_would_fail(tiny_model, encoder):
    model, config = tiny_model("llama"), Config({})
    batch = make_batch(encoder, SEQUENCES)
    one = batch | {"episode": torch.zeros_like(batch["episode"])}  # Taken for one sequence: positions are not passed on.
    leaking = answer_losses(model, one, config, in_head=True).total.item()
    expected, _ = reference_loss(model, [[sequence_of(encoder, own) for own in SEQUENCES]], config)
    assert abs(leaking - expected.item()) > 0.1


def test_rows_as_they_are_built_pack_without_leaking(tiny_model, encoder):
    config = episodes_config(max_tokens=256, num_shots=1, pack=True)
    row = build_row([letter_task()], config=config, encoder=encoder, seed=3, index=0)
    assert len(row.sequences) > 2
    model, objective = tiny_model("llama"), Config({"name": "last_answer"})
    loss = answer_losses(model, to_tensors([row]), objective, in_head=True).total
    expected, _ = reference_loss(model, [row.sequences], objective)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"])
def test_our_kernel_keeps_packed_sequences_apart(tiny_model, encoder, architecture, monkeypatch):
    """In bf16 rows go through the kernel sequence by sequence, as near to fp32 as sequences one by one in bf16 are.

    Layers with soft-capping or a window shorter than the row (gemma2, gemma3) take a mask that is built from the same lengths.
    """
    if not cpu_attention.is_available():
        pytest.skip("needs the attention kernel: a processor with AVX-512 BF16, and a C++ compiler")
    rows = [SEQUENCES[:2], [[10, 11, 12, 13, 14]], SEQUENCES[2:]]
    exact = tiny_model(architecture, head_dim=16)
    wanted, _ = reference_loss(exact, [[sequence_of(encoder, own) for own in row] for row in rows], Config({}))
    wanted.backward()
    exact_gradients = gradients_of(exact)
    model = tiny_model(architecture, head_dim=16).bfloat16()
    use_shared_prefix_attention(model)
    calls = count_calls(monkeypatch, attention, "_attend_to_packed")
    batch = make_batch(encoder, *rows)
    loss = answer_losses(model, batch, Config({}), in_head=architecture != "gemma2").total
    loss.backward()
    gradients = gradients_of(model)
    scale = max(float(gradient.abs().max()) for gradient in exact_gradients.values())
    assert loss.item() == pytest.approx(wanted.item(), rel=5e-3)
    assert largest_difference(gradients, exact_gradients) < 0.05 * scale
    assert bool(calls) == (architecture != "gemma2")


def test_the_mask_of_packed_rows_is_that_of_transformers(tiny_model, encoder):
    batch = make_batch(encoder, SEQUENCES[:2], [SEQUENCES[2][:2]])
    lengths = [row.unique_consecutive(return_counts=True)[1].tolist() for row in batch["episode"]]
    for window in (None, 5):
        found = attention._packed_mask(lengths, window)
        numbers = batch["episode"]
        for line in range(numbers.shape[0]):
            for token in range(numbers.shape[1]):
                seen = [
                    other
                    for other in range(token + 1)
                    if numbers[line, other] == numbers[line, token] and (window is None or token - other < window)
                ]
                assert found[line, 0, token].nonzero().flatten().tolist() == seen
