"""How keys and values are held: growing without clobbering or copying again and again, and as 8-bit integers."""

import copy
import math
import pickle
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyicl.encoding import Encoder
from manyicl.errors import PrefixError
from manyicl.prefix import Prefix, extend, prefill, quantise
from manyicl.prefix_states import Int8States, StatesBuffer, name_tensors, states_of_tensors, to_int8
from manyicl.scoring import generate_answers, score_labels
from manyicl.tasks.task import Example
from plain_fixtures import ARCHITECTURES


def demonstrations(*numbers: int) -> list[Example]:
    return [Example("q" * (1 + number % 5) + str(number), "yes" if number % 2 else "no") for number in numbers]


def snapshot(prefix: Prefix) -> list[torch.Tensor]:
    return [tensor.clone() for layer in prefix.states for tensor in layer]


def assert_holds(prefix: Prefix, states: Sequence[torch.Tensor]) -> None:
    """The prefix's states are bit for bit those of a snapshot."""
    assert all(torch.equal(own, kept) for own, kept in zip(snapshot(prefix), states, strict=True))


def assert_close(first: Prefix, second: Prefix) -> None:
    assert (first.token_ids, first.stops) == (second.token_ids, second.stops)
    torch.testing.assert_close(snapshot(first), snapshot(second), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def loaded(tiny_loaded: Callable[..., Any]) -> Any:
    return tiny_loaded()


@pytest.fixture(scope="module")
def encoder(loaded: Any) -> Encoder:
    return Encoder(loaded.tokenizer)


def make_states(num_tokens: int, *, seed: int = 0, num_layers: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    random = torch.Generator().manual_seed(seed)
    layers = (torch.randn(2, 1, 3, num_tokens, 4, generator=random).to(dtype).unbind() for _ in range(num_layers))
    return tuple(tuple(pair) for pair in layers)


def test_two_extensions_of_one_prefix_leave_each_other_and_it_alone(loaded: Any, encoder: Encoder) -> None:
    base = extend(loaded.model, encoder, prefill(loaded.model, encoder, demonstrations(*range(12))), demonstrations(12))
    before = snapshot(base)
    first = extend(loaded.model, encoder, base, demonstrations(20))
    states_of_first = snapshot(first)
    second = extend(loaded.model, encoder, base, demonstrations(33))
    third = extend(loaded.model, encoder, first, demonstrations(34))
    assert first.buffer is base.buffer is third.buffer  # Written into spare room, so that the next lines are no formality.
    assert second.buffer is not base.buffer
    assert_holds(base, before)
    assert_holds(first, states_of_first)
    for made, numbers in ((first, (20,)), (second, (33,)), (third, (20, 34))):
        assert_close(made, prefill(loaded.model, encoder, demonstrations(*range(13), *numbers)))


def test_a_trimmed_prefix_is_extended_without_touching_what_it_was_cut_from(loaded: Any, encoder: Encoder) -> None:
    whole = prefill(loaded.model, encoder, demonstrations(*range(6)))
    before = snapshot(whole)
    cut = whole.trim(3)
    assert cut.states[0][0].data_ptr() == whole.states[0][0].data_ptr()
    other = extend(loaded.model, encoder, cut, demonstrations(9))
    again = extend(loaded.model, encoder, cut, demonstrations(3, 4, 5))
    assert_holds(whole, before)
    assert_close(again, whole)
    assert_close(other, prefill(loaded.model, encoder, demonstrations(0, 1, 2, 9)))


@given(steps=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 2)), min_size=1, max_size=8))
@settings(max_examples=15)
def test_any_tree_of_extensions_and_cuts_equals_fresh_prefixes(steps: Sequence[Any], tiny_loaded: Callable[..., Any]) -> None:
    loaded = tiny_loaded()
    encoder = Encoder(loaded.tokenizer)
    made = [((), prefill(loaded.model, encoder, [], instruction="Answer."))]
    states = [snapshot(made[0][1])]
    for step, (which, cut, num_new) in enumerate(steps):
        numbers, prefix = made[which % len(made)]
        kept = cut % (len(numbers) + 1)
        new = tuple(range(step, step + num_new))
        longer = extend(loaded.model, encoder, prefix.trim(kept), demonstrations(*new))
        made.append((numbers[:kept] + new, longer))
        states.append(snapshot(longer))
    for (numbers, prefix), own in zip(made, states, strict=True):
        assert_holds(prefix, own)
        assert_close(prefix, prefill(loaded.model, encoder, demonstrations(*numbers), instruction="Answer."))


def test_growing_one_by_one_copies_seldom(loaded: Any, encoder: Encoder) -> None:
    grown = prefill(loaded.model, encoder, demonstrations(*range(8)))
    first_tokens, buffers = grown.num_tokens, {id(grown.buffer): grown.buffer}
    for number in range(8, 80):
        grown = extend(loaded.model, encoder, grown, demonstrations(number))
        buffers[id(grown.buffer)] = grown.buffer
    assert len(buffers) - 1 <= math.ceil(math.log(grown.num_tokens / first_tokens, 1.25))
    assert grown.buffer is not None
    assert grown.buffer.capacity <= 1.25 * grown.num_tokens
    assert_close(grown, prefill(loaded.model, encoder, demonstrations(*range(80))))


def test_a_first_prefill_takes_no_spare_room_and_growth_stops_at_the_limit(loaded: Any, encoder: Encoder) -> None:
    made = prefill(loaded.model, encoder, demonstrations(*range(20)))
    assert made.buffer is not None
    assert made.buffer.capacity == made.num_tokens
    grown = extend(loaded.model, encoder, made, demonstrations(1), max_tokens=made.num_tokens + 30)
    assert grown.buffer is not None
    assert grown.buffer.capacity == made.num_tokens + 30


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_spare_room_is_never_read(tiny_loaded: Callable[..., Any], architecture: str) -> None:
    loaded = tiny_loaded(architecture)
    encoder = Encoder(loaded.tokenizer)
    grown = extend(loaded.model, encoder, prefill(loaded.model, encoder, demonstrations(*range(8))), demonstrations(8))
    assert grown.buffer is not None
    queries, labels = [encoder.encode_query("q1"), encoder.encode_query("qq22")], encoder.encode_labels(["yes", "no", "none"])
    before = score_labels(loaded.model, grown, queries, [labels] * 2)
    with torch.inference_mode():
        for key, value in grown.buffer.view(grown.buffer.capacity):
            assert key.shape[2] > grown.num_tokens
            key[:, :, grown.num_tokens :] = value[:, :, grown.num_tokens :] = float("nan")
    after = score_labels(loaded.model, grown, queries, [labels] * 2)
    assert np.array_equal(before, after)
    assert np.isfinite(after).all()


def test_room_is_claimed_by_one_of_many_threads() -> None:
    buffer = StatesBuffer(100)
    assert buffer.claim(0, 10)
    barrier, wins = threading.Barrier(8), []

    def claim(stop: int) -> None:
        barrier.wait()
        if buffer.claim(10, stop):
            wins.append(stop)

    threads = [threading.Thread(target=claim, args=(20 + number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert not buffer.claim(10, 11)
    assert not buffer.claim(wins[0], 101)
    assert buffer.claim(wins[0], 100)


def test_two_threads_that_extend_one_prefix_get_what_they_asked_for(loaded: Any, encoder: Encoder) -> None:
    base = extend(loaded.model, encoder, prefill(loaded.model, encoder, demonstrations(*range(8))), demonstrations(8))
    results: dict[int, Prefix] = {}

    def grow(number: int) -> None:
        results[number] = extend(loaded.model, encoder, base, demonstrations(number))

    threads = [threading.Thread(target=grow, args=(number,)) for number in (20, 33)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, made in results.items():
        assert_close(made, prefill(loaded.model, encoder, demonstrations(*range(9), number)))
    assert {made.buffer is base.buffer for made in results.values()} == {True, False}


@pytest.mark.parametrize("copy_prefix", [copy.copy, copy.deepcopy, lambda prefix: pickle.loads(pickle.dumps(prefix))])
def test_a_copy_holds_the_states_and_no_right_to_the_room(
    loaded: Any, encoder: Encoder, copy_prefix: Callable[[Prefix], Prefix]
) -> None:
    grown = extend(loaded.model, encoder, prefill(loaded.model, encoder, demonstrations(*range(8))), demonstrations(8))
    twin = copy_prefix(grown)
    assert twin.buffer is None
    assert (twin.token_ids, twin.stops) == (grown.token_ids, grown.stops)
    assert_holds(twin, snapshot(grown))
    assert extend(loaded.model, encoder, twin, demonstrations(1)).buffer is not grown.buffer


@given(
    num_tokens=st.integers(1, 40),
    seed=st.integers(0, 10**6),
    exponent=st.integers(-20, 20),
    offset=st.sampled_from([0.0, 1.0, -300.0]),
)
def test_int8_states_are_within_half_a_level(num_tokens: int, seed: int, exponent: int, offset: float) -> None:
    states = tuple(tuple(part * 2.0**exponent + offset for part in layer) for layer in make_states(num_tokens, seed=seed))
    held = to_int8(states)
    for layer, ((key, value), (own_key, own_value)) in enumerate(zip(states, held, strict=True)):
        for part, own, scale in (
            (key, own_key, held.layers[layer].key_scale),
            (value, own_value, held.layers[layer].value_scale),
        ):
            rounding = 4 * torch.finfo(torch.float32).eps * part.abs().max()
            assert ((part - own).abs() <= scale / 2 + rounding).all()
            assert own.dtype == part.dtype


def test_int8_scales_lie_along_channels_of_keys_and_tokens_of_values() -> None:
    key, value = torch.rand(1, 1, 50, 4), torch.rand(1, 1, 50, 4)
    key[..., 2] *= 1000  # An outlying channel of the keys and an outlying token of the values spoil no other.
    value[:, :, 7] *= 1000
    own_key, own_value = to_int8([(key, value)])[0]
    others = [0, 1, 3]
    assert (own_key - key)[..., others].abs().max() <= 1 / 255
    assert (own_value - value)[:, :, torch.arange(50) != 7].abs().max() <= 1 / 255
    assert 0.1 < (own_key - key)[..., 2].abs().max() < 1000 / 255


def test_int8_keeps_constant_channels_and_extremes_exactly() -> None:
    key = torch.tensor([[[[3.0, -1.0], [3.0, 1.0], [3.0, 0.5]]]])
    value = torch.tensor([[[[2.0, 2.0], [0.0, 1.0], [-8.0, 8.0]]]])
    own_key, own_value = to_int8([(key, value)])[0]
    assert torch.equal(own_key[..., 0], key[..., 0])
    assert torch.equal(own_value[:, :, :1], value[:, :, :1])
    torch.testing.assert_close(own_key[:, :, :2], key[:, :, :2])
    torch.testing.assert_close(own_value, value)


def test_int8_states_are_a_sequence_and_are_cut_without_copying() -> None:
    states = make_states(9, num_layers=3, dtype=torch.bfloat16)
    held = to_int8(states)
    assert len(held) == 3
    assert held[0][0].dtype == torch.bfloat16
    assert all(torch.equal(last, third) for last, third in zip(held[-1], held[2], strict=True))
    assert [pair[0].shape for pair in held[1:]] == [(1, 3, 9, 4)] * 2
    with pytest.raises(IndexError):
        held[3]
    cut = held.trim(5)
    assert cut.layers[1].value.data_ptr() == held.layers[1].value.data_ptr()
    for layer in range(3):
        assert all(torch.equal(own, whole[:, :, :5]) for own, whole in zip(cut[layer], held[layer], strict=True))
    assert len(held.trim(0)) == 0
    assert held.num_bytes == 3 * (2 * 3 * 9 * 4 + 2 * 4 * 3 * (4 + 9))


def test_tensors_are_named_and_found_again() -> None:
    states = make_states(5)
    assert list(name_tensors(states)) == ["layers.0.key", "layers.0.value", "layers.1.key", "layers.1.value"]
    assert states_of_tensors(name_tensors(states), 2, int8_of=None) == states
    held = to_int8(states)
    named = name_tensors(held)
    assert len(named) == 12
    found = states_of_tensors(named, 2, int8_of=torch.float32)
    assert isinstance(found, Int8States)
    assert (found.layers, found.dtype) == (held.layers, torch.float32)
    del named["layers.1.value_lowest"]
    with pytest.raises(KeyError, match=r"layers\.1\.value_lowest"):
        states_of_tensors(named, 2, int8_of=torch.float32)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_queries_read_int8_states_as_they_would_read_their_values(tiny_loaded: Callable[..., Any], architecture: str) -> None:
    loaded = tiny_loaded(architecture)
    encoder = Encoder(loaded.tokenizer)
    plain = prefill(loaded.model, encoder, demonstrations(*range(8)))
    held = quantise(plain)
    spelled_out = Prefix(held.token_ids, held.stops, tuple(held.states))
    queries, labels = [encoder.encode_query("q1"), encoder.encode_query("qq22")], encoder.encode_labels(["yes", "no", "none"])
    scores = [score_labels(loaded.model, prefix, queries, [labels] * 2) for prefix in (plain, held, spelled_out)]
    assert np.array_equal(scores[1], scores[2])
    assert 0 < np.abs(np.subtract(scores[0], scores[1])).max() < 0.1
    answers = [
        generate_answers(loaded.model, prefix, queries, terminator_id=encoder.terminator_id, max_new_tokens=5)
        for prefix in (held, spelled_out)
    ]
    assert answers[0] == answers[1]


def test_an_int8_prefix_is_cut_and_not_extended(loaded: Any, encoder: Encoder) -> None:
    plain = prefill(loaded.model, encoder, demonstrations(*range(8)))
    held = quantise(plain)
    assert held.is_int8
    assert not plain.is_int8
    assert quantise(held) is held
    assert held.num_bytes < 0.5 * plain.num_bytes  # Of fp32; heads of only 8 numbers make the scales weigh much.
    cut = held.trim(3)
    assert (cut.num_shots, cut.num_tokens) == (3, plain.stops[3])
    assert torch.equal(cut.states[1][0], held.states[1][0][:, :, : plain.stops[3]])
    with pytest.raises(PrefixError, match=r"held as int8 \(8 demonstrations\) cannot be extended: .* quantise the result"):
        extend(loaded.model, encoder, held, demonstrations(9))
