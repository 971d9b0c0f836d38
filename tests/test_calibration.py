"""Calibrated scores against their formulas, computed from whole sequences or from plain scores."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from manyicl import calibration
from manyicl.calibration import (
    CONTENT_FREE_INPUTS,
    draw_domain_inputs,
    flip_examples,
    log_mean_shares,
    score_channel,
    score_contextual,
    score_mutual_information,
)
from manyicl.encoding import Encoder
from manyicl.errors import BudgetError
from manyicl.prefix import prefill
from manyicl.scoring import score_labels
from manyicl.tasks.task import Example

DEMONSTRATIONS = [Example("ab cd", "x"), Example("ef", "yz")]


@pytest.fixture(scope="module")
def setting(tiny_model: Callable[..., Any], byte_tokenizer: Any) -> tuple[Any, Encoder, Any]:
    model, encoder = tiny_model(), Encoder(byte_tokenizer)
    return model, encoder, prefill(model, encoder, DEMONSTRATIONS)


def softmax(scores: np.ndarray) -> np.ndarray:
    return np.exp(scores) / np.exp(scores).sum()


def test_the_mean_is_one_of_shares_not_of_logs() -> None:
    scores = np.log(np.array([[0.2, 0.6], [0.9, 0.1]])) + np.array([[3.0], [-5.0]])
    np.testing.assert_allclose(np.exp(log_mean_shares(scores)), [(0.25 + 0.9) / 2, (0.75 + 0.1) / 2])


@pytest.mark.parametrize("normalise", [False, True])
def test_contextual_scores_follow_the_formula_for_each_label_set(setting: Any, normalise: bool) -> None:
    model, encoder, prefix = setting
    few, many = encoder.encode_labels(["x", "yz"]), encoder.encode_labels(["x", "yz", "q"])
    queries = [encoder.encode_query(text) for text in ("gh", "i", "jkl")]
    contexts = [encoder.encode_query(text) for text in CONTENT_FREE_INPUTS]
    found = score_contextual(model, prefix, queries, [few, many, few], contexts=contexts, normalise=normalise)
    for query, own, scores in zip(queries, [few, many, few], found, strict=True):
        plain = score_labels(model, prefix, [query], [own], normalise=normalise)[0]
        shares = [softmax(score_labels(model, prefix, [context], [own], normalise=normalise)[0]) for context in contexts]
        np.testing.assert_allclose(scores, plain - np.log(np.mean(shares, axis=0)), atol=1e-4)


def test_a_label_that_is_probable_without_content_loses_its_lead(setting: Any) -> None:
    model, encoder, prefix = setting
    labels = encoder.encode_labels(["x", "yz", "q"])
    context = encoder.encode_query("N/A")
    own = score_contextual(model, prefix, [context], [labels], contexts=[context])[0]
    np.testing.assert_allclose(own, own[0], atol=1e-4)


def test_mutual_information_subtracts_the_score_after_the_answer_part_alone(setting: Any) -> None:
    model, encoder, prefix = setting
    few, many = encoder.encode_labels(["x", "yz"]), encoder.encode_labels(["x", "yz", "q"])
    queries, bare = [encoder.encode_query("gh"), encoder.encode_query("i")], encoder.encode_query("")
    found = score_mutual_information(model, prefix, queries, [few, many], bare_query=bare)
    for query, own, scores in zip(queries, [few, many], found, strict=True):
        plain, prior = score_labels(model, prefix, [query, bare], [own, own])
        np.testing.assert_allclose(scores, plain - prior, atol=1e-4)


@pytest.mark.parametrize("trie_tokens", [1, 512])
def test_channel_scores_are_those_of_the_input_after_the_label(
    setting: Any, monkeypatch: pytest.MonkeyPatch, trie_tokens: int
) -> None:
    monkeypatch.setattr(calibration, "CHANNEL_TRIE_TOKENS", trie_tokens)
    model, encoder, _ = setting
    flipped = prefill(model, encoder, flip_examples(DEMONSTRATIONS))
    inputs = [encoder.encode_answer(text) for text in ("gh", "ghi", "k")]
    labels = [encoder.encode_query(text) for text in ("x", "yz")]
    found = score_channel(model, flipped, inputs, labels)
    for tokens, scores in zip(inputs, found, strict=True):
        for label, score in zip(labels, scores, strict=True):
            ids = [*flipped.token_ids, *label, *tokens]
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -len(tokens) - 1 : -1]
            expected = logits.log_softmax(-1)[range(len(tokens)), list(tokens)].sum()
            assert score == pytest.approx(float(expected), abs=1e-4)


def test_flipped_examples_exchange_input_and_answer_and_keep_their_source() -> None:
    assert flip_examples([Example("in", "out", source="f:3")]) == [Example("out", "in", source="f:3")]


def test_domain_inputs_are_words_of_the_demonstrations_at_their_mean_length() -> None:
    drawn = draw_domain_inputs([Example("a b c d", "x"), Example("e f", "y")], num_inputs=50, seed=1)
    assert len(drawn) == 50
    assert {len(text.split()) for text in drawn} == {3}
    assert {word for text in drawn for word in text.split()} == set("abcdef")
    assert drawn == draw_domain_inputs([Example("a b c d", "x"), Example("e f", "y")], num_inputs=50, seed=1)
    assert drawn != draw_domain_inputs([Example("a b c d", "x"), Example("e f", "y")], num_inputs=50, seed=2)


def test_nothing_to_calibrate_with_is_refused(setting: Any) -> None:
    model, encoder, prefix = setting
    with pytest.raises(BudgetError, match="given 0 contexts"):
        score_contextual(model, prefix, [(1,)], [encoder.encode_labels(["x"])], contexts=[])
    with pytest.raises(BudgetError, match="1 demonstrations hold no word"):
        draw_domain_inputs([Example(" ", "x")], seed=0)
