"""The native engine: text in, scores or text out."""

import numpy as np
import pytest

from manyicl.encoding import Encoder
from manyicl.engines import native
from manyicl.engines.native import NativeEngine
from manyicl.errors import BudgetError, TaskError
from manyicl.prefix import prefill
from manyicl.scoring import generate_answers, score_labels
from manyicl.tasks.task import Example
from model_fixtures import count_calls

EXAMPLES = [Example("one", "odd"), Example("two", "even"), Example("three", "odd")]


@pytest.fixture(scope="module")
def loaded(tiny_loaded):
    return tiny_loaded("llama")


@pytest.fixture
def engine(loaded):
    return NativeEngine(loaded, Encoder(loaded.tokenizer))


def test_the_context_is_the_models_or_what_was_asked_for(loaded):
    encoder = Encoder(loaded.tokenizer)
    assert NativeEngine(loaded, encoder).context_tokens == 4096
    assert NativeEngine(loaded, encoder, context_tokens=100).context_tokens == 100
    for asked in (0, -5, 4097):
        with pytest.raises(BudgetError, match=rf"a context of {asked} tokens was asked of tiny-llama, which has 4096 positions"):
            NativeEngine(loaded, encoder, context_tokens=asked)


def test_prefilling_keeps_the_context(loaded):
    engine = NativeEngine(loaded, Encoder(loaded.tokenizer), context_tokens=40)
    assert engine.prefill(EXAMPLES[:1]).num_shots == 1
    with pytest.raises(BudgetError, match="more than the 40 allowed"):
        engine.prefill(EXAMPLES)


def test_choosing_scores_each_querys_own_choices(engine, loaded):
    prefix = engine.prefill(EXAMPLES, instruction="Numbers.")
    inputs, choices = ["four", "five", "six"], [("odd", "even"), ("yes",), ("odd", "even")]
    encoder = Encoder(loaded.tokenizer)
    own = prefill(loaded.model, encoder, EXAMPLES, instruction="Numbers.")
    labels = [encoder.encode_labels(each) for each in choices]
    for normalise in (False, True):
        expected = score_labels(loaded.model, own, [encoder.encode_query(text) for text in inputs], labels, normalise=normalise)
        found = engine.choose(prefix, inputs, choices, normalise=normalise)
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_choices_that_recur_are_encoded_once(engine, monkeypatch):
    calls = count_calls(monkeypatch, engine.encoder, "encode_labels")
    engine.choose(engine.prefill([]), ["a", "b", "c"], [("x", "y"), ["x", "y"], ("z",)])
    assert calls == [(("x", "y"),), (("z",),)]


@pytest.mark.parametrize(
    ("choices", "message"),
    [(("x", " "), "the answer ' ' is empty"), (("x", "x"), "labels 'x' and 'x' have the same 3 token ids")],
)
def test_choices_that_cannot_be_told_apart_are_errors(engine, choices, message):
    with pytest.raises(TaskError, match=message):
        engine.choose(engine.prefill([]), ["a"], [choices])


def test_writing_gives_the_generated_tokens_as_text(engine, loaded):
    prefix = engine.prefill(EXAMPLES)
    encoder = Encoder(loaded.tokenizer)
    (ids,) = generate_answers(loaded.model, prefix, [encoder.encode_query("four")], terminator_id=256, max_new_tokens=7)
    assert len(ids) == 7
    assert engine.write(prefix, ["four"], max_new_tokens=7) == [
        loaded.tokenizer.decode(list(ids), skip_special_tokens=True).strip()
    ]


def test_answers_lose_their_lead_and_special_tokens(engine, monkeypatch):
    encoder = engine.encoder
    written = [(*encoder.encode_answer("New York")[:-1],), (257, *encoder.encode_answer("é")[:-1]), ()]
    monkeypatch.setattr(native, "generate_answers", lambda *arguments, **options: written)
    assert engine.write(engine.prefill([]), ["a", "b", "c"], max_new_tokens=5) == ["New York", "é", ""]


def test_room_for_answers_is_that_of_the_longest_with_its_terminator(engine):
    assert engine.answer_tokens(["a", "quite long", "bc"]) == len(" quite long") + 1
