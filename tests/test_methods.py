"""In-context learning as a method: what is prefilled, what is reserved, and what is answered."""

from dataclasses import replace

import numpy as np
import pytest

from manyicl.calibration import CONTENT_FREE_INPUTS, draw_domain_inputs, score_contextual
from manyicl.encoding import Encoder
from manyicl.engines.native import NativeEngine
from manyicl.errors import BudgetError
from manyicl.methods import CalibratedInContext, InContext
from manyicl.tasks.task import Example


@pytest.fixture(scope="module")
def loaded(tiny_loaded):
    return tiny_loaded("llama")


def method_with(loaded, context=None, **options):
    return InContext(NativeEngine(loaded, Encoder(loaded.tokenizer, **options), context_tokens=context))


def test_as_many_demonstrations_as_fit_beside_the_longest_query_and_answer(loaded, small_task):
    task = small_task(("yes", "no way"), num_test=12, instruction="Say it.")
    encoder = Encoder(loaded.tokenizer)
    queries = task.test
    reserve = max(len(encoder.encode_query(query.input)) for query in queries) + len(" no way") + 1
    lengths = [encoder.count_example(example.input, example.answer) for example in task.train]
    exact = encoder.count_opening(task.instruction) + sum(lengths[:3]) + reserve
    for context, expected in ((exact - 1, 2), (exact, 3), (exact + lengths[3] - 1, 3), (exact + lengths[3], 4)):
        opened = method_with(loaded, context).open(task, task.train, queries)
        assert opened.num_demonstrations == expected
        assert opened.prefix_tokens(expected) + reserve <= context
        assert [answer.choice in (0, 1) for answer in opened.answer(queries, expected)] == [True] * 12


def test_queries_are_never_cut(loaded, small_task):
    task = small_task(num_test=2)
    long = Example("x" * 90, "yes")
    with pytest.raises(
        BudgetError, match=r"task 'parity': the longest query and its answer take 103 tokens, more than the context of 100"
    ):
        method_with(loaded, 100).open(task, task.train, [*task.test, long])
    assert method_with(loaded, 103).open(task, task.train, [*task.test, long]).num_demonstrations == 0


def test_labels_are_chosen_by_their_scores(loaded, small_task):
    task = small_task(("yes", "no", "perhaps"), num_test=5)
    method = method_with(loaded)
    opened = method.open(task, task.train, task.test)
    for shots in (0, 3):
        answers = opened.answer(task.test, shots)
        prefix = method.engine.prefill(task.train[:shots])
        scores = method.engine.choose(prefix, [query.input for query in task.test], [task.labels] * 5)
        assert [answer.choice for answer in answers] == [int(np.argmax(own)) for own in scores]
        assert [answer.text for answer in answers] == [task.labels[int(np.argmax(own))] for own in scores]
        assert [answer.log_probability for answer in answers] == pytest.approx([own.max() for own in scores], abs=1e-4)


def test_each_query_has_its_own_options(loaded, small_task):
    test = [Example(f"q{number}", f"b{number}", options=(f"a{number}", f"b{number}")[: 2 - number % 2]) for number in range(4)]
    train = [Example("t", "x", options=("x", "y"))] * 2
    task = small_task((), train=train, test=test, metric="accuracy")
    assert task.is_choice
    answers = method_with(loaded).open(task, task.train, task.test).answer(task.test, 2)
    assert [answer.text in query.options for answer, query in zip(answers, test, strict=True)] == [True] * 4
    assert [answers[1].choice, answers[3].choice] == [0, 0]


def test_free_text_is_written_up_to_the_longest_train_answer_or_the_tasks_limit(loaded, small_task):
    train = [Example("a", "bb"), Example("c", "dddd")]
    task = small_task((), train=train, test=[Example("e", "f")])
    method = method_with(loaded)
    opened = method.open(task, task.train, task.test)
    assert opened.max_answer_tokens == len(" dddd") + 1
    expected = method.engine.write(method.engine.prefill(train), ["e"], max_new_tokens=6)
    (answer,) = opened.answer(task.test, 2)
    assert (answer.text, answer.choice) == (expected[0], -1)
    assert np.isnan(answer.log_probability)
    limited = method.open(replace(task, max_answer_tokens=2), task.train, task.test)
    assert limited.max_answer_tokens == 2


def test_gold_answers_are_not_looked_at(loaded, small_task):
    task = small_task(("yes", "no"))
    method = method_with(loaded)
    blank = [Example(query.input, "") for query in task.test]
    first = method.open(task, task.train, task.test).answer(task.test, 4)
    assert method.open(task, task.train, blank).answer(blank, 4) == first


def test_token_counts(loaded, small_task):
    task = small_task(instruction="Say it.")
    encoder = Encoder(loaded.tokenizer)
    opened = method_with(loaded).open(task, task.train[:3], task.test)
    assert opened.prefix_tokens(0) == encoder.count_opening("Say it.")
    assert opened.prefix_tokens(2) - opened.prefix_tokens(0) == sum(
        encoder.count_example(e.input, e.answer) for e in task.train[:2]
    )
    assert opened.query_tokens(task.test[0]) == len(encoder.encode_query(task.test[0].input))


def test_the_fingerprint_says_model_format_and_context(loaded, tiny_loaded):
    prints = {
        method_with(loaded).fingerprint,
        method_with(loaded, 100).fingerprint,
        method_with(loaded, format="chat").fingerprint,
        method_with(tiny_loaded("llama", seed=1)).fingerprint,
    }
    assert len(prints) == 4
    assert method_with(loaded).name == "in-context"


def test_calibrated_labels_are_scored_against_words_of_the_demonstrations(loaded, small_task):
    task = small_task(("yes", "no", "perhaps"), num_test=5)
    engine = method_with(loaded).engine
    method = CalibratedInContext(engine, name="x")
    assert (method.name, method.fingerprint) == ("x", f"{InContext(engine).fingerprint}/domain_context/0")
    opened = method.open(task, task.train, task.test)
    encode = engine.encoder.encode_query
    queries = [encode(query.input) for query in task.test]
    labels = engine.encoder.encode_labels(task.labels)
    for shots in (0, 3):
        inputs = draw_domain_inputs(task.train[:shots], seed=0) if shots else CONTENT_FREE_INPUTS
        expected = score_contextual(
            loaded.model, engine.prefill(task.train[:shots]), queries, [labels] * 5, contexts=[encode(text) for text in inputs]
        )
        answers = opened.answer(task.test, shots)
        assert [answer.choice for answer in answers] == [int(np.argmax(own)) for own in expected]
        assert [answer.text for answer in answers] == [task.labels[int(np.argmax(own))] for own in expected]


def test_inputs_that_calibrate_are_no_longer_than_there_is_room_for(loaded, small_task, monkeypatch):
    """All demonstrations but the first are long, and so are texts of their words; queries are short."""
    train = [Example("a b", "yes"), *[Example(" ".join(["word"] * 12), "no")] * 3]
    task = small_task(("yes", "no"), train=train, test=[Example("a b", "yes")] * 2)
    encoder = Encoder(loaded.tokenizer)
    taken = sum(encoder.count_example(each.input, each.answer) for each in train) + encoder.count_opening("")
    room = len(encoder.encode_query("a b")) + 2 + len(encoder.encode_answer("yes"))
    engine = method_with(loaded, taken + room).engine
    opened = CalibratedInContext(engine).open(task, train, task.test)
    assert opened.num_demonstrations == 4
    given, choose = [], engine.choose_calibrated

    def record(*arguments, context_inputs):
        given.extend(context_inputs)
        return choose(*arguments, context_inputs=context_inputs)

    monkeypatch.setattr(engine, "choose_calibrated", record)
    assert {answer.choice in (0, 1) for answer in opened.answer(task.test, 4)} == {True}
    drawn = draw_domain_inputs(train, seed=0)
    left = room - opened.max_answer_tokens
    assert max(len(encoder.encode_query(text)) for text in drawn) > left
    assert max(len(encoder.encode_query(text)) for text in given) <= left
    assert [whole.startswith(text) and bool(text) for whole, text in zip(drawn, given, strict=True)] == [True] * 20


def test_free_text_is_not_calibrated(loaded, small_task):
    task = small_task((), train=[Example("a", "bb"), Example("c", "dddd")], test=[Example("e", "f")])
    plain = method_with(loaded)
    calibrated = CalibratedInContext(plain.engine)
    answers = [method.open(task, task.train, task.test).answer(task.test, 2)[0].text for method in (plain, calibrated)]
    assert answers[0] == answers[1]
