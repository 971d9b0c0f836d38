"""Label scores and greedy answers as a caller sees them; that they equal whole sequences is in equivalence/test_cached.py."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyicl.encoding import Encoder
from manyicl.errors import BudgetError
from manyicl.prefix import Prefix, prefill
from manyicl.scoring import generate_answers, score_labels
from model_fixtures import letter_example


@pytest.fixture(scope="module")
def encoder(byte_tokenizer):
    return Encoder(byte_tokenizer)


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("llama")


@pytest.fixture(scope="module")
def prefix(model, encoder):
    return prefill(model, encoder, [letter_example(number) for number in range(4)])


def test_scores_are_log_probabilities_one_array_a_query(model, prefix, encoder):
    labels = [encoder.encode_labels(["a", "ab"]), encoder.encode_labels(["b", "c", "d"])]
    scores = score_labels(model, prefix, [encoder.encode_query("x"), encoder.encode_query("a longer one")], labels)
    assert [own.shape for own in scores] == [(2,), (3,)]
    assert [own.dtype for own in scores] == [np.float64, np.float64]
    assert all((own < 0).all() for own in scores)


def test_the_probabilities_of_all_one_token_labels_add_up_to_one(model, prefix):
    # A label of the terminator alone is not text, but its tokens are a sequence that can be scored.
    labels = [(token,) for token in range(261)]
    (scores,) = score_labels(model, prefix, [(40, 41)], [labels])
    assert np.exp(scores).sum() == pytest.approx(1.0, abs=1e-5)


def test_a_label_that_begins_like_another_is_told_apart_by_its_terminator(model, prefix, encoder):
    end = encoder.terminator_id
    query = encoder.encode_query("x")
    short, long = (70, end), (70, 71, end)
    (both,) = score_labels(model, prefix, [query], [[short, long]])
    # P(short) + P(70 followed by anything else) = P(70)
    others = [(70, token) for token in range(261) if token != end]
    (rest,) = score_labels(model, prefix, [query], [others])
    (first,) = score_labels(model, prefix, [query], [[(70,)]])
    assert np.exp(both[0]) + np.exp(rest).sum() == pytest.approx(np.exp(first[0]), rel=1e-4)
    assert both[1] < rest[71] < first[0]


@settings(max_examples=25)
@given(data=st.data())
def test_a_label_scores_the_same_in_any_company_and_order(data, model):
    token = st.integers(0, 6)
    labels = data.draw(
        st.lists(st.lists(token, min_size=1, max_size=4).map(lambda ids: (*ids, 256)), min_size=1, max_size=8, unique=True)
    )
    query = tuple(data.draw(st.lists(token, min_size=1, max_size=6)))
    empty = Prefix((), (0,), ())
    (together,) = score_labels(model, empty, [query], [labels])
    alone = [score_labels(model, empty, [query], [[label]])[0][0] for label in labels]
    assert np.abs(together - alone).max() < 1e-4
    (backwards,) = score_labels(model, empty, [query], [labels[::-1]])
    assert np.abs(backwards[::-1] - together).max() < 1e-4


def test_normalised_scores_are_means_over_tokens_and_the_terminator(model, prefix, encoder):
    labels = encoder.encode_labels(["a", "quite a long label"])
    query = [encoder.encode_query("x")]
    (plain,), (normalised,) = (score_labels(model, prefix, query, [labels], normalise=choice) for choice in (False, True))
    assert normalised == pytest.approx(plain / np.array([3, 20]), rel=1e-9)


def test_no_queries_are_no_scores_and_no_answers(model, prefix):
    assert score_labels(model, prefix, [], []) == []
    assert generate_answers(model, prefix, [], terminator_id=256, max_new_tokens=3) == []


def test_queries_and_label_sets_must_be_as_many(model, prefix):
    with pytest.raises(ValueError, match="zip"):
        score_labels(model, prefix, [(1,), (2,)], [[(3, 256)]])


def test_a_query_that_does_not_fit_is_an_error_and_never_cut(tiny_model, encoder):
    model = tiny_model("llama", max_position_embeddings=64)
    prefix = prefill(model, encoder, [letter_example(0)])
    room = 64 - prefix.num_tokens
    labels = [(70, 71, 256)]  # Two tokens are fed; the terminator is predicted and needs no position of its own.
    longest = tuple(range(30, 30 + room - 3))
    assert score_labels(model, prefix, [longest], [labels])[0].shape == (1,)
    with pytest.raises(BudgetError, match=rf"after a prefix of {prefix.num_tokens}, more than the model's 64 positions"):
        score_labels(model, prefix, [(1,), (*longest, 1)], [labels] * 2)
    assert len(generate_answers(model, prefix, [longest], terminator_id=-1, max_new_tokens=3)[0]) == 3
    with pytest.raises(BudgetError, match=r"queries are never cut"):
        generate_answers(model, prefix, [longest], terminator_id=-1, max_new_tokens=4)


def test_answers_stop_at_the_terminator_and_leave_it_out(tiny_model, prefix, encoder, model):
    query = encoder.encode_query("x")
    (answer,) = generate_answers(model, prefix, [query], terminator_id=-1, max_new_tokens=10)
    assert len(answer) == 10
    for stop in range(10):
        expected = answer[: answer.index(answer[stop])]
        assert generate_answers(model, prefix, [query], terminator_id=answer[stop], max_new_tokens=10) == [expected]


def test_a_branch_that_ended_does_not_disturb_the_others(model, prefix, encoder):
    queries = [encoder.encode_query(text) for text in ("x", "a second query", "third", "and one more, longer")]
    alone = [generate_answers(model, prefix, [query], terminator_id=-1, max_new_tokens=8)[0] for query in queries]
    terminator = alone[1][2]
    expected = [answer[: answer.index(terminator)] if terminator in answer else answer for answer in alone]
    assert len({len(answer) for answer in expected}) > 1
    assert generate_answers(model, prefix, queries, terminator_id=terminator, max_new_tokens=8) == expected


def test_queries_that_are_read_in_batches_are_written_together(model, prefix, encoder):
    queries = [encoder.encode_query(text) for text in ("x", "a second query", "third", "and one more, longer", "y")]
    alone = [generate_answers(model, prefix, [query], terminator_id=-1, max_new_tokens=6)[0] for query in queries]
    passes = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, arguments, options: passes.append(options["input_ids"].numel()), with_kwargs=True
    )
    limit = max(map(len, queries))
    assert generate_answers(model, prefix, queries, terminator_id=-1, max_new_tokens=6, max_batch_tokens=limit) == alone
    hook.remove()
    reading = passes[:-5]
    assert len(reading) > 1
    assert max(reading) <= limit
    assert sum(reading) == sum(map(len, queries))
    assert passes[-5:] == [5] * 5


def test_scoring_leaves_training_state_and_gradients_alone(tiny_model, encoder):
    model = tiny_model("llama").train()
    prefix = prefill(model, encoder, [letter_example(0)])
    score_labels(model, prefix, [(1, 2)], [[(3, 256)]])
    assert model.training
    assert all(weight.grad is None for weight in model.parameters())
    assert torch.is_grad_enabled()
