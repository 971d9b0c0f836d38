"""What the estimators keep between calls, share between threads, and leave out of copies and pickles."""

import copy
import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.base import clone

from estimator_fixtures import classifier, count_forward_tokens, labelled_texts
from manyicl.errors import StorageError
from manyicl.estimator import shared_models
from manyicl.estimator.inputs import DataError
from manyicl.prefix_store import PrefixStore

TEXTS, ANSWERS = labelled_texts(18)
QUERIES = ["play some rome music", "will it rain in a blues bar", "book a trip"]


@pytest.fixture(scope="module")
def folder(tiny_model_folder: Callable[..., Path]) -> Path:
    return tiny_model_folder()


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


def test_a_failed_fit_leaves_nothing_and_a_failed_partial_fit_what_was_there(folder: Path, monkeypatch: Any) -> None:
    model = classifier(folder)
    prefix = type(model)._prefix

    def fail(*arguments: Any, **options: Any) -> Any:
        raise StorageError("the disk is full")

    monkeypatch.setattr(type(model), "_prefix", fail)
    with pytest.raises(StorageError, match="the disk is full"):
        model.fit(TEXTS, ANSWERS)
    assert not model.__sklearn_is_fitted__()
    monkeypatch.setattr(type(model), "_prefix", prefix)
    model.fit(TEXTS[:9], ANSWERS[:9])
    expected = model.predict_log_proba(QUERIES)
    monkeypatch.setattr(type(model), "_prefix", fail)
    with pytest.raises(StorageError, match="the disk is full"):
        model.partial_fit(TEXTS[9:], ANSWERS[9:])
    monkeypatch.setattr(type(model), "_prefix", prefix)
    assert (len(model.library_), model.num_demonstrations_) == (9, 9)
    np.testing.assert_allclose(model.predict_log_proba(QUERIES), expected, rtol=0, atol=1e-6)
    assert len(model.partial_fit(TEXTS[9:], ANSWERS[9:]).library_) == len(TEXTS)


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
