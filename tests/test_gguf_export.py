"""A model as a GGUF file: what it holds, that it loads again as the same model, and what is refused."""

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from manyicl import gguf_export
from manyicl.config import LoraConfig
from manyicl.encoding import Encoder
from manyicl.errors import ModelError, StorageError
from manyicl.gguf_export import export_gguf
from manyicl.modeling import add_lora, load_model, save_model

INPUT = torch.arange(3, 60).unsqueeze(0)
MERGES = (("h", "e"), ("Ġ", "t"), ("1", "2"))
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def logits(model):
    with torch.inference_mode():
        return model(input_ids=INPUT).logits.float()


def merging_tokenizer(plain, *, pre_tokenizer=BYTE_LEVEL, merges=MERGES, normalizer=None):
    """The byte-level tokenizer with merges, whose tokens have the ids from 261 on."""
    state = json.loads(plain.backend_tokenizer.to_str())
    state["pre_tokenizer"], state["normalizer"] = pre_tokenizer, normalizer
    # A vocabulary that holds the special tokens keeps their ids.
    state["model"]["vocab"] |= {token["content"]: token["id"] for token in state["added_tokens"]}
    for number, (left, right) in enumerate(merges):
        state["model"]["vocab"][left + right] = 261 + number
        state["model"]["merges"].append([left, right])
    names = {f"{kind}_token": getattr(plain, f"{kind}_token") for kind in ("bos", "eos", "pad")}
    inner = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=plain.chat_template, **names)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MANYICL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def llama_folder(tiny_model, byte_tokenizer, tmp_path):
    """A factory of folders with a tiny Llama; its matrix has two rows that no token has."""

    def build(architecture="llama", *, tokenizer=None, vocab_size=266, **overrides):
        folder = tmp_path / "model"
        tiny_model(architecture, vocab_size=vocab_size, **overrides).save_pretrained(folder)
        (tokenizer or merging_tokenizer(byte_tokenizer)).save_pretrained(folder)
        return folder

    return build


def facts_of(path):
    """Metadata of a file, arrays as lists."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"tie_word_embeddings": True},
        {"head_dim": 16, "num_key_value_heads": 4},
        {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
    ],
)
def test_a_file_loads_again_as_the_same_model(llama_folder, cache, tmp_path, dtype, overrides):
    folder, output = llama_folder(**overrides), tmp_path / "deep" / "tiny.gguf"
    assert export_gguf(folder, output, dtype=dtype) < 1e-6
    assert [path.name for path in output.parent.iterdir()] == ["tiny.gguf"]
    assert output.stat().st_mode & 0o777 == 0o644
    again, model = load_model(output, dtype="bfloat16"), load_model(folder, dtype="bfloat16")
    assert (logits(again.model) - logits(model.model)).abs().max() < 1e-6
    text = "the cat, he said: 12 times 3 isn't\n\n  12<|im_end|> é"
    assert again.tokenizer(text)["input_ids"] == model.tokenizer(text)["input_ids"]
    assert {261, 262, 263, 260} <= set(again.tokenizer(text)["input_ids"])
    assert again.tokenizer.chat_template == model.tokenizer.chat_template
    assert Encoder(again.tokenizer).terminator_id == Encoder(model.tokenizer).terminator_id == 256
    assert (again.context_tokens, again.note) == (4096, "dequantised from tiny.gguf")


def test_the_file_holds_what_llama_cpp_reads(llama_folder, tmp_path):
    folder, output = llama_folder(rms_norm_eps=1e-5), tmp_path / "tiny.gguf"
    save = json.loads((folder / "config.json").read_text())
    export_gguf(folder, output, dtype="bfloat16")
    facts = facts_of(output)
    expected = {
        "general.architecture": "llama",
        "general.file_type": gguf.LlamaFileType.MOSTLY_BF16,
        "llama.context_length": 4096,
        "llama.embedding_length": 32,
        "llama.block_count": 2,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 8,
        "llama.attention.value_length": 8,
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": save["rope_parameters"]["rope_theta"],
        "llama.vocab_size": 266,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.merges": ["h e", "Ġ t", "1 2"],
        "tokenizer.ggml.bos_token_id": 258,
        "tokenizer.ggml.eos_token_id": 256,
        "tokenizer.ggml.padding_token_id": 257,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
    }
    assert {name: facts[name] for name in expected} == expected
    assert facts["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert facts["tokenizer.ggml.tokens"][255:] == [
        *("Ń", "<|end|>", "<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>"),
        *("he", "Ġt", "12", "[PAD264]", "[PAD265]"),
    ]
    assert facts["tokenizer.ggml.token_type"] == [1] * 256 + [3] * 5 + [1] * 3 + [5] * 2
    assert "<|im_start|>assistant" in facts["tokenizer.chat_template"]


def test_tensors_are_named_typed_and_laid_out_as_llama_cpp_wants(llama_folder, tmp_path):
    folder, output = llama_folder(), tmp_path / "tiny.gguf"
    export_gguf(folder, output, dtype="float32")
    weights = load_model(folder, dtype="float32").model.state_dict()
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(output).tensors}
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "attn_norm", "ffn_norm")
    blocks = {f"blk.{layer}.{part}.weight" for layer in (0, 1) for part in parts}
    assert found.keys() == blocks | {"token_embd.weight", "output_norm.weight", "output.weight"}
    key, own = found["blk.1.attn_k.weight"].data, weights["model.layers.1.self_attn.k_proj.weight"].numpy()
    # Two heads of eight numbers: the rows of a head's first and second half in turn.
    order = [head * 8 + pair + half * 4 for head in (0, 1) for pair in range(4) for half in (0, 1)]
    assert np.array_equal(key, own[order])
    assert np.array_equal(found["blk.1.attn_v.weight"].data, weights["model.layers.1.self_attn.v_proj.weight"].numpy())
    assert np.array_equal(found["output.weight"].data, weights["lm_head.weight"].numpy())


def test_in_bfloat16_vectors_stay_fp32_and_a_tied_head_is_left_out(llama_folder, tmp_path):
    export_gguf(llama_folder(tie_word_embeddings=True), tmp_path / "tiny.gguf", dtype="bfloat16")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}
    assert "output.weight" not in types
    assert {name for name, kind in types.items() if kind == "F32"} == {name for name in types if "norm" in name}
    assert set(types.values()) == {"F32", "BF16"}


@pytest.mark.parametrize(
    ("pre_tokenizer", "name"),
    [
        (BYTE_LEVEL, "gpt-2"),
        ({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]}, "smollm"),
        (
            {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False},
                    BYTE_LEVEL | {"use_regex": False},
                ],
            },
            "llama-bpe",
        ),
    ],
    ids=["gpt-2", "smollm", "llama-bpe"],
)
def test_how_text_is_cut_has_llama_cpps_name(llama_folder, byte_tokenizer, tmp_path, pre_tokenizer, name):
    tokenizer = merging_tokenizer(byte_tokenizer, pre_tokenizer=pre_tokenizer, merges=MERGES[:2])
    export_gguf(llama_folder(tokenizer=tokenizer), tmp_path / "tiny.gguf")
    assert facts_of(tmp_path / "tiny.gguf")["tokenizer.ggml.pre"] == name


def test_a_start_token_is_added_by_readers_too(llama_folder, make_tokenizer, cache, tmp_path):
    folder = llama_folder(tokenizer=merging_tokenizer(make_tokenizer(add_start=True)))
    export_gguf(folder, tmp_path / "tiny.gguf")
    assert load_model(tmp_path / "tiny.gguf").tokenizer("he")["input_ids"] == [258, 261]


def test_an_adapter_is_merged_into_its_base(llama_folder, byte_tokenizer, cache, tmp_path):
    base = llama_folder()
    model = add_lora(load_model(base, dtype="float32").model, LoraConfig.model_validate({"rank": 4}), seed=0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.05)
    save_model(model, merging_tokenizer(byte_tokenizer), tmp_path / "run", base=str(base), note="dequantised from Q4_1")
    # The run's note is that of its base, of which a folder has none.
    export_gguf(tmp_path / "run", tmp_path / "run.gguf", dtype="bfloat16")
    found, run = load_model(tmp_path / "run.gguf", dtype="bfloat16"), load_model(tmp_path / "run", dtype="bfloat16")
    assert (logits(found.model) - logits(run.model)).abs().max() < 1e-6
    assert (logits(found.model) - logits(load_model(base, dtype="bfloat16").model)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"architecture": "qwen2"}, r"model: its architecture is qwen2; a \.gguf file is written for llama only\. Export a"),
        ({"architecture": "gemma2"}, r"its architecture is gemma2; a \.gguf file is written for llama only"),
        ({"attention_bias": True, "mlp_bias": True}, r"model: has attention_bias = True, mlp_bias = True, which a \.gguf file"),
        ({"hidden_act": "gelu"}, "has hidden_act = 'gelu', which"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "has rope_type = 'linear', which"),
        ({"vocab_size": 263}, "its tokenizer has ids up to 263, the model 263 tokens"),
    ],
)
def test_what_a_file_would_lose_is_refused(llama_folder, tmp_path, overrides, message):
    folder = llama_folder(**overrides)
    with pytest.raises(ModelError, match=message):
        export_gguf(folder, tmp_path / "tiny.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merges": ()}, "its tokenizer is not byte-level BPE with merges"),
        ({"normalizer": {"type": "NFC"}}, "its tokenizer is not byte-level BPE with merges"),
        (
            {"pre_tokenizer": BYTE_LEVEL | {"use_regex": False}},
            r"cuts text by \(\('ByteLevel', False, False\),\), for which no name in llama\.cpp is known here \(gpt-2,",
        ),
        ({"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}}, "'Metaspace'"),
    ],
)
def test_tokenizers_of_other_kinds_are_refused(llama_folder, byte_tokenizer, tmp_path, changes, message):
    folder = llama_folder(tokenizer=merging_tokenizer(byte_tokenizer, **changes))
    with pytest.raises(ModelError, match=message):
        export_gguf(folder, tmp_path / "tiny.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_file_that_is_there_or_has_another_name_is_left_alone(llama_folder, tmp_path):
    (tmp_path / "tiny.gguf").write_text("mine")
    with pytest.raises(ModelError, match=r"tiny\.gguf: is there already\. Remove it, or give another name\."):
        export_gguf(llama_folder(), tmp_path / "tiny.gguf")
    assert (tmp_path / "tiny.gguf").read_text() == "mine"
    with pytest.raises(ModelError, match=r"tiny\.bin: does not end in \.gguf"):
        export_gguf(tmp_path / "model", tmp_path / "tiny.bin")


def test_a_file_that_gives_other_logits_is_removed(llama_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_export, "_interleave_rotary", lambda weight, num_heads: weight)
    with pytest.raises(ModelError, match=r"tiny\.gguf: read back, its logits differ by \d\.\d of .* more than 0\.0001"):
        export_gguf(llama_folder(), tmp_path / "tiny.gguf", dtype="float32")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_file_that_gives_other_tokens_is_removed(llama_folder, tmp_path, monkeypatch):
    write = gguf.GGUFWriter.add_token_merges
    monkeypatch.setattr(gguf.GGUFWriter, "add_token_merges", lambda self, merges: write(self, merges[:1]))
    with pytest.raises(ModelError, match=r"its tokenizer gives other tokens than that of .*model; the file was removed"):
        export_gguf(llama_folder(), tmp_path / "tiny.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_file_that_cannot_be_read_back_is_removed(llama_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf.GGUFWriter, "add_token_list", lambda self, tokens: None)
    with pytest.raises(ModelError, match=r"tiny\.gguf: cannot be read back through transformers: .* The file was removed"):
        export_gguf(llama_folder(), tmp_path / "tiny.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_cannot_be_written_is_a_storage_error(llama_folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"file/tiny\.gguf: cannot be written \(File exists\)"):
        export_gguf(llama_folder(), tmp_path / "file" / "tiny.gguf")


def test_what_a_killed_export_left_is_removed(llama_folder, tmp_path):
    (tmp_path / ".tiny.gguf-abc").mkdir()
    (tmp_path / ".tiny.gguf-abc" / "tiny.gguf").write_bytes(b"half")
    export_gguf(llama_folder(), tmp_path / "tiny.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "tiny.gguf"]


def test_the_command_line_chooses_by_the_name_of_the_output(llama_folder, run_cli, tmp_path):
    folder = llama_folder()
    code, output, errors = run_cli("export", folder, tmp_path / "tiny.gguf")
    assert (code, output) == (0, f"written to {tmp_path / 'tiny.gguf'}\n")
    assert "fastest in float32" not in errors
    assert facts_of(tmp_path / "tiny.gguf")["general.architecture"] == "llama"
    code, _, errors = run_cli("export", folder, tmp_path / "tiny.gguf")
    assert (code, errors) == (2, f"error: {tmp_path / 'tiny.gguf'}: is there already. Remove it, or give another name.\n")


@pytest.mark.slow
def test_the_default_model_with_an_adapter_becomes_a_file(default_model, tmp_path):
    lora = LoraConfig.model_validate({"rank": 2, "targets": ["q_proj"]})
    model = add_lora(load_model("default", dtype="bfloat16").model, lora, seed=0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.01)
    save_model(model, default_model.tokenizer, tmp_path / "run", base="default", note=default_model.note)
    assert export_gguf(tmp_path / "run", tmp_path / "run.gguf", dtype="bfloat16") < 0.02
    facts = facts_of(tmp_path / "run.gguf")
    assert facts["general.description"] == "dequantised from Q4_1"
    assert (facts["tokenizer.ggml.pre"], len(facts["tokenizer.ggml.merges"])) == ("gpt-2", 48900)
    assert facts["llama.rope.freq_base"] == 100_000
    shutil.rmtree(tmp_path / "run")
