"""Cached = uncached: scores and answers on a prefix are those of whole sequences through transformers' own attention.

Tolerances, absolute, on log-probabilities of whole labels: 1e-4 in fp32; in bf16 on the default model see the last test.
"""

import hashlib
import random

import numpy as np
import pytest
import torch

from manyicl import prefix as prefix_module
from manyicl.dtypes import has_fast_bfloat16
from manyicl.encoding import Encoder
from manyicl.modeling import load_model
from manyicl.prefix import extend, prefill
from manyicl.scoring import generate_answers, score_labels
from manyicl.tasks.task import Example
from model_fixtures import letter_example
from plain_fixtures import ARCHITECTURES

# Labels that begin like others, one of one token, one long, one with a space inside.
LABELS = ("a", "ab", "abc", "abd", "b", "a b", "quite a long label", "?")
INPUTS = ("q", "a longer query", "one that is longer than the sliding windows of the tiny models are", "zz 9")


@pytest.fixture(scope="module")
def encoder(byte_tokenizer):
    return Encoder(byte_tokenizer)


def demonstrations(count, start=0):
    return [letter_example(number) for number in range(start, start + count)]


def reference_model(tiny_model, architecture, **overrides):
    """The same weights under transformers' plainest attention."""
    model = tiny_model(architecture, **overrides)
    model.set_attn_implementation("eager")
    return model


@torch.inference_mode()
def full_score(model, front, label):
    """The log-probability of a label's tokens after `front`, from whole logits."""
    whole = torch.tensor([[*front, *label]])
    logits = model(input_ids=whole, use_cache=False, logits_to_keep=len(label) + 1).logits[0].double().log_softmax(-1)
    return float(sum(logits[place, token] for place, token in enumerate(label)))


def full_scores(model, prefix, queries, labels):
    return [
        np.array([full_score(model, (*prefix.token_ids, *query), label) for label in own])
        for query, own in zip(queries, labels, strict=True)
    ]


def assert_close(scores, expected, tolerance=1e-4):
    for own, expected_own in zip(scores, expected, strict=True):
        assert own.shape == expected_own.shape
        assert np.abs(own - expected_own).max() < tolerance


def hash_states(prefix):
    digest = hashlib.sha256()
    for key, value in prefix.states:
        digest.update(key.contiguous().numpy().tobytes() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_are_those_of_whole_sequences(tiny_model, encoder, architecture):
    model, reference = tiny_model(architecture), reference_model(tiny_model, architecture)
    prefix = prefill(model, encoder, demonstrations(6), instruction="Say a letter.")
    queries = [encoder.encode_query(text) for text in INPUTS]
    draw = random.Random(architecture)
    labels = [encoder.encode_labels(draw.sample(LABELS, draw.randint(2, len(LABELS)))) for _ in queries]
    expected = full_scores(reference, prefix, queries, labels)
    assert_close(score_labels(model, prefix, queries, labels), expected)
    lengths = [np.array([len(label) for label in own]) for own in labels]
    assert_close(
        score_labels(model, prefix, queries, labels, normalise=True),
        [own / length for own, length in zip(expected, lengths, strict=True)],
    )


@pytest.mark.parametrize("max_batch_tokens", [1, 64, 200, None])
def test_how_queries_are_batched_changes_nothing(tiny_model, encoder, max_batch_tokens):
    model = tiny_model("llama")
    prefix = prefill(model, encoder, demonstrations(4))
    queries = [encoder.encode_query(text) for text in INPUTS * 3]
    shared = encoder.encode_labels(LABELS)
    expected = [score_labels(model, prefix, [query], [shared])[0] for query in queries]
    assert_close(score_labels(model, prefix, queries, [shared] * 12, max_batch_tokens=max_batch_tokens), expected, 1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_without_demonstrations_or_opening_there_is_no_prefix(tiny_model, encoder, architecture):
    model, reference = tiny_model(architecture), reference_model(tiny_model, architecture)
    prefix = prefill(model, encoder, [])
    assert (prefix.num_tokens, prefix.num_shots, prefix.num_bytes) == (0, 0, 0)
    queries, labels = [encoder.encode_query(text) for text in INPUTS], [encoder.encode_labels(LABELS)] * 4
    assert_close(score_labels(model, prefix, queries, labels), full_scores(reference, prefix, queries, labels))


def test_a_start_token_is_part_of_the_prefix(tiny_model, make_tokenizer):
    encoder = Encoder(make_tokenizer(add_start=True))
    model, reference = tiny_model("gemma"), reference_model(tiny_model, "gemma")
    for count in (0, 3):
        prefix = prefill(model, encoder, demonstrations(count))
        assert prefix.token_ids[0] == 258
        queries, labels = [encoder.encode_query("ab")], [encoder.encode_labels(LABELS)]
        assert_close(score_labels(model, prefix, queries, labels), full_scores(reference, prefix, queries, labels))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_extended_and_trimmed_prefixes_are_those_computed_at_once(tiny_model, encoder, architecture):
    model = tiny_model(architecture)
    whole = prefill(model, encoder, demonstrations(7), instruction="Letters.")
    extended = extend(
        model, encoder, prefill(model, encoder, demonstrations(3), instruction="Letters."), demonstrations(4, start=3)
    )
    extended_twice = extend(model, encoder, extended.trim(5), demonstrations(2, start=5))
    for other in (extended, extended_twice):
        assert (other.token_ids, other.stops) == (whole.token_ids, whole.stops)
        for states, other_states in zip(whole.states, other.states, strict=True):
            assert all((a - b).abs().max() < 1e-5 for a, b in zip(states, other_states, strict=True))
    queries, labels = [encoder.encode_query(text) for text in INPUTS], [encoder.encode_labels(LABELS)] * 4
    for shots in range(8):
        fewer = prefill(model, encoder, demonstrations(shots), instruction="Letters.")
        trimmed = whole.trim(shots)
        assert (trimmed.token_ids, trimmed.stops) == (fewer.token_ids, fewer.stops)
        assert_close(score_labels(model, trimmed, queries, labels), score_labels(model, fewer, queries, labels))


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_a_prefix_computed_in_chunks_is_one_computed_at_once(tiny_model, encoder, architecture, monkeypatch):
    model = tiny_model(architecture)
    whole = prefill(model, encoder, demonstrations(8))
    monkeypatch.setattr(prefix_module, "PREFILL_CHUNK_TOKENS", 37)
    chunked = prefill(model, encoder, demonstrations(8))
    assert whole.num_tokens > 4 * 37
    for (key, value), (chunked_key, chunked_value) in zip(whole.states, chunked.states, strict=True):
        assert (key - chunked_key).abs().max() < 1e-5
        assert (value - chunked_value).abs().max() < 1e-5


def test_scores_do_not_drift_over_ten_thousand_queries(tiny_model, encoder):
    model = tiny_model("llama")
    prefix = prefill(model, encoder, demonstrations(4))
    labels, before = encoder.encode_labels(LABELS[:3]), hash_states(prefix)
    asked = [encoder.encode_query(text) for text in INPUTS]
    first = score_labels(model, prefix, asked, [labels] * len(asked))
    others = [encoder.encode_query(f"{number}") for number in range(1_000)]
    for _ in range(10):
        score_labels(model, prefix, others, [labels] * len(others))
    again = score_labels(model, prefix, asked, [labels] * len(asked))
    assert all(np.array_equal(*pair) for pair in zip(first, again, strict=True))
    assert hash_states(prefix) == before


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_queries_and_extensions_leave_every_byte_of_a_prefix_alone(tiny_model, encoder, architecture):
    model = tiny_model(architecture)
    prefix = prefill(model, encoder, demonstrations(5))
    before, copies = hash_states(prefix), [key.data_ptr() for key, _ in prefix.states]
    queries = [encoder.encode_query(text) for text in INPUTS]
    first = score_labels(model, prefix, queries, [encoder.encode_labels(LABELS)] * 4)
    generate_answers(model, prefix, queries, terminator_id=encoder.terminator_id, max_new_tokens=5)
    extend(model, encoder, prefix, demonstrations(2, start=10))
    extend(model, encoder, prefix, demonstrations(2, start=20))
    extend(model, encoder, prefix.trim(2), demonstrations(3, start=30))
    assert hash_states(prefix) == before
    assert [key.data_ptr() for key, _ in prefix.states] == copies
    assert_close(score_labels(model, prefix, queries, [encoder.encode_labels(LABELS)] * 4), first, 1e-12)


def test_two_extensions_of_one_prefix_do_not_see_each_other(tiny_model, encoder):
    model = tiny_model("llama")
    prefix = extend(model, encoder, prefill(model, encoder, demonstrations(4)), demonstrations(1, start=4))
    ends = [demonstrations(1, start=start) for start in (10, 11, 12)]
    extended = [extend(model, encoder, prefix, end) for end in ends]
    queries, labels = [encoder.encode_query(text) for text in INPUTS], [encoder.encode_labels(LABELS)] * 4
    for end, longer in zip(ends, extended, strict=True):
        expected = prefill(model, encoder, [*demonstrations(5), *end])
        assert longer.token_ids == expected.token_ids
        assert_close(score_labels(model, longer, queries, labels), score_labels(model, expected, queries, labels))


@torch.inference_mode()
def greedy(model, front, terminator_id, max_new_tokens):
    """transformers' own greedy answer, cut at the terminator."""
    whole = model.generate(
        torch.tensor([front]),
        attention_mask=torch.ones(1, len(front), dtype=torch.long),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=terminator_id,
        pad_token_id=257,
    )
    answer = whole[0, len(front) :].tolist()
    return tuple(answer[: answer.index(terminator_id)] if terminator_id in answer else answer)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_answers_are_those_of_transformers_generate(tiny_model, encoder, architecture):
    model, reference = tiny_model(architecture), reference_model(tiny_model, architecture)
    prefix = prefill(model, encoder, demonstrations(5))
    queries = [encoder.encode_query(text) for text in INPUTS]
    fronts = [(*prefix.token_ids, *query) for query in queries]
    # A random model ends no answer by itself: take for terminator what it says somewhere in the middle.
    terminator_id = greedy(reference, fronts[1], -1, 12)[6]
    expected = [greedy(reference, front, terminator_id, 12) for front in fronts]
    assert len(expected[1]) < 12
    for max_batch_tokens in (None, 1, max(map(len, queries))):  # All read at once; one by one; some at once, written together.
        answers = generate_answers(
            model, prefix, queries, terminator_id=terminator_id, max_new_tokens=12, max_batch_tokens=max_batch_tokens
        )
        assert answers == expected


@pytest.mark.parametrize("max_new_tokens", [1, 2])
def test_answers_are_no_longer_than_allowed(tiny_model, encoder, max_new_tokens):
    model, reference = tiny_model("llama"), reference_model(tiny_model, "llama")
    prefix = prefill(model, encoder, demonstrations(2))
    query = encoder.encode_query("ab")
    expected = greedy(reference, (*prefix.token_ids, *query), encoder.terminator_id, 8)
    answers = generate_answers(model, prefix, [query], terminator_id=encoder.terminator_id, max_new_tokens=max_new_tokens)
    assert answers == [expected[:max_new_tokens]]


@pytest.mark.slow
@pytest.mark.skipif(not has_fast_bfloat16(), reason="needs a processor with instructions for bfloat16")
def test_the_default_model_in_bfloat16_agrees_with_whole_sequences(default_model):
    """In bf16 both sides round, in another order: measured 0.19 at most on log-probabilities down to -10, stated 0.3.

    Against fp32 the cached scores are about as far off as the uncached ones (measured 1.3 times, stated 2), and the same label
    is best for every query.
    """
    model = load_model(default_model.name, dtype="bfloat16").model
    encoder = Encoder(default_model.tokenizer)
    words = {"red": "colour", "seven": "number", "dog": "animal", "rose": "flower"}
    pairs = [Example(f"{word} ({number})", kind) for number in range(4) for word, kind in words.items()]
    prefix = prefill(model, encoder, pairs)
    queries = [encoder.encode_query(text) for text in ("a cat", "blue", "eleven", "a very old tulip", "copper")]
    labels = encoder.encode_labels(dict.fromkeys(words.values()))
    scores = score_labels(model, prefix, queries, [labels] * 5)
    model.set_attn_implementation("sdpa")
    expected = full_scores(model, prefix, queries, [labels] * 5)
    exact = full_scores(load_model(default_model.name, dtype="float32").model, prefix, queries, [labels] * 5)
    cached_error, uncached_error = (np.abs(np.array(own) - np.array(exact)).mean() for own in (scores, expected))
    assert_close(scores, expected, 0.3)
    assert cached_error < 2 * uncached_error
    assert [own.argmax() for own in scores] == [own.argmax() for own in expected] == [own.argmax() for own in exact]
