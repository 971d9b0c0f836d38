"""A Llama model with its tokenizer as one GGUF file, for llama.cpp and what is built on it.

In: a model by name. Out: a .gguf file, written under another name beside its place, read back, compared and renamed last; a
file that is there already is left alone. Matrices keep the type they were loaded in (bf16 or fp32), vectors are fp32, as
llama.cpp wants. Costs the memory of two copies of the model.

    rows of a query or key head       Hugging Face  0  1  2  3 …       one rotary pair is (d, d + D/2)
    (D numbers a head)                GGUF          0  D/2  1  D/2+1 …  one rotary pair is (2d, 2d + 1)

What the file, or transformers' reader of it, would lose is refused: architectures other than Llama, biases, scaled rotary
positions, and tokenizers that are not byte-level BPE of a kind that llama.cpp has a name for.
"""

import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from manyicl.dtypes import Dtype
from manyicl.errors import ModelError
from manyicl.files import storage_errors
from manyicl.model_names import bars_on_terminals_only
from manyicl.modeling import LoadedModel, check_logits, load_model

_ARCHITECTURE = "llama"
_SPLIT_LIKE_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How text is cut before bytes are merged, step by step, by the name that llama.cpp has for it.
_PRE_TOKENIZERS: dict[tuple[tuple[object, ...], ...], str] = {
    (("ByteLevel", True, False),): "gpt-2",
    (("Digits", True), ("ByteLevel", True, False)): "smollm",
    (("Split", _SPLIT_LIKE_LLAMA3, "Isolated", False), ("ByteLevel", False, False)): "llama-bpe",
}
# A text that takes apart tokenizers that only look alike: numbers, contractions, runs of spaces, letters of several bytes.
_PROBE = "Input: 3 cats' toys cost $12.50, isn't it?\n\n  I'LL say: Ünïcödé, 漢字\t😀 x**2 == 1024;\r\nAnswer:"


def export_gguf(name: str | Path, output: Path, *, dtype: Dtype = "auto") -> float:
    """Write a Llama model with its adapter merged as a GGUF file, and read it again to compare tokens and logits.

    Args:
        output: The file; its name ends in .gguf, by which readers know it.

    Returns:
        The largest difference of logits; see `modeling.check_logits`.

    Raises:
        ModelError: see `modeling.load_model`; or `output` is there already, the model or its tokenizer cannot be said in GGUF,
            or the file reads back as something else, and is removed.
        StorageError: the disk is full or the folder cannot be written.
    """
    if output.exists():
        raise ModelError(f"{output}: is there already. Remove it, or give another name.")
    if output.suffix != ".gguf":
        raise ModelError(f"{output}: does not end in .gguf, by which readers know the file. Give a name that does.")
    loaded = load_model(name, dtype=dtype)
    _check_architecture(loaded)
    with storage_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        for left_behind in output.parent.glob(f".{output.name}-*"):  # By a process that was killed.
            shutil.rmtree(left_behind)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as temporary:
            path = Path(temporary) / output.name
            _write(path, loaded)
            difference = _check_copy(path, loaded, output)
            path.chmod(0o644)
            path.rename(output)
    return difference


def _check_architecture(loaded: LoadedModel) -> None:
    config = loaded.model.config
    if config.model_type != _ARCHITECTURE:
        raise ModelError(
            f"{loaded.name}: its architecture is {config.model_type}; a .gguf file is written for {_ARCHITECTURE} only. Export a "
            "folder, and convert it with llama.cpp's own script."
        )
    plain = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "rope_type": "default"}
    found = config.to_dict() | {"rope_type": config.rope_parameters.get("rope_type", "default")}
    lost = [f"{key} = {found[key]!r}" for key, value in plain.items() if found[key] != value]
    if lost:
        raise ModelError(
            f"{loaded.name}: has {', '.join(lost)}, which a .gguf file read by transformers would lose. Export a folder, and "
            "convert it with llama.cpp's own script."
        )


def _write(path: Path, loaded: LoadedModel) -> None:
    """Write the whole file and sync it."""
    writer = gguf.GGUFWriter(path, _ARCHITECTURE)
    _add_model_facts(writer, loaded)
    _add_tokenizer(writer, loaded)
    _add_tensors(writer, loaded.model)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _add_model_facts(writer: gguf.GGUFWriter, loaded: LoadedModel) -> None:
    config = loaded.model.config
    is_bfloat16 = loaded.model.dtype == torch.bfloat16
    writer.add_description(loaded.note)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if is_bfloat16 else gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer: gguf.GGUFWriter, loaded: LoadedModel) -> None:
    """Tokens, their types, merges, special ids and chat template.

    Raises:
        ModelError: the tokenizer is of another kind, or has ids that the model has not.
    """
    tokenizer, num_tokens = loaded.tokenizer, int(loaded.model.config.vocab_size)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    known, added = {number: token for token, number in tokenizer.get_vocab().items()}, tokenizer.added_tokens_decoder
    if max(known) >= num_tokens:
        raise ModelError(f"{loaded.name}: its tokenizer has ids up to {max(known)}, the model {num_tokens} tokens.")
    tokens, types = [], []
    for number in range(num_tokens):
        if number in added:
            tokens.append(added[number].content)
            types.append(gguf.TokenType.CONTROL if added[number].special else gguf.TokenType.USER_DEFINED)
        else:
            tokens.append(known.get(number, f"[PAD{number}]"))  # Rows of the matrix that no token has, as llama.cpp names them.
            types.append(gguf.TokenType.NORMAL if number in known else gguf.TokenType.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer_name(state, loaded.name))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]])
    kinds = {"bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id, "unk": writer.add_unk_token_id}
    for kind, add in (kinds | {"pad": writer.add_pad_token_id}).items():
        number = getattr(tokenizer, f"{kind}_token_id")
        if number is not None:
            add(number)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _pre_tokenizer_name(state: dict[str, Any], name: str) -> str:
    """How a byte-level BPE tokenizer, given as its tokenizer.json, cuts text, by llama.cpp's name.

    Raises:
        ModelError: it is no such tokenizer, or llama.cpp's name for it is not known here.
    """
    first, model = state["pre_tokenizer"] or {}, state["model"]
    steps = tuple(_describe(step) for step in first.get("pretokenizers", [first]))
    if model["type"] != "BPE" or model.get("byte_fallback") or not model["merges"] or state["normalizer"]:
        raise ModelError(f"{name}: its tokenizer is not byte-level BPE with merges, of which alone a .gguf file is written.")
    if steps not in _PRE_TOKENIZERS:
        raise ModelError(
            f"{name}: its tokenizer cuts text by {steps}, for which no name in llama.cpp is known here "
            f"({', '.join(_PRE_TOKENIZERS.values())} are). Export a folder, and convert it with llama.cpp's own script."
        )
    return _PRE_TOKENIZERS[steps]


def _describe(step: dict[str, Any]) -> tuple[object, ...]:
    """What decides how a step of a pre-tokenizer cuts."""
    kind = step.get("type")
    if kind == "ByteLevel":
        return kind, step.get("use_regex", True), step.get("add_prefix_space", True)
    if kind == "Digits":
        return kind, step.get("individual_digits", False)
    if kind == "Split":
        return kind, step["pattern"].get("Regex"), step["behavior"], step.get("invert", False)
    return (kind,)


def _add_tensors(writer: gguf.GGUFWriter, model: PreTrainedModel) -> None:
    """All weights under GGUF's names; an output head that is the embedding matrix is left out, by which readers see it."""
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        layer = name.split(".")[-2]
        array, kind = _as_array(_interleave_rotary(weight, heads[layer]) if layer in heads else weight)
        new_name = names.get_name(name, try_suffixes=(".weight",))
        if new_name is None:
            raise ModelError(f"{name}: a weight of this name has no place in a .gguf file of the Llama architecture.")
        writer.add_tensor(new_name, array, raw_dtype=kind)


def _interleave_rotary(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows [H * D, hidden] of a query or key matrix, each head's two rotary halves taken in turn."""
    return weight.view(num_heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def _as_array(weight: torch.Tensor) -> tuple[npt.NDArray[Any], gguf.GGMLQuantizationType]:
    """A weight as numpy has it, bf16 as its bytes; vectors as fp32."""
    weight = weight.detach().cpu().contiguous()
    if weight.dim() == 1 or weight.dtype != torch.bfloat16:
        return np.asarray(weight.float().numpy()), gguf.GGMLQuantizationType.F32
    return np.asarray(weight.view(torch.uint8).numpy()), gguf.GGMLQuantizationType.BF16


def _check_copy(path: Path, loaded: LoadedModel, output: Path) -> float:
    """The largest difference of logits between the model and its file, read through transformers.

    Raises:
        ModelError: the file cannot be read, or gives other tokens or logits.
    """
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    reader = logging.getLogger("transformers.quantizers.quantizer_gguf")
    level = reader.level
    reader.setLevel(logging.ERROR)  # transformers 5.23 advises on packed weights, of which the file has none.
    try:
        with bars_on_terminals_only():
            tokenizer = AutoTokenizer.from_pretrained(**source)
            model = AutoModelForCausalLM.from_pretrained(**source, dtype=loaded.model.dtype).eval()
    except Exception as error:  # The tokenizers library (0.22) raises bare ones.
        raise ModelError(
            f"{output}: cannot be read back through transformers: {error} The file was removed. Export a folder, and convert it "
            "with llama.cpp's own script."
        ) from error
    finally:
        reader.setLevel(level)
    own = loaded.tokenizer
    probe = _PROBE + "".join(own.all_special_tokens)
    if tokenizer(probe)["input_ids"] != own(probe)["input_ids"] or tokenizer.eos_token_id != own.eos_token_id:
        raise ModelError(
            f"{output}: read back through transformers, its tokenizer gives other tokens than that of {loaded.name}; the file "
            "was removed. Export a folder, and convert it with llama.cpp's own script."
        )
    return check_logits(loaded.model, model, str(output))
