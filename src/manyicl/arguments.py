"""TrainingArguments of a recipe: what its training section says, and what may stand beside that under `training.trainer`.

In: the section `training`. Out: transformers' own arguments, the processes of the run joined. Whatever could not be resumed,
contradicts a key of the recipe, or would silently be something else on this machine is an error.
"""

import os
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from accelerate import ParallelismConfig
from transformers import TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from manyicl.accelerators import choose_kernels
from manyicl.config import TrainingConfig
from manyicl.dtypes import resolve_dtype
from manyicl.errors import RecipeError
from manyicl.process_group import DEFAULT_TIMEOUT_SECONDS, join_processes, naming_lost_processes, place_among_processes

# Options of TrainingArguments that a recipe sets by a key of its own; `training.trainer` may not contradict it.
_RECIPE_KEYS = {
    "output_dir": "output",
    "seed": "seed",
    "max_steps": "training.num_steps",
    "num_train_epochs": "training.num_steps",
    "per_device_train_batch_size": "training.rows_per_device",
    "gradient_accumulation_steps": "training.rows_per_step",
    "learning_rate": "training.learning_rate",
    "warmup_steps": "training.warmup_ratio",
    "save_total_limit": "training.keep_checkpoints",
    "lr_scheduler_type": "training.schedule",
    "weight_decay": "training.weight_decay",
    "max_grad_norm": "training.max_grad_norm",
    "activation_checkpointing": "training.gradient_checkpointing",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "bf16": "training.dtype",
    "fp16": "training.dtype",
    "logging_steps": "training.log_every",
    "save_steps": "training.save_every",
    "eval_steps": "training.save_every",
    "eval_strategy": "training.validate_checkpoints",
    "load_best_model_at_end": "training.validate_checkpoints",
    "report_to": "training.report_to",
    "use_liger_kernel": "training.kernels",
    "liger_kernel_config": "training.kernels",
}
# Options that would let --resume go on with other weights than an uninterrupted run has.
_BREAK_RESUMING = ("save_only_model", "ignore_data_skip")
# Options that share a model or a row out over processes, and the variables by which `accelerate launch` asks for the same.
_SHARING = {
    "fsdp": "ACCELERATE_USE_FSDP",
    "deepspeed": "ACCELERATE_USE_DEEPSPEED",
    "parallelism_config": "ACCELERATE_USE_PARALLELISM_CONFIG",
}
_PARALLEL_SIZES = ("dp_replicate_size", "dp_shard_size", "cp_size")


def training_arguments(training: TrainingConfig, folder: Path, *, seed: int, validate: bool) -> TrainingArguments:
    """TrainingArguments of a recipe's section, extended by its `trainer` mapping; joins the processes that torchrun started.

    Args:
        folder: Where checkpoints go; nothing is written yet.
        validate: Whether there are validation rows, which choose the checkpoint that is kept.

    Raises:
        RecipeError: an option is unknown or set twice, a value is refused, the rows of a step cannot be shared out, or an option
            that shares the model out would do nothing on this machine.
        ModelError: the processor lacks the dtype.
        ManyICLError: another process did not come.
    """
    _check_options(training)
    _check_sharing(training)
    try:
        callbacks = get_reporting_integration_callbacks(training.report_to)
        for callback in callbacks:
            callback()
        values, options = _argument_values(training, folder, seed, validate=validate), dict(training.trainer)
        if options.get("parallelism_config"):
            options["parallelism_config"] = ParallelismConfig(**options["parallelism_config"])
        with naming_lost_processes():
            join_processes(float(options.get("ddp_timeout", DEFAULT_TIMEOUT_SECONDS)))
            arguments = TrainingArguments(**values, **options)
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        raise RecipeError(f"training: {error} Correct the recipe, or install what is missing.") from error
    if arguments.n_gpu > 1:
        raise RecipeError(
            f"{arguments.n_gpu} GPUs are visible to one process. Start one process each (torchrun --nproc-per-node "
            f"{arguments.n_gpu}), or show one with CUDA_VISIBLE_DEVICES=0."
        )
    _check_deepspeed(getattr(arguments, "hf_deepspeed_config", None))
    return arguments


def context_parallel_size(training: TrainingConfig) -> int:
    """Processes that share each row between them, a part of its tokens each; 1 without context parallelism.

    Raises:
        RecipeError: the recipe asks for a parallelism that is not offered.
    """
    sizes = training.trainer.get("parallelism_config") or {}
    is_mapping = isinstance(sizes, dict) and sizes.keys() <= set(_PARALLEL_SIZES)
    if not (is_mapping and all(isinstance(size, int) and size >= 1 for size in sizes.values())):
        raise RecipeError(
            f"training.trainer.parallelism_config = {sizes!r}: only a mapping of {', '.join(_PARALLEL_SIZES)} to whole numbers "
            "from 1 is offered. Leave the rest out."
        )
    return int(sizes.get("cp_size", 1))


def _check_options(training: TrainingConfig) -> None:
    known = signature(TrainingArguments).parameters
    for name in training.trainer:
        if name not in known:
            nearest = get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise RecipeError(f"training.trainer: TrainingArguments has no {name!r}; the nearest is {nearest!r}.")
        if name in _BREAK_RESUMING:
            raise RecipeError(f"training.trainer sets {name!r}, with which a run could not be resumed exactly. Leave it out.")
        if name in _RECIPE_KEYS:
            raise RecipeError(f"training.trainer sets {name!r}, for which a recipe has a key of its own: {_RECIPE_KEYS[name]}.")


def _check_sharing(training: TrainingConfig) -> None:
    """Refuse what Accelerate (1.15) passes over in silence: FSDP, DeepSpeed and context parallelism without GPUs."""
    for name, variable in _SHARING.items():
        in_recipe = bool(training.trainer.get(name))
        if not in_recipe and os.environ.get(variable, "").lower() not in ("1", "true"):
            continue
        asked = f"training.trainer.{name}" if in_recipe else f"{variable} (accelerate launch)"
        if not torch.cuda.is_available():
            raise RecipeError(
                f"{asked} is set, but Accelerate shares models out over GPUs only, and this machine has none: each process "
                "would silently hold the whole model. Leave it out, or train on GPUs."
            )
        if name != "deepspeed" and place_among_processes()[1] == 1:
            raise RecipeError(f"{asked} is set, but this is the only process. Start one per GPU: torchrun --nproc-per-node N …")
    if context_parallel_size(training) > 1 and not training.trainer.get("fsdp"):
        raise RecipeError("training.trainer.parallelism_config.cp_size needs training.trainer.fsdp: true beside it. Add that.")


def _check_deepspeed(config: Any) -> None:
    """Whether DeepSpeed's stage 3, if that is asked for, will give the weights back at the end."""
    name = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    if config is not None and config.is_zero3() and not config.is_true(name):
        raise RecipeError(f"training.trainer.deepspeed: without {name}: true the tuned weights could not be saved. Set it.")


def _argument_values(training: TrainingConfig, folder: Path, seed: int, *, validate: bool) -> dict[str, Any]:
    """What a recipe's section says, in the words of TrainingArguments."""
    # transformers renamed the option after 5.19 and warns about the old name, which can go with support for 5.19.
    renamed = "activation_checkpointing" in signature(TrainingArguments).parameters
    checkpointing = "activation_checkpointing" if renamed else "gradient_checkpointing"
    return {
        "output_dir": str(folder),
        "max_steps": training.num_steps,
        "per_device_train_batch_size": training.rows_per_device,
        "gradient_accumulation_steps": _passes_per_step(training),
        "learning_rate": training.learning_rate,
        "warmup_steps": round(training.warmup_ratio * training.num_steps),
        "lr_scheduler_type": training.schedule,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        checkpointing: training.gradient_checkpointing,
        # Whole weights stay fp32 and are cast in each pass; a LoRA base is loaded in its type.
        "bf16": training.tune == "full" and resolve_dtype(training.dtype) is torch.bfloat16,
        "logging_steps": training.log_every,
        "save_strategy": "steps",
        "save_steps": training.save_every,
        "save_total_limit": training.keep_checkpoints,
        "eval_strategy": "steps" if validate else "no",
        "eval_steps": training.save_every,
        "load_best_model_at_end": validate,
        "metric_for_best_model": "eval_loss" if validate else None,
        "greater_is_better": False if validate else None,
        "remove_unused_columns": False,
        "report_to": training.report_to or "none",
        "seed": seed,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
    } | choose_kernels(training).trainer_options()


def _passes_per_step(training: TrainingConfig) -> int:
    """Forward passes of one process in an optimizer update.

    Raises:
        RecipeError: the rows of an update are no multiple of those that all processes feed at once.
    """
    _, num_processes = place_among_processes()
    num_sharing = context_parallel_size(training)
    if num_processes % num_sharing:
        raise RecipeError(
            f"{num_processes} process(es) cannot share rows in groups of parallelism_config.cp_size = {num_sharing}. Change one."
        )
    rows_at_once = training.rows_per_device * num_processes // num_sharing
    if training.rows_per_step % rows_at_once:
        raise RecipeError(
            f"training.rows_per_step = {training.rows_per_step} is no multiple of {rows_at_once}, the rows that {num_processes} "
            f"process(es) of training.rows_per_device = {training.rows_per_device} feed at once. Change one of them."
        )
    return training.rows_per_step // rows_at_once
