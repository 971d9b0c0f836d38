"""Which kernels training uses: chosen from the device, the type of the weights and the packages that are there.

In: `training.kernels` of a recipe. Out: the name of an attention implementation and options for TrainingArguments. Only looks
whether packages are installed, and imports none.

    device  installed          attention          layers
    cpu     anything           our own            ours, which keep fewer activations
    cuda    FlashAttention 3   flash_attention_3  ours; Liger's, where liger-kernel is installed
    cuda    FlashAttention 2   flash_attention_2  the same
    cuda    neither            our own            the same

Our own attention is torch's SDPA off the CPU, and right for models that cap their scores. FlashAttention takes bf16 and fp16
weights alone, so not those of `tune: full`, which are fp32. Liger's losses stay off: `objective` takes losses from the output
head itself. The rows for cuda are tested by what is chosen; they have not been run by this project, whose machines have no GPU.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available, is_liger_kernel_available

from manyicl.attention import IMPLEMENTATION, use_shared_prefix_attention
from manyicl.config import TrainingConfig
from manyicl.dtypes import resolve_dtype


@dataclass(frozen=True)
class Kernels:
    """What training runs on.

    Attributes:
        attention: Name of an attention implementation; None leaves the model, its layers too, as transformers loads it.
        liger: Whether Liger's layers are used.
    """

    attention: str | None = IMPLEMENTATION
    liger: bool = False

    def trainer_options(self) -> dict[str, Any]:
        """Options of TrainingArguments."""
        losses_off = {"cross_entropy": False, "fused_linear_cross_entropy": False}
        return {"use_liger_kernel": True, "liger_kernel_config": losses_off} if self.liger else {}


OWN_KERNELS = Kernels()


def choose_kernels(training: TrainingConfig) -> Kernels:
    """The kernels of a recipe on this machine.

    Raises:
        ModelError: the processor lacks the dtype.
    """
    dtype = resolve_dtype(training.dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return select_kernels(training.kernels, device=device, dtype=torch.float32 if training.tune == "full" else dtype)


def select_kernels(kernels: Literal["auto", "none"], *, device: str, dtype: torch.dtype) -> Kernels:
    """The kernels for a type of device and a type of the weights."""
    if kernels == "none":
        return Kernels(attention=None)
    if device != "cuda":
        return OWN_KERNELS
    attention = IMPLEMENTATION
    if dtype in (torch.bfloat16, torch.float16):
        if is_flash_attn_3_available():
            attention = "flash_attention_3"
        elif is_flash_attn_2_available():
            attention = "flash_attention_2"
    return Kernels(attention, liger=is_liger_kernel_available())


def use_attention(model: Any, kernels: Kernels) -> None:
    """Give a model, LoRA-wrapped or whole, the attention chosen; our own where it takes no FlashAttention.

    Our kernel for causal rows is several times faster than torch's on CPUs.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if kernels.attention == IMPLEMENTATION or not base._supports_flash_attn:
        use_shared_prefix_attention(base)
    else:
        base.set_attn_implementation(kernels.attention)
