"""What one device has to do in a run: a recipe on a decoder's sizes, in a dtype, spread over devices."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from manyicl.config import Recipe
from manyicl.errors import RecipeError
from manyicl.kernels import cpu_attention
from manyicl.planning import ModelShape, prefill_operations, read_shape

MASTER_BYTES = 4
TARGET_SHARE = 0.1  # Assumed: tokens of a row that are targets.


@dataclass(frozen=True, slots=True)
class Decoder:
    """What a forecast knows of a model.

    Attributes:
        is_tied: Whether embeddings and output head are one matrix.
        keeps_scores: Whether attention is soft-capped, for which every score is held.
        keeps_logits: Whether logits are altered after the head, so that those of all targets exist at once.
        window: Tokens that a layer with a sliding window sees; None without one.
        num_positions: Positions of the model; None where that is not known.
    """

    name: str
    shape: ModelShape
    is_tied: bool
    keeps_scores: bool = False
    keeps_logits: bool = False
    window: int | None = None
    num_positions: int | None = None

    @property
    def num_linear_weights(self) -> int:
        """Weights of the linear layers of all decoder layers."""
        return self.shape.num_layers * self.shape.weights_per_layer

    @property
    def num_embedding_weights(self) -> int:
        """Weights of the embeddings and of the output head."""
        return (1 if self.is_tied else 2) * self.shape.vocabulary_size * self.shape.hidden_size

    @property
    def num_parameters(self) -> int:
        """All weights, with two norms a layer and one behind them; biases are not counted."""
        norms = (2 * self.shape.num_layers + 1) * self.shape.hidden_size
        return self.num_linear_weights + self.num_embedding_weights + norms

    def linear_sizes(self) -> dict[str, tuple[int, int]]:
        """(in, out) features of the linear layers of one decoder layer, by name."""
        shape = self.shape
        hidden, inner = shape.hidden_size, shape.inner_size
        query, keys = shape.num_heads * shape.head_size, shape.num_key_value_heads * shape.head_size
        attention = {"q_proj": (hidden, query), "k_proj": (hidden, keys), "v_proj": (hidden, keys), "o_proj": (query, hidden)}
        return attention | {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}


# Published sizes: layers, heads, key-value heads, head size, hidden, inner, vocabulary. Llama 3 and 3.1 have the same.
PUBLISHED = {
    "llama3-8b": Decoder("llama3-8b", ModelShape(32, 32, 8, 128, 4096, 14336, 128256), is_tied=False),
    "llama3-70b": Decoder("llama3-70b", ModelShape(80, 64, 8, 128, 8192, 28672, 128256), is_tied=False),
    "mistral-7b": Decoder("mistral-7b", ModelShape(32, 32, 8, 128, 4096, 14336, 32000), is_tied=False),
    "gemma-7b": Decoder("gemma-7b", ModelShape(28, 16, 16, 256, 3072, 24576, 256000), is_tied=True),
}


def read_decoder(name: str, config: Any) -> Decoder:
    """What a transformers config says of a decoder.

    Raises:
        ModelError: sizes are missing, or the layers are not of Llama's kind.
    """
    prefill_operations(config, 1)  # Raises where the work of a layer does not follow from the config.
    text = config.get_text_config()
    uses_window = getattr(text, "use_sliding_window", True)  # Qwen's configs state a window that they do not use.
    return Decoder(
        name,
        read_shape(config),
        is_tied=bool(getattr(text, "tie_word_embeddings", False)),
        keeps_scores=bool(getattr(text, "attn_logit_softcapping", None)),
        keeps_logits=any(getattr(text, each, None) for each in ("final_logit_softcapping", "logit_scale", "logits_scaling")),
        window=getattr(text, "sliding_window", None) if uses_window else None,
        num_positions=getattr(text, "max_position_embeddings", None),
    )


@dataclass(frozen=True, slots=True)
class Layout:
    """How a run is spread over devices.

    Attributes:
        is_sharded: Whether weights, gradients and optimizer are divided among all devices (FSDP), or each has its own (DDP).
        context_parallel: Devices that share a row.
    """

    num_devices: int = 1
    is_sharded: bool = False
    context_parallel: int = 1


ONE_DEVICE = Layout()


def read_layout(recipe: Recipe, num_devices: int) -> Layout:
    """The layout that a recipe asks of transformers, under `training.trainer`: fsdp, deepspeed, parallelism_config.

    Raises:
        RecipeError: the number of devices that share a row is none.
    """
    trainer = recipe.training.trainer
    sizes = trainer.get("parallelism_config")
    context_parallel = sizes.get("cp_size", 1) if isinstance(sizes, dict) else 1
    if not isinstance(context_parallel, int) or context_parallel < 1:
        raise RecipeError(f"training.trainer.parallelism_config.cp_size = {context_parallel!r}. Give a whole number from 1.")
    return Layout(num_devices, bool(trainer.get("fsdp") or trainer.get("deepspeed")), context_parallel)


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """A recipe on a model, in a dtype and a layout; its properties say what follows for one device."""

    recipe: Recipe
    decoder: Decoder
    dtype: torch.dtype
    layout: Layout = ONE_DEVICE
    target_share: float = TARGET_SHARE
    on_cpu: bool = False

    @property
    def is_full(self) -> bool:
        """Whether all weights are trained."""
        return self.recipe.training.tune == "full"

    @property
    def row_tokens(self) -> int:
        """Tokens of a row on this device."""
        return math.ceil(self.recipe.episodes.max_tokens / self.layout.context_parallel)

    @property
    def tokens(self) -> int:
        """Tokens of a pass on this device."""
        return self.row_tokens * self.recipe.training.rows_per_device

    @property
    def row_targets(self) -> int:
        """Target tokens of a whole row."""
        return max(1, round(self.target_share * self.recipe.episodes.max_tokens))

    @property
    def num_passes(self) -> int:
        """Passes of a device in an update.

        Raises:
            RecipeError: the devices or the rows cannot be shared out.
        """
        layout, training = self.layout, self.recipe.training
        if layout.num_devices % layout.context_parallel:
            raise RecipeError(
                f"{layout.num_devices} device(s) cannot be put into groups of {layout.context_parallel} that share a row. "
                "Change --devices or --context-parallel."
            )
        at_once = training.rows_per_device * layout.num_devices // layout.context_parallel
        if training.rows_per_step % at_once:
            raise RecipeError(
                f"training.rows_per_step = {training.rows_per_step} is no multiple of {at_once}, the rows that "
                f"{layout.num_devices} device(s) feed at once. Plan with training.rows_per_step={at_once}, for instance."
            )
        return training.rows_per_step // at_once

    @property
    def adapted(self) -> dict[str, tuple[int, int]]:
        """Linear layers of a decoder layer that have adapters; all seven where a target has another name than Llama's."""
        sizes, targets = self.decoder.linear_sizes(), self.recipe.training.lora.targets
        if self.is_full:
            return {}
        return {name: sizes[name] for name in targets} if isinstance(targets, list) and set(targets) <= sizes.keys() else sizes

    @property
    def num_adapter_weights(self) -> int:
        """Weights of all adapters."""
        features = sum(size_in + size_out for size_in, size_out in self.adapted.values())
        return self.decoder.shape.num_layers * self.recipe.training.lora.rank * features

    @property
    def num_trained(self) -> int:
        """Weights that are trained."""
        return self.decoder.num_parameters if self.is_full else self.num_adapter_weights

    @property
    def loaded_bytes(self) -> int:
        """Bytes of the model as it is loaded on a device, without adapters; a device's part of them where it is sharded."""
        size = MASTER_BYTES if self.is_full else self.dtype.itemsize
        return size * self.decoder.num_parameters // self.shards

    @property
    def shards(self) -> int:
        """Parts into which weights, gradients and optimizer are divided."""
        return self.layout.num_devices if self.layout.is_sharded else 1

    @property
    def has_mask(self) -> bool:
        """Whether attention takes a mask: a window is shorter than rows, or they are padded or packed without our kernel."""
        window, training = self.decoder.window, self.recipe.training
        if window is not None and window < self.recipe.episodes.max_tokens:
            return True
        takes_sequences = self.on_cpu and self.dtype == torch.bfloat16 and training.kernels != "none"
        is_split = training.rows_per_device > 1 or self.recipe.episodes.pack
        return is_split and not (takes_sequences and cpu_attention.is_available())

    def changed(self, section: str, **values: Any) -> "TrainingJob":
        """The job with other values in a section of its recipe."""
        section_with = getattr(self.recipe, section).model_copy(update=values)
        return replace(self, recipe=self.recipe.model_copy(update={section: section_with}))
