"""Memory of one device while it trains, forecast by part; nothing is allocated.

The peak is the largest of three moments (bytes; the base of LoRA has e bytes a weight, weights that are trained have 4):

    loss     weights + optimizer + activations + logits             all layers' activations, and the logits of one chunk
    layers   weights + optimizer + activations + work of one layer  where gradients flow back through the layers
    update   weights + optimizer + gradients                        the activations are gone

    a layer keeps of a token, LoRA   e · (4C + 2HD + 2KD + 3I + 7r) + 4H
        states (2C) and norms (2C), query and output (2HD), key and value (2KD), gate, up and their product (3I), x Aᵀ of
        seven adapters (7r), log-sum-exp (4H); an input that no adapter reads is not kept
    a layer keeps of a token, full   16C + 5eC + e · (2HD + 2KD + 3I) + 4H        (in fp32 8C in place of 5eC)
    with training.kernels none       LoRA: 8C + e · (2HD + 2KD + 3I) + 4H, and 4 · (inputs + r) for each adapter; full: eI more
    gradient checkpointing           C numbers a layer and token, and one layer's of the above in the second moment
    logits                           12 · V · positions of a chunk, 512 at most: three fp32 matrices
    work of one layer                6eI a token: the backward pass of the gated layer
    holes of the heap                on processors: 0.2 of the activations, and 5 times the work of one layer
    optimizer, gradients             8 and 4 a trained weight (AdamW)

Gradients appear as activations go, so an update of one pass never holds both whole; one of several passes does. A mask (a
window in use, or padded or packed rows where our kernel is absent) costs eT a token and layer, and keys and values of every
head; soft-capped attention keeps its scores, 8HT a token and layer. Full weights in bf16 have copies of e bytes. FSDP divides
weights, gradients and optimizer by the number of devices, and holds the embeddings and two layers whole; DDP has a second copy
of the gradients. Devices that share a row divide its tokens.

Letters: N layers, C hidden size, H heads, K key-value heads, D head size, I inner size, V vocabulary, r rank, T tokens of a row,
e bytes of a number in the training dtype.
"""

import logging
import math
import os
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from manyicl import planning
from manyicl.config import Recipe
from manyicl.dtypes import resolve_dtype
from manyicl.errors import ModelError
from manyicl.objective import CHUNK_POSITIONS
from manyicl.training_plan.jobs import MASTER_BYTES, TrainingJob, read_decoder, read_layout

logger = logging.getLogger(__name__)

# Constants, measured on a processor (benchmarks/planning.py): what torch's libraries, threads and buffers take with the first
# pass, and the free blocks of the heap that are too small for what comes next, as a share of what is kept, and as multiples of
# the work of one layer. glibc before 2.38 leaves many: an aligned block never fits the hole of another of its size.
CPU_RUNTIME_BYTES = 70_000_000
CPU_HOLES_OF_KEPT = 0.2
CPU_HOLES_OF_WORK = 5
# Assumed: CUDA's context, workspaces of libraries, rounding of the allocator.
GPU_RUNTIME_BYTES = 1_500_000_000

_LOGITS_BYTES = 12
_OPTIMIZER_BYTES = 8
_LAYER_WORK = 6
_ROW_STEP = 128


@dataclass(frozen=True, slots=True)
class MemoryParts:
    """Bytes of one device at one moment, by what they are for."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(getattr(self, part.name) for part in fields(self))


def forecast_memory(job: TrainingJob) -> dict[str, MemoryParts]:
    """Memory of one device at each of the moments at which it may be highest: loss, layers, update.

    Raises:
        RecipeError: the devices or the rows cannot be shared out.
    """
    shape, size = job.decoder.shape, job.dtype.itemsize
    trained = MASTER_BYTES * job.num_trained // job.shards
    fixed = MemoryParts(
        weights=job.loaded_bytes + (0 if job.is_full else trained),
        gradients=trained if job.num_passes > 1 else 0,
        optimizer=_OPTIMIZER_BYTES * job.num_trained // job.shards,
        other=_standing_bytes(job),
    )
    layer = job.tokens * _layer_bytes(job)
    state = job.tokens * shape.hidden_size * (MASTER_BYTES if job.is_full else size)
    checkpointing = job.recipe.training.gradient_checkpointing
    kept = state + shape.num_layers * (state if checkpointing else layer)
    again = kept + (layer if checkpointing else 0)
    head = MASTER_BYTES * shape.vocabulary_size * shape.hidden_size // job.shards if job.is_full else 0
    work = _LAYER_WORK * size * shape.inner_size * job.tokens
    holes = int(CPU_HOLES_OF_KEPT * again) + CPU_HOLES_OF_WORK * work if job.on_cpu else 0
    other = fixed.other + holes
    return {
        "loss": replace(fixed, activations=kept, logits=_logits_bytes(job), other=other),
        "layers": replace(fixed, gradients=fixed.gradients or head, activations=again, other=other + work),
        "update": replace(fixed, gradients=trained),
    }


def peak_bytes(job: TrainingJob) -> int:
    """Bytes of one device at its highest moment."""
    return max(parts.total for parts in forecast_memory(job).values())


def _layer_bytes(job: TrainingJob) -> int:
    """Bytes that one decoder layer keeps of one token until its backward pass; see the module for the formula."""
    shape, size, tokens = job.decoder.shape, job.dtype.itemsize, job.recipe.episodes.max_tokens
    hidden, inner, heads = shape.hidden_size, shape.inner_size, shape.num_heads * shape.head_size
    keys = heads if job.has_mask else shape.num_key_value_heads * shape.head_size
    kept = size * (2 * heads + 2 * keys) + 4 * shape.num_heads
    kept += size * tokens if job.has_mask else 0
    kept += 8 * shape.num_heads * tokens if job.decoder.keeps_scores else 0
    is_lean = job.recipe.training.kernels != "none"
    if job.is_full:
        inputs = 8 * hidden if size == MASTER_BYTES else 5 * size * hidden
        return kept + 16 * hidden + inputs + (3 if is_lean else 4) * size * inner
    states = size * (2 * hidden + 2 * inner) if is_lean else 8 * hidden + 3 * size * inner
    return kept + states + _adapter_bytes(job)


def _adapter_bytes(job: TrainingJob) -> int:
    """What the adapters of one layer keep of one token: their inputs, and x Aᵀ."""
    shape, size, lora, adapted = job.decoder.shape, job.dtype.itemsize, job.recipe.training.lora, job.adapted
    if lora.dropout:  # PEFT's own layer: an fp32 copy of its input after dropout, the dropout's mask, and x Aᵀ in fp32.
        return MASTER_BYTES * sum(2 * size_in + lora.rank for size_in, _ in adapted.values())
    if job.recipe.training.kernels == "none" and size < MASTER_BYTES:
        return MASTER_BYTES * sum(size_in + lora.rank for size_in, _ in adapted.values())
    norms = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
    inputs = shape.hidden_size * sum(not adapted.keys().isdisjoint(readers) for readers in norms)
    inputs += shape.inner_size if "down_proj" in adapted else 0
    return size * (inputs + lora.rank * len(adapted))


def _logits_bytes(job: TrainingJob) -> int:
    """Bytes of logits, their log-softmax and its gradient at once."""
    rows = job.recipe.training.rows_per_device
    # Every row of a pass computes the positions at which any of them has a target.
    targets = rows * math.ceil(job.row_targets / job.layout.context_parallel)
    positions = rows * min(job.row_tokens, targets)
    if not job.decoder.keeps_logits:
        positions = min(positions, CHUNK_POSITIONS)
    return _LOGITS_BYTES * positions * job.decoder.shape.vocabulary_size


def _standing_bytes(job: TrainingJob) -> int:
    """Bytes of no other part: the runtime, copies of weights in the training dtype, and what DDP and FSDP hold beside."""
    decoder, size = job.decoder, job.dtype.itemsize
    runtime = CPU_RUNTIME_BYTES if job.on_cpu else GPU_RUNTIME_BYTES
    if job.layout.is_sharded:
        return runtime + size * (decoder.num_embedding_weights + 2 * decoder.shape.weights_per_layer)
    if job.is_full and size < MASTER_BYTES:
        runtime += size * (decoder.num_linear_weights + decoder.shape.vocabulary_size * decoder.shape.hidden_size)
    return runtime + (MASTER_BYTES * job.num_trained if job.layout.num_devices > 1 else 0)


def suggest_changes(job: TrainingJob, limit_bytes: int) -> dict[str, TrainingJob]:
    """Single changes of the recipe that lower the peak, by how they are written; the longest row that fits comes last."""
    training, changes = job.recipe.training, {}
    if not training.gradient_checkpointing:
        changes["training.gradient_checkpointing=true"] = job.changed("training", gradient_checkpointing=True)
    if training.rows_per_device > 1:
        changes["training.rows_per_device=1"] = job.changed("training", rows_per_device=1)
    low, high = 0, job.recipe.episodes.max_tokens // _ROW_STEP
    while low < high:
        middle = (low + high + 1) // 2
        fits = peak_bytes(job.changed("episodes", max_tokens=middle * _ROW_STEP)) <= limit_bytes
        low, high = (middle, high) if fits else (low, middle - 1)
    if low:
        changes[f"episodes.max_tokens={low * _ROW_STEP}"] = job.changed("episodes", max_tokens=low * _ROW_STEP)
    return changes


def check_training_memory(recipe: Recipe, config: Any, *, row_tokens: int, device: torch.device, num_processes: int = 1) -> None:
    """Refuse to train with less memory than the forecast says, after the model is loaded and before the first update.

    Args:
        row_tokens: Tokens of the longest row that is known of; tasks with few examples do not fill `episodes.max_tokens`.
        num_processes: Processes of the run; those on one machine share a processor's memory.

    Raises:
        BudgetError: less is available than the run needs, on a processor beyond the loaded model.
    """
    try:
        decoder = read_decoder(recipe.model, config)
    except ModelError as error:
        logger.info("the memory of training is not forecast: %s", error)
        return
    is_cpu = device.type == "cpu"
    layout = read_layout(recipe, num_processes)
    job = TrainingJob(recipe, decoder, resolve_dtype(recipe.training.dtype), layout, on_cpu=is_cpu)
    job = job.changed("episodes", max_tokens=row_tokens)
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if is_cpu else 1  # As torchrun says it.
    held = job.loaded_bytes if is_cpu else 0  # The trainer moves the model, or its shard, to a GPU only later.
    available = planning.available_bytes(device)
    changes = {} if available is None else suggest_changes(job, available // sharing + held)
    sizes = {words: planning.show_bytes(sharing * (peak_bytes(each) - held)) for words, each in changes.items()}
    listed = " or ".join(f"{words} ({shown})" for words, shown in sizes.items())
    together = f" in {sharing} processes" if sharing > 1 else ""
    beside = ", beside the loaded model," if is_cpu else ""
    planning.check_memory(
        sharing * (peak_bytes(job) - held),
        purpose=f"training on rows of {row_tokens:,} tokens{together}{beside}",
        remedy=f"Set {listed}." if listed else "No change of the recipe is enough: free memory, or take a smaller model.",
        device=device,
    )
