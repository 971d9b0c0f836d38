"""The estimators: answers equal those of whole prompts without a cache, and each parameter does what it says."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.exceptions import NotFittedError

from estimator_fixtures import LABELS, UncachedModel, block, classifier, count_forward_tokens, generator, labelled_texts, seen_by
from manyicl import ManyShotClassifier
from manyicl.calibration import CONTENT_FREE_INPUTS, draw_domain_inputs
from manyicl.default_model import default_model_folder
from manyicl.errors import BudgetError
from manyicl.estimator.inputs import DataError
from manyicl.tasks.builtin import load_builtin_suite

TEXTS, ANSWERS = labelled_texts(18)
QUERIES = ["play some rome music", "will it rain in a blues bar", "book a trip"]


@pytest.fixture(scope="module")
def folder(tiny_model_folder: Callable[..., Path]) -> Path:
    return tiny_model_folder()


@pytest.fixture(scope="module")
def uncached(folder: Path) -> UncachedModel:
    return UncachedModel(folder)


# Answers are those of the whole prompt.


@pytest.mark.parametrize("parameters", [{}, {"instruction": "Name the topic."}, {"format": "chat"}, {"fit_mode": "lazy"}])
def test_probabilities_equal_those_of_the_whole_prompt(folder: Path, parameters: dict[str, Any]) -> None:
    model = classifier(folder, **parameters).fit(TEXTS, ANSWERS)
    whole = UncachedModel(folder, format=parameters.get("format", "plain"))
    expected = [
        whole.label_probabilities(whole.prompt(block(model), query, instruction=model.instruction), LABELS) for query in QUERIES
    ]
    assert sorted(block(model)) == sorted(zip(TEXTS, ANSWERS, strict=True))
    np.testing.assert_allclose(model.predict_proba(QUERIES), expected, atol=1e-4)


@pytest.mark.parametrize("architecture", ["gemma2", "qwen3"])
def test_other_architectures_equal_the_whole_prompt_too(architecture: str, tiny_model_folder: Callable[..., Path]) -> None:
    folder = tiny_model_folder(architecture)
    model = classifier(folder, selection="hybrid", num_shots=4, num_nearest=2).fit(TEXTS, ANSWERS)
    whole = UncachedModel(folder)
    expected = [whole.label_probabilities(whole.prompt(seen_by(model, query), query), LABELS) for query in QUERIES]
    np.testing.assert_allclose(model.predict_proba(QUERIES), expected, atol=1e-4)


def test_normalised_scores_are_means_over_tokens(folder: Path, uncached: UncachedModel) -> None:
    model = classifier(folder, normalise=True).fit(TEXTS, ANSWERS)
    lengths = [len(uncached.encoder.encode_answer(label)) for label in LABELS]
    scores = uncached.label_scores(uncached.prompt(block(model), QUERIES[0]), LABELS) / lengths
    expected = np.exp(scores - np.logaddexp.reduce(scores))
    np.testing.assert_allclose(model.predict_proba(QUERIES[:1])[0], expected, atol=1e-4)


def test_several_orders_are_averaged_as_probabilities(folder: Path, uncached: UncachedModel) -> None:
    model = classifier(folder, n_estimators=3).fit(TEXTS, ANSWERS)
    orders = [tuple(order) for order in model.blocks_]
    assert len(set(orders)) == 3
    assert {tuple(sorted(order)) for order in orders} == {tuple(range(18))}
    each = [uncached.label_probabilities(uncached.prompt(block(model, order), QUERIES[1]), LABELS) for order in range(3)]
    np.testing.assert_allclose(model.predict_proba(QUERIES[1:2])[0], np.mean(each, axis=0), atol=1e-4)
    assert np.ptp(each, axis=0).max() > 1e-3


def softmax_logs(scores: np.ndarray) -> np.ndarray:
    return scores - np.logaddexp.reduce(scores)


@pytest.mark.parametrize("calibration", ["contextual", "domain_context", "mutual_information"])
def test_calibration_takes_off_what_is_said_without_the_query(folder: Path, uncached: UncachedModel, calibration: str) -> None:
    model = classifier(folder, calibration=calibration).fit(TEXTS, ANSWERS)
    inputs = {
        "contextual": list(CONTENT_FREE_INPUTS),
        "domain_context": draw_domain_inputs(model.library_, seed=model._seed),
        "mutual_information": [""],
    }[calibration]
    without = np.array([uncached.label_scores(uncached.prompt(block(model), text), LABELS) for text in inputs])
    prior = (
        without[0]
        if calibration == "mutual_information"
        else np.log(np.mean([np.exp(softmax_logs(own)) for own in without], axis=0))
    )
    scores = uncached.label_scores(uncached.prompt(block(model), QUERIES[0]), LABELS)
    np.testing.assert_allclose(model.predict_log_proba(QUERIES[:1])[0], softmax_logs(scores - prior), atol=1e-4)
    assert np.abs(softmax_logs(scores - prior) - softmax_logs(scores)).max() > 0.01


@pytest.mark.parametrize("parameters", [{"selection": "nearest", "num_nearest": 3}, {"selection": "hybrid", "num_shots": 6}])
def test_retrieved_demonstrations_equal_an_uncached_prompt(
    folder: Path, uncached: UncachedModel, parameters: dict[str, Any]
) -> None:
    model = classifier(folder, **parameters).fit(TEXTS, ANSWERS)
    expected = [uncached.label_scores(uncached.prompt(seen_by(model, query), query), LABELS) for query in QUERIES]
    expected = [scores - np.logaddexp.reduce(scores) for scores in expected]
    np.testing.assert_allclose(model.predict_log_proba(QUERIES), expected, atol=1e-4)


def test_nearest_puts_the_most_similar_last_and_hybrid_repeats_nothing(folder: Path) -> None:
    query = "book a trip to oslo"
    nearest = classifier(folder, selection="nearest", num_nearest=2).fit(
        ["play jazz", "a trip to oslo", "a trip"], ["a", "b", "b"]
    )
    assert nearest.num_demonstrations_ == 0
    assert [text for text, _ in seen_by(nearest, query)] == ["a trip", "a trip to oslo"]
    model = classifier(folder, selection="hybrid", num_shots=6, num_nearest=12).fit(TEXTS, ANSWERS)
    demonstrations = seen_by(model, query)
    assert sorted(demonstrations) == sorted(zip(TEXTS, ANSWERS, strict=True))
    prompt_tokens = len(UncachedModel(folder).prompt(demonstrations, query))
    engine = model._engine()
    (groups,) = model._group_queries(engine, [query])
    assert groups[0].prefix.num_shots == 6
    assert groups[0].prefix.num_tokens + len(groups[0].token_ids[0]) == prompt_tokens


def test_embeddings_choose_on_request(folder: Path) -> None:
    def last_letter(texts: list[str]) -> list[list[float]]:
        return [[float(text[-1] == letter) for letter in "abc"] for text in texts]

    model = classifier(folder, selection="nearest", num_nearest=1, embed=last_letter)
    model.fit(["same words a", "same words b", "same words c"], ["x", "y", "z"])
    assert seen_by(model, "other b") == [("same words b", "y")]


def test_generated_answers_equal_those_of_the_whole_prompt(folder: Path, uncached: UncachedModel) -> None:
    for parameters in ({}, {"selection": "hybrid", "num_shots": 5, "num_nearest": 2}):
        model = generator(folder, **parameters).fit(TEXTS, ANSWERS)
        longest = max(len(uncached.encoder.encode_answer(answer)) for answer in ANSWERS)
        prompts = [uncached.prompt(seen_by(model, query) if parameters else block(model), query) for query in QUERIES]
        expected = [uncached.answer(prompt, max_tokens=longest) for prompt in prompts]
        assert model.predict(QUERIES).tolist() == expected


def test_answers_of_the_generator_are_scored_by_the_metric(folder: Path) -> None:
    model = generator(folder, max_answer_tokens=3).fit(TEXTS, ANSWERS)
    predicted = model.predict(QUERIES).tolist()
    assert all(len(text) <= 3 for text in predicted)
    assert model.score(QUERIES, [text or "-" for text in predicted]) == np.mean([float(bool(text)) for text in predicted])
    assert model.set_params(metric="exact_match").score(QUERIES, ["something else"] * 3) == 0.0
    with pytest.raises(DataError, match=r"^metric='macro_f1' is unknown for free text\. Use one of 'exact_match', 'token_f1'"):
        model.set_params(metric="macro_f1").score(QUERIES, ["a", "b", "c"])


# Labels come back as they were given.


@pytest.mark.parametrize(
    "classes",
    [
        np.array(["no", "yes"]),
        np.array(["no", "yes"], dtype=object),
        np.array([-3, 7]),
        np.array([0, 1], dtype=np.int8),
        np.array([False, True]),
    ],
)
def test_labels_are_given_back_in_their_dtype(folder: Path, uncached: UncachedModel, classes: np.ndarray) -> None:
    given = classes[[number % 2 for number in range(18)]]
    model = classifier(folder).fit(TEXTS, given)
    assert model.classes_.dtype == classes.dtype
    assert model.classes_.tolist() == classes.tolist()
    predicted = model.predict(QUERIES)
    assert predicted.dtype == classes.dtype
    words = [str(label) for label in classes.tolist()]
    expected = uncached.label_probabilities(uncached.prompt(block(model), QUERIES[0]), words)
    np.testing.assert_allclose(model.predict_proba(QUERIES)[0], expected, atol=1e-4)
    assert predicted[0] == classes[expected.argmax()]


def test_probabilities_are_probabilities(folder: Path) -> None:
    model = classifier(folder, n_estimators=2).fit(TEXTS, ANSWERS)
    probabilities = model.predict_proba(QUERIES)
    assert probabilities.shape == (3, 3)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=0, atol=1e-12)
    np.testing.assert_allclose(np.log(probabilities), model.predict_log_proba(QUERIES), rtol=0, atol=1e-12)
    assert model.predict(QUERIES).tolist() == [LABELS[place] for place in probabilities.argmax(axis=1)]
    assert model.score(QUERIES, model.predict(QUERIES)) == 1.0


def test_the_seed_decides_the_order(folder: Path) -> None:
    blocks = [classifier(folder, random_state=seed, fit_mode="lazy").fit(TEXTS, ANSWERS).blocks_ for seed in (0, 0, 1)]
    assert blocks[0] == blocks[1] != blocks[2]
    drawn = np.random.RandomState(5)
    again = [classifier(folder, random_state=drawn, fit_mode="lazy").fit(TEXTS, ANSWERS).blocks_ for _ in range(2)]
    assert again[0] != again[1]


# More demonstrations, less room.


@pytest.mark.parametrize("parameters", [{}, {"n_estimators": 2}, {"fit_mode": "lazy"}])
def test_partial_fit_appends_without_recomputing(folder: Path, uncached: UncachedModel, parameters: dict[str, Any]) -> None:
    model = classifier(folder, **parameters).partial_fit(TEXTS[:9], ANSWERS[:9], classes=LABELS)
    before = copy.deepcopy(model.blocks_)
    if parameters.get("fit_mode") == "lazy":
        assert count_forward_tokens(folder, lambda: model.partial_fit(TEXTS[9:], ANSWERS[9:])) == 0
    else:
        new = sum(uncached.encoder.count_example(*pair) for pair in zip(TEXTS[9:], ANSWERS[9:], strict=True))
        fed = count_forward_tokens(folder, lambda: model.partial_fit(TEXTS[9:], ANSWERS[9:]))
        assert fed == new * len(model.blocks_)
    for old, longer in zip(before, model.blocks_, strict=True):
        assert longer[:9] == old
        assert sorted(longer[9:]) == list(range(9, 18))
    prompts = [uncached.prompt(block(model, order), QUERIES[0]) for order in range(len(model.blocks_))]
    expected = np.mean([uncached.label_probabilities(prompt, LABELS) for prompt in prompts], axis=0)
    np.testing.assert_allclose(model.predict_proba(QUERIES[:1])[0], expected, atol=1e-4)


def test_partial_fit_adds_to_what_is_retrieved(folder: Path) -> None:
    model = classifier(folder, selection="nearest", num_nearest=1).fit(TEXTS, ANSWERS)
    model.partial_fit(["an entirely novel sentence"], ["weather"])
    assert seen_by(model, "entirely novel") == [("an entirely novel sentence", "weather")]
    assert (len(model.library_), model.num_demonstrations_, model.num_left_out_) == (19, 0, 0)


def test_what_does_not_fit_is_left_out_whole_and_counted(folder: Path, uncached: UncachedModel) -> None:
    model = classifier(folder, context_tokens=250, n_estimators=2).fit(TEXTS, ANSWERS)
    assert 0 < model.num_demonstrations_ < 18
    assert model.num_left_out_ == 18 - model.num_demonstrations_
    assert {len(order) for order in model.blocks_} == {model.num_demonstrations_}
    longest = max(len(uncached.encoder.encode_query(text)) for text in TEXTS) + len("weather") + 2
    stops = [prefix.num_tokens for prefix in model.open_prefixes()]
    assert max(stops) <= 250 - longest
    assert max(stops) > 250 - longest - 2 * max(
        uncached.encoder.count_example(*pair) for pair in zip(TEXTS, ANSWERS, strict=True)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.predict(TEXTS)
    left_out = model.num_left_out_
    model.partial_fit(TEXTS[:5], ANSWERS[:5])
    assert model.num_left_out_ == 23 - model.num_demonstrations_ >= left_out


def test_every_order_has_as_many_demonstrations_as_the_others(folder: Path) -> None:
    texts = [f"{'long ' * (9 * (number % 2))}text {number}" for number in range(24)]
    alone = [classifier(folder, context_tokens=400, random_state=0, n_estimators=orders) for orders in (1, 5)]
    one, five = [model.fit(texts, ["a", "b"] * 12) for model in alone]
    assert {len(order) for order in five.blocks_} == {five.num_demonstrations_}
    assert five.num_demonstrations_ < one.num_demonstrations_
    assert five.blocks_[0] == one.blocks_[0][: five.num_demonstrations_]


def test_num_shots_limits_the_block(folder: Path) -> None:
    model = classifier(folder, num_shots=4).fit(TEXTS, ANSWERS)
    assert (model.num_demonstrations_, model.num_left_out_) == (4, 14)
    assert model.open_prefixes()[0].num_shots == 4
    assert model.partial_fit(TEXTS[:3], ANSWERS[:3]).num_demonstrations_ == 4


def test_an_example_longer_than_the_context_is_passed_over(folder: Path) -> None:
    texts, answers = ["x" * 400, *TEXTS], ["music", *ANSWERS]
    for selection in ("random", "nearest", "hybrid"):
        model = classifier(folder, context_tokens=300, selection=selection, num_nearest=1).fit(texts, answers)
        assert 0 not in model.blocks_[0]
        assert model.num_left_out_ >= 1
        assert (model.num_left_out_ == 1) == (selection != "random")


def test_a_long_query_sees_fewer_demonstrations_and_is_not_cut(folder: Path, uncached: UncachedModel) -> None:
    model = classifier(folder, context_tokens=600).fit(TEXTS, ANSWERS)
    queries = [QUERIES[0], "rain " * 50, "rain " * 70]
    room = [600 - len(uncached.encoder.encode_query(query)) - len(uncached.encoder.encode_answer("weather")) for query in queries]
    prefix = model.open_prefixes()[0]
    shots = [sum(stop <= tokens for stop in prefix.stops) - 1 for tokens in room]
    assert prefix.num_shots == shots[0] > shots[1] > shots[2] > 0
    with pytest.warns(UserWarning, match=rf"^2 of 3 queries leave room for fewer demonstrations.* {shots[2]} at the least"):
        found = model.predict_proba(queries)
    for number, query in enumerate(queries):
        expected = uncached.label_probabilities(uncached.prompt(block(model)[: shots[number]], query), LABELS)
        np.testing.assert_allclose(found[number], expected, atol=1e-4)


def test_a_long_query_gets_fewer_retrieved_demonstrations(folder: Path) -> None:
    model = classifier(folder, context_tokens=400, selection="nearest", num_nearest=6).fit(TEXTS, ANSWERS)
    with pytest.warns(UserWarning, match=r"^1 of 2 queries leave room for fewer demonstrations"):
        model.predict([QUERIES[0], "rain " * 50])


def test_a_query_that_does_not_fit_alone_is_an_error(folder: Path) -> None:
    model = classifier(folder, context_tokens=300).fit(TEXTS, ANSWERS)
    with pytest.raises(BudgetError, match=r"^X\[1\] takes 408 tokens and its answer up to 9, more than the context of 300"):
        model.predict([QUERIES[0], "y" * 400])


def test_no_demonstration_that_fits_is_an_error_and_leaves_nothing_behind(folder: Path) -> None:
    model = classifier(folder, context_tokens=40)
    for fit in (model.fit, lambda X, y: model.partial_fit(X, y, classes=LABELS)):
        with pytest.raises(BudgetError, match=r"^no demonstration fits the context of 40 tokens beside a query and its answer"):
            fit(TEXTS, ANSWERS)
        with pytest.raises(NotFittedError):
            model.predict(QUERIES)


def test_a_context_wider_than_the_model_is_an_error(folder: Path) -> None:
    with pytest.raises(BudgetError, match="a context of 5000 tokens was asked"):
        classifier(folder, context_tokens=5000).fit(TEXTS, ANSWERS)


@pytest.mark.model
def test_the_default_model_equals_its_whole_prompts(default_model: Any) -> None:
    task = load_builtin_suite().tasks["advice_invented_words"]
    texts, answers = [[getattr(example, field) for example in task.train[:20]] for field in ("input", "answer")]
    queries = [example.input for example in task.test[:2]]
    model = ManyShotClassifier(dtype="float32", random_state=0, instruction=task.instruction).fit(texts, answers)
    assert (model.num_demonstrations_, model.num_left_out_) == (20, 0)
    assert model.classes_.tolist() == sorted(task.labels)
    whole = UncachedModel(default_model_folder())
    prompts = [whole.prompt(block(model), query, instruction=task.instruction) for query in queries]
    expected = np.array([whole.label_probabilities(prompt, sorted(task.labels)) for prompt in prompts])
    np.testing.assert_allclose(model.predict_proba(queries), expected, atol=1e-4)
    assert model.predict(queries).tolist() == [sorted(task.labels)[place] for place in expected.argmax(axis=1)]
