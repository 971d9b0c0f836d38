"""save_pretrained and from_pretrained: the same answers elsewhere, and a refusal of every other model or torn folder."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from estimator_fixtures import labelled_texts
from manyicl import ManyShotClassifier, ManyShotGenerator
from manyicl.errors import PrefixError
from manyicl.estimator import shared_models
from manyicl.estimator.inputs import DataError

TEXTS, ANSWERS = labelled_texts(18)
QUERIES = ["play some rome music", "will it rain in a blues bar"]


@pytest.fixture(scope="module")
def folder(tiny_model_folder: Callable[..., Path]) -> Path:
    return tiny_model_folder()


def classifier(folder: Path, **parameters: Any) -> ManyShotClassifier:
    return ManyShotClassifier(str(folder), **({"dtype": "float32", "random_state": 0} | parameters))


def count_letters(texts: list[str]) -> list[list[float]]:
    return [[float(text.count(letter)) for letter in "abcdefgh"] for text in texts]


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"n_estimators": 2, "instruction": "Name the topic.", "normalise": True, "context_tokens": 600},
        {"selection": "hybrid", "num_shots": 5, "num_nearest": 3, "format": "chat"},
        {"selection": "nearest", "num_nearest": 3},
        {"fit_mode": "lazy", "random_state": None},
        {"fit_mode": "store", "n_estimators": 2},
    ],
)
def test_the_same_estimator_comes_back(
    folder: Path, tmp_path: Path, parameters: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANYICL_CACHE", str(tmp_path / "cache"))
    model = classifier(folder, **parameters).fit(TEXTS[:12], ANSWERS[:12])
    model.save_pretrained(tmp_path / "saved")
    again = ManyShotClassifier.from_pretrained(tmp_path / "saved")
    assert again.get_params() == model.get_params()
    for name in ("library_", "blocks_", "num_demonstrations_", "num_left_out_", "fingerprint_"):
        assert getattr(again, name) == getattr(model, name)
    assert again.classes_.dtype == model.classes_.dtype
    assert np.array_equal(again.predict_log_proba(QUERIES), model.predict_log_proba(QUERIES))
    # It goes on as the original does, with the same orders.
    for each in (model, again):
        each.partial_fit(TEXTS[12:], ANSWERS[12:])
    assert again.blocks_ == model.blocks_
    np.testing.assert_allclose(again.predict_log_proba(QUERIES), model.predict_log_proba(QUERIES), rtol=0, atol=1e-6)


def test_the_generator_comes_back(folder: Path, tmp_path: Path) -> None:
    model = ManyShotGenerator(folder, dtype="float32", random_state=0, max_answer_tokens=6).fit(TEXTS, ANSWERS)
    model.save_pretrained(tmp_path)
    again = ManyShotGenerator.from_pretrained(tmp_path)
    assert again.predict(QUERIES).tolist() == model.predict(QUERIES).tolist()
    with pytest.raises(DataError, match=r"holds a ManyShotGenerator, not a ManyShotClassifier\. Use ManyShotGenerator\.from_"):
        ManyShotClassifier.from_pretrained(tmp_path)


@pytest.mark.parametrize("labels", [np.array([3, 1, 2] * 6, dtype=np.int16), np.array([True, False] * 9), ANSWERS])
def test_labels_keep_their_dtype(folder: Path, tmp_path: Path, labels: Any) -> None:
    model = classifier(folder, fit_mode="lazy").fit(TEXTS, labels)
    model.save_pretrained(tmp_path)
    again = ManyShotClassifier.from_pretrained(tmp_path)
    assert again.classes_.dtype == model.classes_.dtype
    assert again.classes_.tolist() == model.classes_.tolist()


def test_another_process_opens_the_folder_without_prefilling(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "model"
    shutil.copytree(folder, moved)
    model = classifier(folder).fit(TEXTS, ANSWERS)
    model.save_pretrained(tmp_path / "saved")
    script = (
        "import json, sys\n"
        "import manyicl.prefix\n"
        "def refuse(*_): raise AssertionError('prefilled')\n"
        "manyicl.prefix._compute_states = refuse\n"
        "from manyicl import ManyShotClassifier\n"
        "model = ManyShotClassifier.from_pretrained(sys.argv[1], model=sys.argv[2])\n"
        f"print(json.dumps(model.predict_proba({QUERIES!r}).tolist()))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "saved"), str(moved)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    np.testing.assert_allclose(json.loads(printed), model.predict_proba(QUERIES), rtol=0, atol=1e-6)


def test_the_folder_holds_json_and_safetensors(folder: Path, tmp_path: Path) -> None:
    model = classifier(folder, n_estimators=2).fit(TEXTS, ANSWERS)
    model.save_pretrained(tmp_path)
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert [name.partition("states-")[0] for name in names] == [
        "estimator.json",
        "prefix-0/prefix.json",
        "prefix-0/",
        "prefix-1/prefix.json",
        "prefix-1/",
    ]
    with safe_open(next(tmp_path.glob("prefix-0/*.safetensors")), "pt") as states:
        assert states.get_tensor("layers.0.key").shape == (1, 2, model.open_prefixes()[0].num_tokens, 8)
    # Saved again with one order and nothing prefilled, nothing of before is left.
    classifier(folder, fit_mode="lazy").fit(TEXTS, ANSWERS).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["estimator.json"]


def test_another_model_is_refused(folder: Path, tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> None:
    classifier(folder).fit(TEXTS, ANSWERS).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"is another than at fit: its files have the hash [0-9a-f]{12}…, not [0-9a-f]{12}…"):
        ManyShotClassifier.from_pretrained(tmp_path, model=tiny_model_folder(seed=1))


def test_prefixes_of_another_dtype_are_prefilled_again(folder: Path, tmp_path: Path) -> None:
    model = classifier(folder).fit(TEXTS, ANSWERS)
    model.save_pretrained(tmp_path)
    path = tmp_path / "estimator.json"
    path.write_text(
        path.read_text().replace('"dtype": "float32"', '"dtype": "auto"').replace('"dtype":"float32"', '"dtype":"auto"')
    )
    assert '"auto"' in path.read_text()
    dtype = shared_models.share_model(folder, "auto").loaded.model.dtype
    if str(dtype) == "torch.float32":
        assert len(ManyShotClassifier.from_pretrained(tmp_path)._kept.prefixes) == 1
        return
    with pytest.warns(
        UserWarning, match="its keys and values are float32, the model here is bfloat16: the demonstrations are pre"
    ):
        again = ManyShotClassifier.from_pretrained(tmp_path)
    np.testing.assert_allclose(again.predict_proba(QUERIES), model.predict_proba(QUERIES), atol=0.1)


def test_what_was_embedded_asks_for_the_function(folder: Path, tmp_path: Path) -> None:
    model = classifier(folder, selection="nearest", num_nearest=2, embed=count_letters).fit(TEXTS, ANSWERS)
    model.save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"was fitted with embeddings\. Give the same function again: embed=…"):
        ManyShotClassifier.from_pretrained(tmp_path)
    again = ManyShotClassifier.from_pretrained(tmp_path, embed=count_letters)
    assert np.array_equal(again.predict_proba(QUERIES), model.predict_proba(QUERIES))
    classifier(folder).fit(TEXTS, ANSWERS).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"was fitted without embeddings\. Leave embed out"):
        ManyShotClassifier.from_pretrained(tmp_path, embed=count_letters)


def test_what_json_cannot_hold_is_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    model = classifier(folder, random_state=np.random.RandomState(0), fit_mode="lazy").fit(TEXTS, ANSWERS)
    with pytest.raises(DataError, match=r"^random_state=RandomState\(MT19937\).* cannot be written as JSON"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    model.set_params(random_state=0).save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda saved: (saved / "estimator.json").unlink(), DataError, r"estimator\.json: cannot be read"),
        (lambda saved: (saved / "estimator.json").write_text("{"), DataError, r"estimator\.json: the file: Invalid JSON"),
        (lambda saved: edit(saved, seed="x"), DataError, r"estimator\.json: seed: Input should be a valid integer"),
        (lambda saved: edit(saved, pickled="x"), DataError, r"estimator\.json: pickled: Extra inputs are not permitted"),
        (lambda saved: edit(saved, blocks=[[1, 0, *range(2, 18)]]), DataError, r"prefix-0: holds other demonstrations than"),
        (lambda saved: shutil.rmtree(saved / "prefix-0"), PrefixError, r"prefix\.json: cannot be read"),
    ],
)
def test_a_torn_folder_is_refused(
    folder: Path, tmp_path: Path, change: Callable[[Path], Any], error: type[Exception], message: str
) -> None:
    classifier(folder).fit(TEXTS, ANSWERS).save_pretrained(tmp_path)
    change(tmp_path)
    with pytest.raises(error, match=message):
        ManyShotClassifier.from_pretrained(tmp_path)


def edit(saved: Path, **fields: Any) -> None:
    content = json.loads((saved / "estimator.json").read_text())
    (saved / "estimator.json").write_text(json.dumps(content | fields))


def test_a_parameter_of_another_version_is_refused(folder: Path, tmp_path: Path) -> None:
    classifier(folder, fit_mode="lazy").fit(TEXTS, ANSWERS).save_pretrained(tmp_path)
    parameters = json.loads((tmp_path / "estimator.json").read_text())["parameters"]
    edit(tmp_path, parameters=parameters | {"temperature": 2})
    with pytest.raises(DataError, match=r"estimator\.json: unknown parameters \['temperature'\]\. Use the version that wrote it"):
        ManyShotClassifier.from_pretrained(tmp_path)
