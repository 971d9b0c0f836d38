"""Load, LoRA-wrap, save, merge and export a causal LM with its tokenizer.

A model is named the same way everywhere: `default`, a local folder, a hub id, a `.gguf` file, or a finished run's folder
(an adapter beside a manyicl.json that names its base), here or on the hub.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from manyicl.config import LoraConfig
from manyicl.dtypes import Dtype, resolve_dtype
from manyicl.errors import ModelError
from manyicl.files import hash_file, storage_errors, write_json_atomic
from manyicl.model_names import (
    RUN_FILE,
    bars_on_terminals_only,
    hub_file,
    loading_errors,
    locate_model,
    read_adapter_run,
    read_run_file,
)

logger = logging.getLogger(__name__)

# JSON files that decide what a model answers; a run's own (its summary, its measured speed) do not.
_FINGERPRINTED = (
    "config.json",
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
# Scalings of rotary positions that are the same for every length, so that keys computed before stay true.
_ROPE_SCALINGS = ("linear", "yarn")
NUM_CHECKED_TOKENS = 48
# By how much of the largest logit two loads of the same weights may differ: a few roundings of the type.
LOGIT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.02}
Format = Literal["plain", "chat"]


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for use.

    Attributes:
        name: The name it was asked for by.
        note: What every result of it must say beside it, such as "dequantised from Q4_1".
        fingerprint: SHA-256 over the files it was loaded from.
        format: Format of the rows it was tuned on; plain for a model that is no run.
        context_tokens: Positions that the model has.
    """

    model: PreTrainedModel
    tokenizer: Any
    name: str
    note: str
    fingerprint: str
    format: Format = "plain"

    @property
    def context_tokens(self) -> int:
        """Positions that the model has."""
        return int(self.model.config.get_text_config().max_position_embeddings)


def load_model(
    name: str | Path = "default",
    *,
    dtype: Dtype = "auto",
    rope_scaling: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """The model of that name in evaluation mode, an adapter merged into its base (in fp32, then cast).

    Args:
        rope_scaling: How its rotary positions are scaled so that it has more of them, {"rope_type": "yarn", "factor": 4.0}
            for instance; None takes what a run was trained with, or the model's own.

    Raises:
        ModelError: there is no such model, it has no weights or no end token, the processor lacks the dtype, or the scaling
            does not fit the model.
    """
    name, target = str(name), resolve_dtype(dtype)
    folder, note = locate_model(name)
    if folder is not None and (folder / "adapter_config.json").is_file():
        run = read_adapter_run(name, folder)
        scaling = rope_scaling or run["rope_scaling"]
        base = load_model(run["base"], dtype="float32", rope_scaling=scaling, trust_remote_code=trust_remote_code)
        with loading_errors(name):
            adapted = PeftModel.from_pretrained(base.model, str(folder))
        model = _cast_weights(adapted.merge_and_unload(), target)
        fingerprint = _fingerprint(folder, base.fingerprint)
        return LoadedModel(model.eval(), base.tokenizer, name, base.note, fingerprint, run["format"])
    source = str(folder) if folder is not None else name
    model, tokenizer = _load_plain(source, target, rope_scaling, trust_remote_code)
    revision = getattr(model.config, "_commit_hash", None)  # Of a hub id, which can mean other weights tomorrow.
    fingerprint = _fingerprint(folder, f"{name}@{revision}")
    if rope_scaling:
        fingerprint = hashlib.sha256(f"{fingerprint}:{json.dumps(rope_scaling, sort_keys=True)}".encode()).hexdigest()
    run_file = folder / RUN_FILE if folder is not None else hub_file(name, RUN_FILE)
    if run_file is None or not run_file.is_file():
        return LoadedModel(model.eval(), tokenizer, name, note, fingerprint)
    run = read_run_file(run_file.parent)
    return LoadedModel(model.eval(), tokenizer, name, run["note"], fingerprint, run["format"])


def _cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its weights in `dtype`. Buffers stay fp32: rotary frequencies in bf16 turn far positions into others."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    return model


def load_tokenizer(name: str | Path = "default", *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of the model of that name, without its weights.

    Raises:
        ModelError: see `load_model`.
    """
    folder, _ = locate_model(str(name))
    if folder is not None and (folder / "adapter_config.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        return load_tokenizer(read_adapter_run(str(name), folder)["base"], trust_remote_code=trust_remote_code)
    return _load_plain_tokenizer(str(folder or name), trust_remote_code)


def load_config(
    name: str | Path = "default", *, rope_scaling: dict[str, Any] | None = None, trust_remote_code: bool = False
) -> Any:
    """The config of the model of that name, without its weights; of its base for an adapter. A folder needs a config.json alone.

    Args:
        rope_scaling: As for `load_model`.

    Raises:
        ModelError: there is no such model, it cannot be reached, its config cannot be read, or the scaling does not fit.
    """
    source = str(name)
    if not (Path(source) / "config.json").is_file():
        folder, _ = locate_model(source)
        if folder is not None and (folder / "adapter_config.json").is_file():
            run = read_adapter_run(source, folder)
            scaling = rope_scaling or run["rope_scaling"]
            return load_config(run["base"], rope_scaling=scaling, trust_remote_code=trust_remote_code)
        source = str(folder or source)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(
            f"{name}: its config cannot be read: {first_line} Give `default`, a folder with a config.json, a hub id that can be "
            "reached, a .gguf file or a finished run's folder; a plan also takes a published shape (--shape)."
        ) from error
    if rope_scaling:
        _scale_rope(str(name), config, rope_scaling)
    return config


def add_lora(model: PreTrainedModel, config: LoraConfig, *, seed: int) -> PeftModel:
    """The model with trainable fp32 low-rank adapters over its frozen weights; their start follows from `seed`.

    Raises:
        ModelError: a target names no linear layer of the model.
    """
    linear = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)})
    unknown = [target for target in config.targets if target not in linear] if isinstance(config.targets, list) else []
    if unknown or (isinstance(config.targets, str) and config.targets != "all-linear"):
        raise ModelError(
            f"training.lora.targets = {config.targets!r}: use all-linear, or a list of these layers: {', '.join(linear)}."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tuned = get_peft_model(
            model,
            PeftLoraConfig(
                r=config.rank,
                lora_alpha=config.alpha,
                lora_dropout=config.dropout,
                target_modules=config.targets,
                task_type="CAUSAL_LM",
            ),
            autocast_adapter_dtype=True,
        )
    # PEFT keeps a set, whose order in adapter_config.json, and with it the fingerprint, would be another in every process.
    kept: Any = tuned.peft_config["default"]
    kept.target_modules = sorted(kept.target_modules)
    return tuned


def save_model(
    model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, *, base: str, note: str, format: Format = "plain"
) -> None:
    """Write an adapter or a whole model with its tokenizer, so that `folder` names a model.

    Files are written to a temporary folder and moved one by one, the file that makes the folder a model last.

    Args:
        base: Name of the model that was tuned, empty for none; a local folder is kept as an absolute path.
        note: What every result of the model must say beside it.
        format: Format of the rows that it was tuned on.

    Raises:
        ModelError: the model still carries a quantisation entry, whose weights would be read wrongly.
        StorageError: the disk is full or the folder cannot be written.
    """
    config = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError("the model's config still says it is quantised. Load it through load_model, which writes plain weights.")
    with storage_errors(folder), bars_on_terminals_only():
        folder.mkdir(parents=True, exist_ok=True)
        for left_behind in folder.glob(".saving-*"):  # By a process that was killed.
            shutil.rmtree(left_behind)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            (Path(temporary) / "README.md").unlink(missing_ok=True)  # PEFT's empty card; ours is written from records.
            facts = {"base": _lasting_name(base), "note": note, "format": format}
            scaling = getattr(model, "manyicl_rope_scaling", None)
            write_json_atomic(Path(temporary) / RUN_FILE, facts | ({"rope_scaling": scaling} if scaling else {}))
            for path in sorted(Path(temporary).iterdir(), key=lambda path: path.name in ("config.json", "adapter_config.json")):
                path.chmod(0o644)  # safetensors writes files that only their owner can read.
                shutil.move(str(path), folder / path.name)


def _lasting_name(name: str) -> str:
    """A model's name that means the same from any working folder."""
    return str(Path(name).resolve()) if name not in ("", "default") and Path(name).exists() else name


def export_model(name: str | Path, output: Path, *, dtype: Dtype = "auto") -> float:
    """Write a model with its adapter merged as a plain Hugging Face checkpoint, and load it again to compare logits.

    Costs the memory of two copies of the model.

    Returns:
        The largest difference of logits; see `check_logits`.

    Raises:
        ModelError: see `load_model`; or `output` holds something already; or the checkpoint gives other logits, and is removed.
        StorageError: the disk is full or the folder cannot be written.
    """
    if output.suffix == ".gguf":
        raise ModelError(f"{output}: names a file. For a .gguf file use gguf_export.export_gguf or manyicl export.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ModelError(f"{output}: is not empty. Give a new folder, so that files of two models do not mix.")
    loaded = load_model(name, dtype=dtype)
    save_model(loaded.model, loaded.tokenizer, output, base="", note=loaded.note, format=loaded.format)
    try:
        return check_logits(loaded.model, load_model(output, dtype=dtype).model, str(output))
    except ModelError:
        shutil.rmtree(output, ignore_errors=True)
        raise


@torch.inference_mode()
def check_logits(model: PreTrainedModel, copy: PreTrainedModel, where: str) -> float:
    """The largest difference between the logits of a model and of its written copy, as a share of the largest logit.

    Both see the same 48 tokens, whose ids are spread over the vocabulary. Two loads of the same weights mostly agree to the
    last bit; `LOGIT_TOLERANCE` is what they may differ by.

    Args:
        where: What the copy was loaded from.

    Raises:
        ModelError: they differ by more.
    """
    vocabulary = model.config.get_text_config().vocab_size
    token_ids = torch.linspace(0, vocabulary - 1, NUM_CHECKED_TOKENS, device=model.device).long().unsqueeze(0)
    own, copied = (each(input_ids=token_ids, use_cache=False).logits.float() for each in (model, copy))
    difference = float((own - copied).abs().max() / own.abs().max())
    tolerance = LOGIT_TOLERANCE[model.dtype]
    if not difference <= tolerance:  # Not a number either.
        raise ModelError(
            f"{where}: read back, its logits differ by {difference:.2g} of the largest from those of the model, more than "
            f"{tolerance:g}; it was removed. Export in another format, and please report it."
        )
    logger.info("%s: read back, its logits differ by at most %.2g of the largest", where, difference)
    return difference


def push_to_hub(name: str | Path, repo_id: str, *, private: bool | None = None, **options: Any) -> str:
    """Upload a run's folder, without its checkpoints, to the Hugging Face Hub and return the address of the commit.

    Args:
        private: Whether a repository that is made by this call is private; None takes the account's default.
        options: Those of `HfApi.upload_folder`, such as `commit_message` and `revision`.

    Raises:
        ModelError: the folder holds no model.
    """
    from huggingface_hub import HfApi

    folder = Path(name)
    if not folder.is_dir():
        raise ModelError(f"{name}: no such folder. Give the folder of a finished run, or of an exported model.")
    locate_model(str(name))
    base = read_run_file(folder)["base"] if (folder / "adapter_config.json").is_file() else ""
    if Path(str(base)).is_absolute():
        logger.warning(
            '%s: its base model %s is a folder of this machine. Write a name that others know as "base" into %s, or push an '
            "exported model.",
            name,
            base,
            folder / RUN_FILE,
        )
    ignored = options.pop("ignore_patterns", None) or []
    ignored = ["checkpoints/*", ".saving-*", *([ignored] if isinstance(ignored, str) else ignored)]
    api = HfApi()
    repo_id = api.create_repo(repo_id, exist_ok=True, private=private).repo_id
    return str(api.upload_folder(repo_id=repo_id, folder_path=str(folder), ignore_patterns=ignored, **options))


def _load_plain(
    source: str, dtype: torch.dtype, rope_scaling: dict[str, Any] | None, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    with loading_errors(source):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    if rope_scaling:
        _scale_rope(source, config, rope_scaling)
    with loading_errors(source):
        found: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    model, report = found
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"{source}: {len(missing)} weights are not in its files and would be random, {missing[0]} first. "
            "Give the folder of a whole causal language model."
        )
    if rope_scaling:
        model.manyicl_rope_scaling = rope_scaling  # From where save_model takes it for manyicl.json.
    return model, _load_plain_tokenizer(source, trust_remote_code)


def _scale_rope(source: str, config: Any, scaling: dict[str, Any]) -> None:
    """Change a config so that its model has more positions, rotary angles scaled as asked.

    Raises:
        ModelError: the scaling is none of ours, or the model's angles are scaled already or differ from layer to layer.
    """
    factor = scaling.get("factor")
    if scaling.get("rope_type") not in _ROPE_SCALINGS or not isinstance(factor, (int, float)) or not 1 < factor < float("inf"):
        raise ModelError(
            f"rope_scaling = {scaling}: give a rope_type ({' or '.join(_ROPE_SCALINGS)}) and a factor above 1, "
            "{rope_type: yarn, factor: 4.0} for instance."
        )
    text = config.get_text_config()
    own = getattr(text, "rope_parameters", None) or {}
    if own.get("rope_type") != "default":
        raise ModelError(f"{source}: its rope_parameters are {own}, which rope_scaling cannot scale further. Leave it out.")
    positions = text.max_position_embeddings
    # transformers 5.23 warns of this key where the type is linear, which does not use it.
    original = {} if scaling["rope_type"] == "linear" else {"original_max_position_embeddings": positions}
    text.rope_parameters = own | original | scaling
    text.max_position_embeddings = int(positions * factor)


def _load_plain_tokenizer(source: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    with loading_errors(source):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{source}: its tokenizer has no end token (eos_token), which ends every answer. Add one to the tokenizer."
        )
    return tokenizer


def _fingerprint(folder: Path | None, seed: str) -> str:
    """SHA-256 over a folder's weights, adapter, config and tokenizer files, or a hub id's name and revision."""
    digest = hashlib.sha256(seed.encode() if folder is None or (folder / "adapter_config.json").is_file() else b"")
    for path in sorted(folder.iterdir()) if folder is not None else ():
        if path.suffix in (".safetensors", ".jinja", ".model", ".txt") or path.name in _FINGERPRINTED:
            digest.update(f"{path.name}:{hash_file(path)}\n".encode())
    return digest.hexdigest()
