"""Shared-prefix attention on random states against plain softmax, and inside models beside transformers' own attention.

Tolerances in fp32: 1e-5 on attention outputs, 1e-4 on logits.
"""

import threading
from types import SimpleNamespace

import pytest
import torch

from manyicl.attention import IMPLEMENTATION, Branches, attend, use_shared_prefix_attention
from manyicl.encoding import Encoder
from manyicl.prefix import prefill
from manyicl.scoring import score_labels
from manyicl.tasks.task import Example
from model_fixtures import make_batch
from plain_fixtures import ARCHITECTURES

LAYER = SimpleNamespace(layer_idx=0, is_causal=True, num_key_value_groups=2)


def random_states(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_attention(query, key, value, visible, scaling, softcap=None, sinks=None):
    """One (branch, head, token) at a time, in fp64."""
    output = torch.zeros(query.shape, dtype=torch.float64)
    group = query.shape[1] // key.shape[1]
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            for token in range(query.shape[2]):
                scores = (key[b, h // group].double() @ query[b, h, token].double()) * scaling
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                scores = scores[visible[b, token]]
                weights = scores.exp() / (scores.exp().sum() + (0.0 if sinks is None else sinks[h].double().exp()))
                output[b, h, token] = weights @ value[b, h // group].double()[visible[b, token]]
    return output


def joined(prefix, states):
    return torch.cat([prefix.expand(states.shape[0], -1, -1, -1), states], dim=2)


@pytest.mark.parametrize("options", [{}, {"softcap": 0.7}, {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0])}, {"scaling": 0.9}])
@pytest.mark.parametrize("num_prefix_tokens", [0, 1, 9])
@pytest.mark.parametrize("masked", [False, True])
def test_branches_attend_to_the_prefix_and_inside_themselves(num_prefix_tokens, masked, options):
    branches, heads, shared, length, size = 3, 4, 2, 5, 8
    query = random_states(branches, heads, length, size, seed=1)
    key, value = random_states(branches, shared, length, size, seed=2), random_states(branches, shared, length, size, seed=3)
    prefix = random_states(1, shared, num_prefix_tokens, size, seed=4), random_states(1, shared, num_prefix_tokens, size, seed=5)
    mask = torch.ones(length, length, dtype=torch.bool).tril().expand(branches, -1, -1).clone()
    if masked:
        mask[1, 3, 2] = mask[1, 4, 2] = mask[2, 4, 1] = False  # Tokens of other labels in a tree.
    told = Branches(prefix=[prefix] if num_prefix_tokens else [], mask=mask if masked else None)
    before = [states.clone() for states in prefix]
    output, none = attend(LAYER, query, key, value, None, branches=told, **options)
    visible = torch.cat([torch.ones(branches, length, num_prefix_tokens, dtype=torch.bool), mask], dim=2)
    expected = plain_attention(
        query,
        joined(prefix[0], key),
        joined(prefix[1], value),
        visible,
        options.get("scaling", size**-0.5),
        options.get("softcap"),
        options.get("s_aux"),
    )
    assert none is None
    assert (output.transpose(1, 2).double() - expected).abs().max() < 1e-5
    assert all(torch.equal(states, old) for states, old in zip(prefix, before, strict=True))
    assert torch.equal(told.past[0][0], key)


def test_a_sliding_window_counts_visible_tokens_and_not_places_in_the_row():
    # One branch "a b c" with a second label "d" after a: d stands three places behind a, and one token behind it.
    query, key, value = (random_states(1, 4, 4, 8, seed=seed)[:, :heads] for seed, heads in ((1, 4), (2, 2), (3, 2)))
    mask = torch.tensor([[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]], dtype=torch.bool)
    prefix = random_states(1, 2, 6, 8, seed=4), random_states(1, 2, 6, 8, seed=5)
    output, _ = attend(LAYER, query, key, value, None, branches=Branches(prefix=[prefix], mask=mask), sliding_window=3)
    sees = {0: [4, 5, 6], 1: [5, 6, 7], 2: [6, 7, 8], 3: [5, 6, 9]}  # Of six prefix tokens and four of the branch.
    visible = torch.zeros(1, 4, 10, dtype=torch.bool)
    for token, keys in sees.items():
        visible[0, token, keys] = True
    expected = plain_attention(query, joined(prefix[0], key), joined(prefix[1], value), visible, 8**-0.5)
    assert (output.transpose(1, 2).double() - expected).abs().max() < 1e-5


def test_tokens_of_earlier_passes_are_attended_to():
    states = [random_states(2, heads, 6, 8, seed=seed) for seed, heads in ((1, 4), (2, 2), (3, 2))]
    prefix = random_states(1, 2, 5, 8, seed=4), random_states(1, 2, 5, 8, seed=5)
    whole, _ = attend(LAYER, *states, None, branches=Branches(prefix=[prefix]))
    told, outputs = Branches(prefix=[prefix], mask=torch.ones(2, 4, 4, dtype=torch.bool).tril()), []
    for start, stop in ((0, 4), (4, 5), (5, 6)):
        if start:
            told.mask = torch.ones(2, 1, stop, dtype=torch.bool)
        outputs.append(attend(LAYER, *(own[:, :, start:stop] for own in states), None, branches=told)[0])
    assert (torch.cat(outputs, dim=1) - whole).abs().max() < 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_branches_a_model_stays_what_it_was(tiny_model, byte_tokenizer, architecture):
    model, other = tiny_model(architecture), tiny_model(architecture)
    model.set_attn_implementation("eager")
    use_shared_prefix_attention(other)
    assert other.config._attn_implementation == IMPLEMENTATION
    batch = make_batch(Encoder(byte_tokenizer), [[0, 1], [2]], [[3, 4, 5, 6]])
    real = (batch["episode"] >= 0).long()
    inputs = {
        "one row": {"input_ids": batch["input_ids"][1:]},
        "padded": {"input_ids": batch["input_ids"], "attention_mask": real},
        "packed": {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]},
    }
    for kind, arguments in inputs.items():
        with torch.inference_mode():
            expected, got = (own(**arguments, use_cache=False).logits for own in (model, other))
        shown = real.bool() if kind == "padded" else torch.ones(expected.shape[:2], dtype=torch.bool)
        assert (expected - got)[shown].abs().max() < 1e-4, kind


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_transformers_own_cache_works_beside_it(tiny_model, byte_tokenizer, architecture):
    model, other = tiny_model(architecture), tiny_model(architecture)
    model.set_attn_implementation("eager")
    use_shared_prefix_attention(other)
    token_ids = make_batch(Encoder(byte_tokenizer), [[0, 1, 2]])["input_ids"]
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": -1, "pad_token_id": 257}
    expected, got = (own.generate(token_ids, attention_mask=torch.ones_like(token_ids), **options) for own in (model, other))
    assert torch.equal(expected, got)


def test_threads_may_share_a_model(tiny_model, byte_tokenizer):
    model, encoder = tiny_model("llama"), Encoder(byte_tokenizer)
    labels = encoder.encode_labels(["yes", "no"])
    prefixes = [prefill(model, encoder, [Example(f"shown by {number}" * (1 + number), "yes")]) for number in range(4)]
    query = encoder.encode_query("asked")
    expected = [score_labels(model, prefix, [query], [labels])[0].tolist() for prefix in prefixes]
    found: dict[int, list] = {number: [] for number in range(4)}

    def ask(number):
        for _ in range(20):
            found[number].append(score_labels(model, prefixes[number], [query], [labels])[0].tolist())

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: [expected[number]] * 20 for number in range(4)}
