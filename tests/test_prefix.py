"""Prefixes: what they hold, how they are cut and lengthened, and what does not fit."""

import pytest
import torch

from manyicl.encoding import Encoder
from manyicl.errors import BudgetError
from manyicl.prefix import extend, prefill
from model_fixtures import letter_example

EXAMPLES = [letter_example(number) for number in range(8)]


@pytest.fixture(scope="module")
def encoder(byte_tokenizer):
    return Encoder(byte_tokenizer)


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("llama")


def test_it_holds_the_opening_and_the_demonstrations_and_where_each_stops(model, encoder):
    prefix = prefill(model, encoder, EXAMPLES[:3], instruction="Letters.")
    opening = encoder.encode_opening("Letters.")
    parts = [encoder.encode_example(example.input, example.answer) for example in EXAMPLES[:3]]
    whole = [*opening, *(token for part in parts for token in (*part.input_ids, *part.answer_ids, *part.gap_ids))]
    assert prefix.token_ids == tuple(whole)
    stops = [len(opening)]
    for part in parts:
        stops.append(stops[-1] + part.num_tokens)
    assert prefix.stops == tuple(stops)
    assert (prefix.num_shots, prefix.num_tokens) == (3, len(whole))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_states_and_their_memory(tiny_model, encoder, dtype):
    prefix = prefill(tiny_model("llama").to(dtype), encoder, EXAMPLES[:2])
    assert [(tuple(key.shape), tuple(value.shape)) for key, value in prefix.states] == [((1, 2, prefix.num_tokens, 8),) * 2] * 2
    assert {state.dtype for layer in prefix.states for state in layer} == {dtype}
    assert prefix.num_bytes == 2 * 2 * 2 * 8 * prefix.num_tokens * dtype.itemsize  # Layers, keys and values, heads, size.


def test_the_states_are_those_of_transformers_cache(model, encoder, tiny_model):
    prefix = prefill(model, encoder, EXAMPLES[:4])
    cache = tiny_model("llama")(input_ids=torch.tensor([prefix.token_ids]), use_cache=True).past_key_values
    for (key, value), layer in zip(prefix.states, cache.layers, strict=True):
        assert (key - layer.keys).abs().max() < 1e-5
        assert (value - layer.values).abs().max() < 1e-5


def test_cutting_shares_memory_and_leaves_the_whole(model, encoder):
    prefix = prefill(model, encoder, EXAMPLES[:4])
    cut = prefix.trim(2)
    assert (cut.num_shots, cut.num_tokens, cut.token_ids) == (2, prefix.stops[2], prefix.token_ids[: prefix.stops[2]])
    assert [key.data_ptr() for key, _ in cut.states] == [key.data_ptr() for key, _ in prefix.states]
    assert cut.trim(1).stops == prefix.stops[:2]
    assert prefix.trim(4).token_ids == prefix.token_ids
    assert (prefix.trim(0).num_tokens, list(prefix.trim(0).states)) == (0, [])
    assert prefix.num_shots == 4


@pytest.mark.parametrize("num_shots", [-1, 3])
def test_cutting_to_what_is_not_there_is_an_error(model, encoder, num_shots):
    with pytest.raises(
        BudgetError, match=rf"the prefix holds 2 demonstrations, not {num_shots}\. Prefill more, or ask for fewer"
    ):
        prefill(model, encoder, EXAMPLES[:2]).trim(num_shots)


def test_an_extension_adds_demonstrations_and_leaves_the_first(model, encoder):
    first = prefill(model, encoder, EXAMPLES[:2])
    longer = extend(model, encoder, first, EXAMPLES[2:5])
    assert (first.num_shots, longer.num_shots) == (2, 5)
    assert longer.stops[:3] == first.stops
    assert extend(model, encoder, first, []) is first


def test_demonstrations_that_are_too_long_are_an_error_that_says_how_many_fit(model, encoder):
    stops = prefill(model, encoder, EXAMPLES[:5]).stops
    limit = stops[3]
    assert prefill(model, encoder, EXAMPLES[:3], max_tokens=limit).num_tokens == limit
    message = rf"5 demonstrations take {stops[5]} tokens, more than the {limit} allowed; the first 3 fit\. Give fewer"
    with pytest.raises(BudgetError, match=message):
        prefill(model, encoder, EXAMPLES[:5], max_tokens=limit)
    with pytest.raises(BudgetError, match=message):
        extend(model, encoder, prefill(model, encoder, EXAMPLES[:1]), EXAMPLES[1:5], max_tokens=limit)


def test_the_models_positions_are_the_limit(tiny_model, encoder):
    model = tiny_model("llama", max_position_embeddings=40)
    with pytest.raises(BudgetError, match=r"8 demonstrations take \d+ tokens, more than the 40 allowed; the first 2 fit"):
        prefill(model, encoder, EXAMPLES)


def test_an_opening_that_is_too_long_is_an_error_too(model, encoder):
    with pytest.raises(BudgetError, match=r"0 demonstrations take 52 tokens, more than the 20 allowed; the first 0 fit"):
        prefill(model, encoder, [], instruction="x" * 50, max_tokens=20)


def test_nothing_of_a_prefix_asks_for_gradients(model, encoder):
    prefix = prefill(model, encoder, EXAMPLES[:2])
    assert not any(state.requires_grad for layer in prefix.states for state in layer)
    assert all(weight.grad is None for weight in model.parameters())
