"""Versions name the libraries, and on a processor what bf16 attention runs on there."""

import platform

import pytest
import torch

from manyicl import versions
from manyicl.versions import library_versions


def test_libraries_the_processor_and_its_attention_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(versions, "find_instructions", lambda: "amx")
    found = library_versions()
    assert set(found) == {"manyicl", "transformers", "peft", "accelerate", "torch", "python", "cpu", "cpu_attention"}
    assert (found["torch"], found["python"]) == (torch.__version__, platform.python_version())
    assert found["cpu_attention"] == "amx"


def test_without_a_kernel_attention_runs_on_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(versions, "find_instructions", lambda: None)
    assert library_versions()["cpu_attention"] == "torch"


def test_on_a_gpu_the_processors_attention_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "cpu_attention" not in library_versions()
