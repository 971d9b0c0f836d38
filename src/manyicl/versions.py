"""Versions of libraries, and what attention runs on; run.json, records and cells of a study state them."""

import importlib.metadata
import platform

import torch

from manyicl.kernels.cpu_attention import find_instructions


def library_versions() -> dict[str, str]:
    """Versions of libraries, the processor's capability, and where there is no GPU, what bf16 attention runs on there.

    Weights differ in the last digits between instructions, and after a training in more than those.
    """
    names = ("manyicl", "transformers", "peft", "accelerate")
    versions = {name: importlib.metadata.version(name) for name in names}
    # With its build, such as +cpu, which a wheel's metadata may leave out.
    versions |= {"torch": torch.__version__, "python": platform.python_version(), "cpu": torch.backends.cpu.get_cpu_capability()}
    return versions if torch.cuda.is_available() else versions | {"cpu_attention": find_instructions() or "torch"}
