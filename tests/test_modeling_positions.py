"""More positions than a model has: scaled as transformers does it, remembered by a run, refused where it does not fit."""

import json
import shutil

import pytest
import torch

from manyicl.config import LoraConfig
from manyicl.errors import ModelError, RecipeError
from manyicl.modeling import add_lora, export_model, load_config, load_model, save_model
from manyicl.runs import train
from model_fixtures import make_recipe

INPUT = torch.arange(3, 60).unsqueeze(0)


def logits(model):
    with torch.inference_mode():
        return model(input_ids=INPUT).logits.float()


@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_scaled_positions_are_those_of_transformers(tiny_model_folder, tmp_path, kind):
    from transformers import AutoModelForCausalLM

    folder = tiny_model_folder("llama")
    loaded = load_model(folder, dtype="float32", rope_scaling={"rope_type": kind, "factor": 4.0})
    assert loaded.context_tokens == 4 * 4096
    shutil.copytree(folder, tmp_path / "by-hand")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": kind, "factor": 4.0}
    config["rope_parameters"] |= {"original_max_position_embeddings": 4096} if kind == "yarn" else {}
    (tmp_path / "by-hand" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4 * 4096}))
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "by-hand").eval()
    assert torch.equal(logits(loaded.model), logits(expected))
    plain = load_model(folder, dtype="float32")
    assert (logits(plain.model) - logits(loaded.model)).abs().max() > 0.01
    assert plain.fingerprint != loaded.fingerprint


def test_a_run_remembers_its_scaling(tiny_model_folder, byte_tokenizer, tmp_path):
    base, scaling = tiny_model_folder("llama"), {"rope_type": "yarn", "factor": 2.0}
    for name, source in (("first", base), ("second", tmp_path / "first")):
        # The second run is tuned from the first, and takes its scaling with it.
        model = load_model(source, dtype="float32", rope_scaling=scaling if name == "first" else None).model
        adapted = add_lora(model, LoraConfig.model_validate({"rank": 2}), seed=0).eval()
        for each, weight in adapted.named_parameters():
            if "lora_B" in each:
                weight.data.fill_(0.05)
        save_model(adapted, byte_tokenizer, tmp_path / name, base=str(source), note="")
        assert json.loads((tmp_path / name / "manyicl.json").read_text())["rope_scaling"] == scaling
        loaded = load_model(tmp_path / name, dtype="float32")
        assert (logits(loaded.model) - logits(adapted)).abs().max() < 1e-4
        assert loaded.context_tokens == load_config(tmp_path / name).max_position_embeddings == 2 * 4096
    assert load_config(base, rope_scaling=scaling).rope_parameters == loaded.model.config.rope_parameters
    assert load_model(tmp_path / "second", rope_scaling={"rope_type": "linear", "factor": 8}).context_tokens == 8 * 4096
    export_model(tmp_path / "second", tmp_path / "plain", dtype="float32")
    plain = load_model(tmp_path / "plain", dtype="float32")
    assert plain.context_tokens == 2 * 4096
    assert (logits(plain.model) - logits(adapted)).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("architecture", "scaling", "message"),
    [
        ("llama", {"rope_type": "dynamic", "factor": 2.0}, r"give a rope_type \(linear or yarn\) and a factor above 1"),
        ("llama", {"factor": 2.0}, r"rope_scaling = \{'factor': 2\.0\}: give a rope_type"),
        ("llama", {"rope_type": "yarn"}, "and a factor above 1"),
        ("llama", {"rope_type": "yarn", "factor": 1.0}, "and a factor above 1"),
        ("llama", {"rope_type": "yarn", "factor": "4"}, "and a factor above 1"),
        ("gemma3", {"rope_type": "yarn", "factor": 2.0}, r"its rope_parameters are \{.*\}, which rope_scaling cannot scale"),
    ],
)
def test_a_scaling_that_does_not_fit_is_an_error(tiny_model_folder, architecture, scaling, message):
    with pytest.raises(ModelError, match=message):
        load_model(tiny_model_folder(architecture), rope_scaling=scaling)


def test_a_recipe_trains_rows_longer_than_the_models_positions(tiny_model_folder, suite_folder, tmp_path):
    base, suite = tiny_model_folder("llama", max_position_embeddings=64), suite_folder()
    fields = {"training": {"num_steps": 1, "save_every": 1}, "episodes": {"max_tokens": 128}}
    with pytest.raises(RecipeError, match=r"128 is more than the 64 positions of .* or scale the positions \(rope_scaling\)"):
        train(make_recipe(base, suite, tmp_path / "short", **fields))
    train(make_recipe(base, suite, tmp_path / "run", rope_scaling={"rope_type": "yarn", "factor": 2.0}, **fields))
    assert load_model(tmp_path / "run").context_tokens == 128
    full = fields | {"training": fields["training"] | {"tune": "full"}}
    train(make_recipe(base, suite, tmp_path / "full", rope_scaling={"rope_type": "linear", "factor": 3.0}, **full))
    assert load_model(tmp_path / "full").context_tokens == 192
