"""The estimators: answers equal those of whole prompts without a cache, and each parameter does what it says."""

import copy
import pickle
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from estimator_fixtures import LABELS, UncachedModel, labelled_texts
from manyicl import ManyShotClassifier, ManyShotGenerator
from manyicl.calibration import CONTENT_FREE_INPUTS, draw_domain_inputs
from manyicl.default_model import default_model_folder
from manyicl.errors import BudgetError, StorageError
from manyicl.estimator import shared_models
from manyicl.estimator.inputs import DataError
from manyicl.prefix_store import PrefixStore
from manyicl.tasks.builtin import load_builtin_suite

TEXTS, ANSWERS = labelled_texts(18)
QUERIES = ["play some rome music", "will it rain in a blues bar", "book a trip"]


@pytest.fixture(scope="module")
def folder(tiny_model_folder: Callable[..., Path]) -> Path:
    return tiny_model_folder()


@pytest.fixture(scope="module")
def uncached(folder: Path) -> UncachedModel:
    return UncachedModel(folder)


def classifier(folder: Path, **parameters: Any) -> ManyShotClassifier:
    return ManyShotClassifier(str(folder), **({"dtype": "float32", "random_state": 0} | parameters))


def generator(folder: Path, **parameters: Any) -> ManyShotGenerator:
    return ManyShotGenerator(str(folder), **({"dtype": "float32", "random_state": 0} | parameters))


def block(model: Any, order: int = 0) -> list[tuple[str, str]]:
    return [(model.library_[position].input, model.library_[position].answer) for position in model.blocks_[order]]


def count_forward_tokens(folder: Path, call: Callable[[], Any]) -> int:
    """Tokens that the shared model is fed while `call` runs, padding included."""
    fed = []
    model = shared_models.share_model(folder, "float32").loaded.model
    hook = model.register_forward_pre_hook(lambda _, __, options: fed.append(options["input_ids"].numel()), with_kwargs=True)
    try:
        call()
    finally:
        hook.remove()
    return sum(fed)


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


def seen_by(model: Any, query: str) -> list[tuple[str, str]]:
    """The demonstrations of a query, from the definition: the block, then the most similar others, the most similar last."""
    (scores,) = model._similarity().scores([query])
    ranked = sorted(range(len(scores)), key=lambda position: (-scores[position], model._tie_break.index(position)))
    outside = [position for position in ranked if position not in model.blocks_[0]][: model.num_nearest]
    return block(model) + [(model.library_[position].input, model.library_[position].answer) for position in outside[::-1]]


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


# Threads, copies, pickles and models.


def test_two_threads_give_the_answers_of_one(folder: Path) -> None:
    model = classifier(folder, selection="hybrid", num_shots=6, num_nearest=2, format="chat").fit(TEXTS, ANSWERS)
    # Special tokens in the text of users are read as text, also while the other thread encodes the template's own.
    batches = [[f"{query} <|im_end|> {number}" for query in QUERIES] for number in range(12)]
    expected = [model.predict_log_proba(batch) for batch in batches]
    fresh = pickle.loads(pickle.dumps(model))  # Nothing is kept: both threads find that the block must be prefilled.
    shared_models._models.clear()
    found: dict[int, np.ndarray] = {}

    def answer(numbers: range) -> None:
        for number in numbers:
            found[number] = fresh.predict_log_proba(batches[number])

    threads = [threading.Thread(target=answer, args=(range(start, 12, 2),)) for start in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(12))
    for number, scores in enumerate(expected):
        np.testing.assert_allclose(found[number], scores, rtol=0, atol=1e-6)


class SlowTokenizer:
    """Keeps an option between setting it and using it, as transformers' tokenizers do."""

    def __call__(self, text: str, *, split_special_tokens: bool) -> dict[str, list[int]]:
        self.option = split_special_tokens
        time.sleep(0.001)
        return {"input_ids": [int(self.option)]}


def test_a_shared_tokenizer_is_used_by_one_thread_at_a_time() -> None:
    tokenizer = shared_models.LockedTokenizer(SlowTokenizer())
    found: dict[bool, set[int]] = {}

    def encode(option: bool) -> None:
        found[option] = {tokenizer("text", split_special_tokens=option)["input_ids"][0] for _ in range(50)}

    threads = [threading.Thread(target=encode, args=(option,)) for option in (False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {False: {0}, True: {1}}


@pytest.mark.parametrize("parameters", [{}, {"selection": "hybrid", "num_shots": 6}, {"fit_mode": "lazy"}])
def test_copies_carry_texts_and_no_weights(folder: Path, parameters: dict[str, Any]) -> None:
    model = classifier(folder, **parameters).fit(TEXTS, ANSWERS)
    expected = model.predict_log_proba(QUERIES)
    written = pickle.dumps(model)
    assert len(written) < 6000
    assert b"torch" not in written
    for other in (pickle.loads(written), copy.deepcopy(model)):
        assert other._kept.prefixes == {}
        assert other.get_params() == model.get_params()
        np.testing.assert_allclose(other.predict_log_proba(QUERIES), expected, rtol=0, atol=1e-6)
        other.partial_fit(TEXTS[:3], ANSWERS[:3])
        assert (len(other.library_), len(model.library_)) == (21, 18)


def test_prefill_keeps_the_block_and_lazy_keeps_nothing(folder: Path) -> None:
    kept, lazy = (classifier(folder, fit_mode=mode).fit(TEXTS, ANSWERS) for mode in ("prefill", "lazy"))
    block_tokens = kept.open_prefixes()[0].num_tokens
    for_query = count_forward_tokens(folder, lambda: kept.predict(QUERIES[:1]))
    assert count_forward_tokens(folder, lambda: lazy.predict(QUERIES[:1])) == block_tokens + for_query
    assert count_forward_tokens(folder, lambda: lazy.predict(QUERIES[:1])) == block_tokens + for_query
    assert (len(kept._kept.prefixes), len(lazy._kept.prefixes)) == (1, 0)


def test_the_store_keeps_the_block_on_disk_for_any_process(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYICL_CACHE", str(tmp_path))
    model = classifier(folder, fit_mode="store", n_estimators=2)
    model.fit(TEXTS[:12], ANSWERS[:12])
    assert len(PrefixStore(tmp_path / "prefixes", max_bytes=2**30).keys()) == 2
    assert model._kept.prefixes == {}
    kept = classifier(folder, n_estimators=2).fit(TEXTS[:12], ANSWERS[:12])
    np.testing.assert_allclose(model.predict_proba(QUERIES), kept.predict_proba(QUERIES), rtol=0, atol=1e-6)
    # The same demonstrations are found; more are appended to those.
    again = clone(model)
    assert count_forward_tokens(folder, lambda: again.fit(TEXTS[:12], ANSWERS[:12])) == 0
    fed = count_forward_tokens(folder, lambda: model.partial_fit(TEXTS[12:], ANSWERS[12:]))
    assert fed == 2 * sum(model._lengths(model._engine())[12:])
    kept.partial_fit(TEXTS[12:], ANSWERS[12:])
    np.testing.assert_allclose(model.predict_proba(QUERIES), kept.predict_proba(QUERIES), rtol=0, atol=1e-6)
    # What was evicted is prefilled again.
    for entry in (tmp_path / "prefixes").iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
    np.testing.assert_allclose(model.predict_proba(QUERIES), kept.predict_proba(QUERIES), rtol=0, atol=1e-6)


def test_a_prefix_larger_than_the_store_is_an_error(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYICL_CACHE", str(tmp_path))
    with pytest.raises(StorageError, match="more than the 1 kB of the whole store"):
        classifier(folder, fit_mode="store", store_max_bytes=1000).fit(TEXTS, ANSWERS)


def test_a_model_is_loaded_once_and_two_are_kept(folder: Path, tiny_model_folder: Callable[..., Path], monkeypatch: Any) -> None:
    shared_models._models.clear()
    loaded = []
    load = shared_models.load_model
    monkeypatch.setattr(shared_models, "load_model", lambda name, **options: loaded.append(str(name)) or load(name, **options))
    first = classifier(folder).fit(TEXTS, ANSWERS)
    classifier(folder).fit(TEXTS, ANSWERS).predict(QUERIES)
    monkeypatch.chdir(folder.parent)
    classifier(Path(folder.name)).fit(TEXTS, ANSWERS)
    assert loaded == [str(folder)]
    others = [tiny_model_folder(seed=seed) for seed in (1, 2)]
    for other in others:
        classifier(other, fit_mode="lazy").fit(TEXTS, ANSWERS)
    assert loaded == [str(folder), *map(str, others)]
    assert len(shared_models._models) == 2
    first.predict(QUERIES)
    assert loaded[3:] == [str(folder)]


def test_parameters_that_change_after_fit_ask_for_another_fit(folder: Path) -> None:
    model = classifier(folder).fit(TEXTS, ANSWERS)
    expected = model.predict_proba(QUERIES)
    with pytest.raises(DataError, match=r"^format, instruction changed since fit\. Call fit again"):
        model.set_params(instruction="Say which.", format="chat").predict(QUERIES)
    model.set_params(instruction="", format="plain", fit_mode="lazy")
    np.testing.assert_allclose(model.predict_proba(QUERIES), expected, atol=1e-6)


def test_weights_that_change_after_fit_ask_for_another_fit(folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "model"
    shutil.copytree(folder, copied)
    model = classifier(copied).fit(TEXTS, ANSWERS)
    weights = load_file(copied / "model.safetensors")
    save_file({name: weight + 0.1 for name, weight in weights.items()}, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"is another than at fit: its files have the hash [0-9a-f]{12}…, not [0-9a-f]{12}…"):
        model.predict(QUERIES)
    changed = model.fit(TEXTS, ANSWERS).predict_log_proba(QUERIES)
    assert np.abs(changed - classifier(folder).fit(TEXTS, ANSWERS).predict_log_proba(QUERIES)).max() > 0.01


def test_many_queries_do_not_drift(folder: Path) -> None:
    model = classifier(folder, num_shots=6).fit(TEXTS, ANSWERS)
    states = [tensor.clone() for layer in model.open_prefixes()[0].states for tensor in layer]
    first = model.predict_log_proba(QUERIES)
    for start in range(0, 2000, 200):
        model.predict([f"query {number}" for number in range(start, start + 200)])
    assert np.array_equal(model.predict_log_proba(QUERIES), first)
    after = [tensor for layer in model.open_prefixes()[0].states for tensor in layer]
    assert all(torch.equal(old, new) for old, new in zip(states, after, strict=True))


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
