"""Models by name, adapters, saving, merging and exporting."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from manyicl import modeling
from manyicl.config import ObjectiveConfig
from manyicl.encoding import Encoder
from manyicl.errors import ModelError, StorageError
from manyicl.modeling import add_lora, export_model, load_model, load_tokenizer, save_model
from manyicl.objective import answer_losses
from model_fixtures import (
    Lora,
    gradients_of,
    largest_difference,
    logits,
    make_batch,
    randomise,
    weights_of,
    write_run,
    write_tiny_gguf,
)


@pytest.fixture
def run_folder(tiny_model_folder, byte_tokenizer, tmp_path):
    """A finished run's folder over a tiny base, and the adapted model whose logits it must give."""
    return tmp_path / "run", write_run(tmp_path / "run", tiny_model_folder("llama"), byte_tokenizer)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"])
def test_a_local_folder_is_loaded_as_it_was_saved(tiny_model_folder, tiny_model, architecture):
    folder = tiny_model_folder(architecture)
    loaded = load_model(folder, dtype="float32")
    assert torch.equal(logits(loaded.model), logits(tiny_model(architecture)))
    assert not loaded.model.training
    assert (loaded.name, loaded.note, loaded.context_tokens) == (str(folder), "", 4096)
    assert loaded.tokenizer.eos_token_id == 256


def test_a_gguf_file_is_loaded_with_its_note(tmp_path, tiny_model, byte_tokenizer, monkeypatch):
    monkeypatch.setenv("MANYICL_CACHE", str(tmp_path / "cache"))
    model = tiny_model("llama", vocab_size=262)
    loaded = load_model(write_tiny_gguf(tmp_path / "tiny.gguf", model, byte_tokenizer), dtype="float32")
    assert loaded.note == "dequantised from tiny.gguf"
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())
    assert (logits(loaded.model) - logits(model)).abs().max() < 1e-5
    assert loaded.tokenizer("hey")["input_ids"] == [261, *byte_tokenizer("y")["input_ids"]]
    assert Encoder(loaded.tokenizer).terminator_id == 256


def test_a_gguf_file_without_end_token_is_an_error(tmp_path, tiny_model, byte_tokenizer, monkeypatch):
    monkeypatch.setenv("MANYICL_CACHE", str(tmp_path / "cache"))
    path = write_tiny_gguf(tmp_path / "t.gguf", tiny_model("llama", vocab_size=262), byte_tokenizer, end_token=False)
    with pytest.raises(ModelError, match=r"its tokenizer has no end token \(eos_token\)"):
        load_model(path)


def test_a_run_folder_is_its_adapter_merged(run_folder):
    folder, adapted = run_folder
    loaded = load_model(folder, dtype="float32")
    assert (logits(loaded.model) - logits(adapted)).abs().max() < 1e-5
    with adapted.disable_adapter():
        assert (logits(loaded.model) - logits(adapted)).abs().max() > 0.1
    assert not any("lora" in name for name, _ in loaded.model.named_parameters())
    assert load_tokenizer(folder).get_vocab() == loaded.tokenizer.get_vocab()


def test_a_run_over_a_run_is_both_adapters(run_folder, byte_tokenizer, tmp_path):
    first, _ = run_folder
    second = randomise(add_lora(load_model(first, dtype="float32").model, Lora({"rank": 2, "alpha": 2}), seed=1), seed=6).eval()
    save_model(second, byte_tokenizer, tmp_path / "second", base=str(first), note="")
    assert (logits(load_model(tmp_path / "second", dtype="float32").model) - logits(second)).abs().max() < 1e-5


def test_in_bfloat16_only_the_weights_are_rounded(run_folder, tiny_model_folder):
    folder, _ = run_folder
    merged = load_model(folder, dtype="bfloat16").model
    plain = load_model(tiny_model_folder("llama"), dtype="bfloat16").model
    assert {weight.dtype for weight in merged.parameters()} == {torch.bfloat16}
    # Rotary frequencies in bf16 would put far tokens at other positions.
    assert {name: buffer.dtype for name, buffer in merged.named_buffers()} == {
        name: torch.float32 for name, _ in plain.named_buffers()
    }
    exact = load_model(folder, dtype="float32").model
    assert torch.equal(merged.model.layers[0].mlp.up_proj.weight, exact.model.layers[0].mlp.up_proj.weight.bfloat16())


def test_a_base_given_by_a_relative_path_is_found_from_anywhere(tiny_model_folder, byte_tokenizer, tmp_path, monkeypatch):
    base = tiny_model_folder("llama")
    monkeypatch.chdir(base.parent)
    save_model(add_lora(load_model(base.name).model, Lora({}), seed=0), byte_tokenizer, tmp_path / "run", base=base.name, note="")
    monkeypatch.chdir(tmp_path)
    assert load_model("run", dtype="float32").name == "run"


def test_an_adapter_of_another_tool_names_its_own_base(run_folder):
    folder, adapted = run_folder
    (folder / "manyicl.json").unlink()
    assert (logits(load_model(folder, dtype="float32").model) - logits(adapted)).abs().max() < 1e-5


def test_fingerprints_follow_weights_and_base(run_folder, tiny_model_folder, tmp_path):
    folder, _ = run_folder
    first = load_model(folder).fingerprint
    assert load_model(folder).fingerprint == first
    assert load_model(tiny_model_folder("llama")).fingerprint != first
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert load_model(copy).fingerprint == first
    (copy / "summary.json").write_text("{}")
    assert load_model(copy).fingerprint == first
    (copy / "manyicl.json").write_text(json.dumps({"base": str(tiny_model_folder("llama", seed=1)), "note": ""}))
    assert load_model(copy).fingerprint != first
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    tensors = load_file(copy / "adapter_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, copy / "adapter_model.safetensors")
    assert load_model(copy).fingerprint != first


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"holds no model \(config\.json and \*\.safetensors\)"),
        (["config.json"], r"holds no model \(config\.json and \*\.safetensors\)"),
        (["model.safetensors"], r"holds no model \(config\.json and \*\.safetensors\)"),
        (["adapter_config.json"], r"holds an adapter_config\.json without adapter_model\.safetensors"),
    ],
)
def test_a_folder_without_weights_is_an_error(tiny_model_folder, run_folder, tmp_path, files, message):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in files:
        source = run_folder[0] if name.startswith("adapter") else tiny_model_folder("llama")
        shutil.copy(source / name, folder / name)
    with pytest.raises(ModelError, match=message):
        load_model(folder)


def test_a_run_that_has_not_finished_is_called_so(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: default\n")
    with pytest.raises(ModelError, match=r"holds no model .* has not finished\. Go on with it: manyicl train RECIPE --resume\."):
        load_model(tmp_path)


def test_weights_that_would_be_random_are_an_error(tiny_model_folder, tmp_path):
    shutil.copytree(tiny_model_folder("llama"), tmp_path / "partial")
    tensors = load_file(tmp_path / "partial" / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.1.mlp" not in name}
    save_file(kept, tmp_path / "partial" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"3 weights are not in its files and would be random, model\.layers\.1\.mlp\.down_proj"):
        load_model(tmp_path / "partial")


def test_tied_weights_are_not_missing(tiny_model_folder):
    loaded = load_model(tiny_model_folder("llama", tie_word_embeddings=True))
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight


@pytest.mark.parametrize("harm", ["cut weights", "other shape", "broken config"])
def test_broken_files_are_model_errors(tiny_model_folder, tmp_path, harm):
    folder = tmp_path / "broken"
    shutil.copytree(tiny_model_folder("llama"), folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    if harm == "cut weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif harm == "other shape":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 96}))
    else:
        config.write_text("{")
    with pytest.raises(ModelError, match="broken: cannot be loaded as a causal language model"):
        load_model(folder)


def test_a_broken_adapter_is_a_model_error(run_folder):
    folder, _ = run_folder
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match="run: cannot be loaded as a causal language model"):
        load_model(folder)


def test_a_missing_gguf_file_is_an_error(tmp_path):
    with pytest.raises(ModelError, match=r"no\.gguf: no such file"):
        load_model(tmp_path / "no.gguf")


def test_a_tokenizer_without_end_token_is_an_error(tiny_model_folder, make_tokenizer, tmp_path):
    shutil.copytree(tiny_model_folder("llama"), tmp_path / "endless")
    make_tokenizer(end=None).save_pretrained(tmp_path / "endless")
    with pytest.raises(ModelError, match=r"endless: its tokenizer has no end token \(eos_token\), which ends every answer"):
        load_model(tmp_path / "endless")


@pytest.mark.parametrize("targets", [["q_proj", "w_proj"], "q_proj"])
def test_unknown_lora_targets_are_an_error_that_lists_the_layers(tiny_model, targets):
    with pytest.raises(
        ModelError, match=r"targets = .*: use all-linear, or a list of these layers: down_proj, gate_proj, k_proj"
    ):
        add_lora(tiny_model("llama"), Lora({"targets": targets}), seed=0)


def test_lora_weights_are_fp32_over_a_bfloat16_base_and_follow_the_seed(tiny_model):
    models = [add_lora(tiny_model("llama").bfloat16(), Lora({"rank": 4}), seed=seed) for seed in (1, 1, 2)]
    trained = weights_of(models[0])
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert {weight.dtype for weight in models[0].parameters() if not weight.requires_grad} == {torch.bfloat16}
    assert len(trained) == 2 * 7 * 2  # Seven linear layers in two blocks, an A and a B each.
    assert largest_difference(trained, weights_of(models[1])) == 0.0
    assert largest_difference(trained, weights_of(models[2])) > 0.01


def test_adding_lora_leaves_the_random_state_alone(tiny_model):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    add_lora(tiny_model("llama"), Lora({}), seed=8)
    assert torch.equal(torch.rand(2), expected)


def test_gradients_reach_the_adapter_and_nothing_else(tiny_model, byte_tokenizer):
    model = add_lora(tiny_model("llama"), Lora({"rank": 4, "targets": ["q_proj", "down_proj"]}), seed=0)
    batch = make_batch(Encoder(byte_tokenizer), [[0, 1, 2]])
    answer_losses(model, batch, ObjectiveConfig.model_validate({}), in_head=True).total.backward()
    gradients = gradients_of(model)
    assert len(gradients) == 2 * 2 * 2
    assert all("lora_" in name and ("q_proj" in name or "down_proj" in name) for name in gradients)
    assert all(gradient.abs().max() > 0 for name, gradient in gradients.items() if "lora_B" in name)


def test_saving_refuses_a_config_that_says_it_is_quantised(tiny_model, byte_tokenizer, tmp_path):
    model = tiny_model("llama")
    model.config.quantization_config = {"quant_method": "gguf"}
    for kind in (model, add_lora(model, Lora({}), seed=0)):
        with pytest.raises(ModelError, match="config still says it is quantised"):
            save_model(kind, byte_tokenizer, tmp_path / "out", base="default", note="")
    assert not (tmp_path / "out").exists()


def test_the_file_that_makes_a_folder_a_model_comes_last(run_folder, tiny_model, byte_tokenizer, tmp_path, monkeypatch):
    moved = []
    move = shutil.move
    monkeypatch.setattr(modeling.shutil, "move", lambda source, target: moved.append(target.name) or move(source, target))
    _, adapted = run_folder
    for model, last in ((adapted, "adapter_config.json"), (tiny_model("llama"), "config.json")):
        moved.clear()
        save_model(model, byte_tokenizer, tmp_path / last, base="default", note="x")
        assert moved[-1] == last
        assert "manyicl.json" in moved
        assert "README.md" not in moved
        assert not list((tmp_path / last).glob(".saving-*"))


def test_a_folder_that_cannot_be_written_is_a_storage_error(tiny_model, byte_tokenizer, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"file/out: cannot be written \(Not a directory\)"):
        save_model(tiny_model("llama"), byte_tokenizer, tmp_path / "file" / "out", base="", note="")


def test_an_exported_model_is_plain_and_gives_the_adapters_logits(run_folder, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, adapted = run_folder
    export_model(folder, tmp_path / "plain", dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert (logits(plain) - logits(adapted)).abs().max() < 1e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "plain").eos_token_id == 256
    assert not (tmp_path / "plain" / "adapter_config.json").exists()
    assert (logits(load_model(tmp_path / "plain", dtype="float32").model) - logits(adapted)).abs().max() < 1e-5
    with pytest.raises(ModelError, match="plain: is not empty"):
        export_model(folder, tmp_path / "plain")


def test_the_note_goes_with_an_exported_model(tiny_model, byte_tokenizer, tmp_path):
    save_model(tiny_model("llama"), byte_tokenizer, tmp_path / "first", base="default", note="dequantised from Q4_1")
    export_model(tmp_path / "first", tmp_path / "second")
    assert load_model(tmp_path / "second").note == "dequantised from Q4_1"


def test_what_a_killed_save_left_is_removed(tiny_model, byte_tokenizer, tmp_path):
    (tmp_path / ".saving-abc").mkdir()
    (tmp_path / ".saving-abc" / "model.safetensors").write_bytes(b"half")
    save_model(tiny_model("llama"), byte_tokenizer, tmp_path, base="", note="")
    assert not list(tmp_path.glob(".saving-*"))
    assert (tmp_path / "model.safetensors").stat().st_size > 100_000


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_broken_run_file_is_named(run_folder, content):
    folder, _ = run_folder
    (folder / "manyicl.json").write_text(content)
    with pytest.raises(ModelError, match=r"manyicl\.json: says no base model .* Give the folder of a finished run"):
        load_model(folder)


def test_a_model_folder_without_a_tokenizer_is_an_error_of_ours(tiny_model_folder, tmp_path):
    folder = shutil.copytree(tiny_model_folder("llama"), tmp_path / "model")
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(folder)


def test_an_export_says_by_how_much_its_logits_differ(run_folder, tmp_path, caplog):
    folder, _ = run_folder
    with caplog.at_level("INFO", logger="manyicl"):
        assert export_model(folder, tmp_path / "plain", dtype="float32") == 0.0
    assert caplog.messages == [f"{tmp_path / 'plain'}: read back, its logits differ by at most 0 of the largest"]


def test_an_export_that_gives_other_logits_is_removed(run_folder, tmp_path, monkeypatch):
    def save_wrongly(model, tokenizer, folder, **facts):
        save_model(model, tokenizer, folder, **facts)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"] *= 1.01
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(modeling, "save_model", save_wrongly)
    with pytest.raises(
        ModelError, match=r"plain: read back, its logits differ by 0\.01 of the largest .* more than 0\.0001; it was removed"
    ):
        export_model(run_folder[0], tmp_path / "plain", dtype="float32")
    assert not (tmp_path / "plain").exists()


def test_logits_that_are_no_numbers_do_not_agree(tiny_model):
    model, broken = tiny_model("llama"), tiny_model("llama")
    broken.model.norm.weight.data[0] = float("nan")
    with pytest.raises(ModelError, match="there: read back, its logits differ by nan"):
        modeling.check_logits(model, broken, "there")
    # The tolerance of a type: half a hundredth is nothing in bf16, and another model in fp32.
    near = tiny_model("llama")
    near.model.norm.weight.data *= 1.005
    assert modeling.check_logits(model.bfloat16(), near.bfloat16(), "there") == pytest.approx(0.005, abs=0.01)
    with pytest.raises(ModelError, match=r"differ by 0\.00"):
        modeling.check_logits(model.float(), near.float(), "there")


def test_a_plain_export_is_no_file(tmp_path):
    with pytest.raises(ModelError, match=r"x\.gguf: names a file\. For a \.gguf file use gguf_export\.export_gguf"):
        export_model("default", tmp_path / "x.gguf")
