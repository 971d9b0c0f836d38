"""The vLLM engine: bad input here, and in its own environment (make vllm-env) agreement with the native engine.

vLLM runs as a subprocess of `.venv-vllm`, or of the Python that MANYICL_VLLM_PYTHON names; without one those tests are skipped.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manyicl.encoding import Encoder
from manyicl.engines.native import NativeEngine
from manyicl.engines.vllm import TokenPrefix, VllmEngine, _sum_of_last
from manyicl.errors import BudgetError, ModelError
from manyicl.modeling import export_model
from manyicl.tasks.task import Example

PYTHON = Path(os.environ.get("MANYICL_VLLM_PYTHON") or Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python")
DEMONSTRATIONS = [Example(f"{number} plus {number}", "even" if number % 2 else "odd") for number in range(12)]
INPUTS = ["1 plus 2", "what a nice day", "7 plus 7", "the number nine"]
CHOICES = ["even", "odd", "oddly even"]
SCRIPT = """
import json, sys
from manyicl.encoding import Encoder
from manyicl.engines.vllm import VllmEngine
from manyicl.errors import BudgetError
from manyicl.modeling import load_tokenizer
from manyicl.tasks.task import Example

def main():
    job = json.load(open(sys.argv[1]))
    encoder = Encoder(load_tokenizer(job["model"]))
    engine = VllmEngine(job["model"], encoder, context_tokens=1024, enforce_eager=True, max_num_seqs=8)
    prefix = engine.prefill([Example(*pair) for pair in job["demonstrations"]], instruction="Odd or even?")
    choices = [job["choices"]] * len(job["inputs"])
    answer = {
        "prefix": list(prefix.token_ids),
        "scores": [own.tolist() for own in engine.choose(prefix, job["inputs"], choices)],
        "means": [own.tolist() for own in engine.choose(prefix, job["inputs"][:1], choices[:1], normalise=True)],
        "picks": engine.pick(prefix, job["inputs"], choices),
        "texts": engine.write(prefix, job["inputs"], max_new_tokens=4),
    }
    try:
        engine.write(prefix, ["long " * 1100], max_new_tokens=4)
    except BudgetError as error:
        answer["refusal"] = str(error)
    json.dump(answer, open(sys.argv[2], "w"))

if __name__ == "__main__":
    main()
"""


def test_without_vllm_the_error_names_the_extra(
    byte_tokenizer: Any, tiny_model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ModelError, match=r"vLLM is not installed. Type: pip install 'manyicl\[vllm\]'"):
        VllmEngine(tiny_model_folder(), Encoder(byte_tokenizer), context_tokens=64)


def test_a_folder_that_is_no_checkpoint_is_refused_before_vllm_is_loaded(byte_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no plain checkpoint \(config.json is missing\). Make one: manyicl export RUN"):
        VllmEngine(tmp_path, Encoder(byte_tokenizer), context_tokens=64)


def test_a_prefix_is_cut_to_whole_demonstrations() -> None:
    prefix = TokenPrefix((1, 2, 3, 4, 5), (1, 3, 5))
    assert (prefix.num_shots, prefix.num_tokens) == (2, 5)
    assert prefix.trim(1) == TokenPrefix((1, 2, 3), (1, 3))
    with pytest.raises(BudgetError, match="holds 2 demonstrations, not 3"):
        prefix.trim(3)


def test_a_label_score_is_read_from_the_end_of_the_prompt() -> None:
    class Entry:
        def __init__(self, logprob: float) -> None:
            self.logprob = logprob

    prompt = [None, {7: Entry(-9.0)}, {3: Entry(-1.5), 4: Entry(-0.1)}, {2: Entry(-0.25)}]
    assert _sum_of_last(prompt, (3, 2)) == -1.75


@pytest.fixture(scope="module")
def merged(default_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not PYTHON.exists():
        pytest.skip(f"{PYTHON} does not exist: make vllm-env")
    folder = tmp_path_factory.mktemp("vllm") / "model"
    export_model("default", folder)
    return folder


@pytest.fixture(scope="module")
def answer(merged: Path) -> dict[str, Any]:
    folder = merged.parent
    job = {
        "model": str(merged),
        "demonstrations": [(example.input, example.answer) for example in DEMONSTRATIONS],
        "inputs": INPUTS,
        "choices": CHOICES,
    }
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    (folder / "script.py").write_text(SCRIPT, encoding="utf-8")
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [str(PYTHON), str(folder / "script.py"), str(folder / "job.json"), str(folder / "answer.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads((folder / "answer.json").read_text(encoding="utf-8")))


@pytest.mark.slow
def test_both_engines_see_the_same_tokens_and_give_the_same_answers(default_model: Any, answer: dict[str, Any]) -> None:
    engine = NativeEngine(default_model, Encoder(default_model.tokenizer), context_tokens=1024)
    prefix = engine.prefill(DEMONSTRATIONS, instruction="Odd or even?")
    assert answer["prefix"] == list(prefix.token_ids)
    scores = np.array(engine.choose(prefix, INPUTS, [CHOICES] * len(INPUTS)))
    # bf16 in both, rounded in different places.
    np.testing.assert_allclose(np.array(answer["scores"]), scores, atol=0.5)
    gap = np.sort(scores, axis=1)[:, -1] - np.sort(scores, axis=1)[:, -2]
    sure = gap > 0.5
    assert sure.any()
    assert (np.array(answer["scores"]).argmax(1) == scores.argmax(1))[sure].all()
    lengths = [len(ids) for ids in engine.encoder.encode_labels(CHOICES)]
    np.testing.assert_allclose(answer["means"][0], np.array(answer["scores"][0]) / lengths)
    assert all(0 <= pick < len(CHOICES) for pick in answer["picks"])
    assert all(text == text.strip() for text in answer["texts"])
    assert "Use fewer demonstrations; queries are never cut" in answer["refusal"]
