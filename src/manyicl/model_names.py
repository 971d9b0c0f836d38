"""What a model's name means: `default`, a folder, a `.gguf` file, a finished run's folder, or a hub id."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from manyicl.config import missing_run_hint
from manyicl.default_model import DEFAULT_NOTE, default_model_folder, gguf_model_folder
from manyicl.errors import ModelError

RUN_FILE = "manyicl.json"
# Files of a hub repository that an adapter is loaded from.
_ADAPTER_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "adapter_model.safetensors"]


def locate_model(name: str) -> tuple[Path | None, str]:
    """The folder of a model and its note; no folder for a whole model of the hub.

    Raises:
        ModelError: there is no such file or folder, or it holds no model, or a run that has not finished.
    """
    if name == "default":
        return default_model_folder(), DEFAULT_NOTE
    path = Path(name)
    if name.endswith(".gguf"):
        if not path.is_file():
            raise ModelError(f"{name}: no such file. Give the path of a .gguf file.")
        return gguf_model_folder(path), f"dequantised from {path.name}"
    if not path.is_dir():
        if _is_path(name):
            raise ModelError(  # Before the hub is asked: without a network that takes half a minute.
                f"{name}: there is no such folder in {path.parent.resolve()}. Give `default`, a folder, a .gguf file, a finished "
                "run's folder, or a hub id whose first part is no folder here."
            )
        adapter = _hub_adapter(name)
        if adapter is None:
            return None, ""
        path = adapter
    if (path / "adapter_config.json").is_file():
        if not (path / "adapter_model.safetensors").is_file():
            raise ModelError(
                f"{name}: holds an adapter_config.json without adapter_model.safetensors. Give a finished run's folder."
            )
        return path, ""
    if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
        hint = missing_run_hint(path, otherwise="Give a model's or a finished run's folder.")
        raise ModelError(f"{name}: holds no model (config.json and *.safetensors). {hint}")
    return path, ""


def _is_path(name: str) -> bool:
    """Whether a name can mean only a path: it is no owner/name of the hub, or there is a folder of the owner's name here."""
    parts = Path(name).parts
    return name.startswith((".", "/")) or len(parts) > 2 or (len(parts) == 2 and Path(parts[0]).is_dir())


def _hub_adapter(name: str) -> Path | None:
    """The local copy of a hub repository that holds an adapter; None for a whole model and for what cannot be reached."""
    if hub_file(name, "adapter_config.json") is None:
        return None
    from huggingface_hub import snapshot_download

    with loading_errors(name):
        return Path(snapshot_download(name, allow_patterns=_ADAPTER_FILES, ignore_patterns=["*/*"]))


def hub_file(name: str, file: str) -> Path | None:
    """A file of a hub repository, downloaded when it is not here; None where there is no such file or repository."""
    from huggingface_hub import hf_hub_download

    try:
        with bars_on_terminals_only():
            return Path(hf_hub_download(name, file))
    except (OSError, ValueError):  # Of every kind; what cannot be reached is said when the model itself is loaded.
        return None


def read_adapter_run(name: str, folder: Path) -> dict[str, Any]:
    """What an adapter's folder says, its base looked for.

    Raises:
        ModelError: see `read_run_file`; or its base is a folder that is not here.
    """
    run = read_run_file(folder)
    base = Path(str(run["base"]))
    if base.is_absolute() and not base.exists():
        raise ModelError(
            f"{name}: its base model is the folder {base}, which is not on this machine. Put the model there, or write where it "
            f'stands (a folder or a hub id) as "base" into {folder / RUN_FILE}; an exported model needs no base.'
        )
    return run


def read_run_file(folder: Path) -> dict[str, Any]:
    """What manyicl.json says, for a checkpoint that of its run; for adapters of other tools, their own base model.

    Raises:
        ModelError: the file is broken, or names no base model.
    """
    candidates = [folder / RUN_FILE]
    if folder.parent.name == "checkpoints":
        candidates.append(folder.parent.parent / RUN_FILE)
    path = next((each for each in candidates if each.is_file()), folder / "adapter_config.json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        base = content["base" if path.name == RUN_FILE else "base_model_name_or_path"]
        facts = {"note": "", "format": "plain", "rope_scaling": None}
        return {"base": base} | {name: content.get(name, default) for name, default in facts.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{path}: says no base model ({error!r}). Give the folder of a finished run or of a whole model."
        ) from error


@contextmanager
def bars_on_terminals_only() -> Iterator[None]:
    """Inside the block transformers draws progress bars only on a terminal, as its own switch is process-wide."""
    if sys.stderr.isatty() or not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()


@contextmanager
def loading_errors(source: str) -> Iterator[None]:
    """Turn what transformers raises for an unknown or broken model into a ModelError."""
    try:
        with bars_on_terminals_only():
            yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(
            f"{source}: cannot be loaded as a causal language model: {first_line} "
            "Give `default`, a folder, a hub id that can be reached, a .gguf file or a finished run's folder."
        ) from error
