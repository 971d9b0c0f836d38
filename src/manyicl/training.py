"""Training: transformers.Trainer with our rows, our loss and checkpoints that survive a kill.

In: a model (LoRA-wrapped or whole), a dataset of rows, and two sections of a recipe. Out: the trained model in place, and a
`TrainingResult`. The same call with `resume=True` after a SIGKILL gives bit-identical weights, given the same threads and
library versions. Started by torchrun, every process calls it with the same arguments; row i is fed once, whatever their
number, and only the main process writes checkpoints.
"""

import json
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from manyicl.accelerators import OWN_KERNELS, Kernels, choose_kernels, use_attention
from manyicl.activations import keep_fewer_activations
from manyicl.checkpoints import drop_old_checkpoints, newest_whole_checkpoint, seal_checkpoint
from manyicl.config import ObjectiveConfig, TrainingConfig
from manyicl.errors import CheckpointError, ManyICLError, RecipeError
from manyicl.files import storage_errors, write_json_atomic
from manyicl.modeling import bars_on_terminals_only, resolve_dtype
from manyicl.objective import NUM_SHOT_BUCKETS, answer_losses, count_units, head_can_return_losses, shot_bucket_names
from manyicl.packing import Row, RowDataset, collate

logger = logging.getLogger(__name__)

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


@dataclass
class Progress:
    """What a run has done so far; kept in its checkpoints."""

    tokens: int = 0
    answers: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class TrainingResult:
    """What a run did, in all its sittings.

    Attributes:
        tokens: Tokens fed, padding not counted, over all processes.
        answers: Answers that were targets or context, over all processes; with `all_answers` each was a target.
        seconds: Time spent in updates, without loading, checkpoints and validation.
        peak_memory_bytes: High-water mark of the main process.
        best_step: Update whose weights were kept, when checkpoints were validated; else the last.
        losses: Logged (update, loss) pairs.
        validation_losses: (update, loss) pairs of the checkpoints, when they were validated.
    """

    updates: int
    tokens: int
    answers: int
    seconds: float
    peak_memory_bytes: int
    best_step: int
    losses: list[tuple[int, float]] = field(default_factory=list)
    validation_losses: list[tuple[int, float]] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Tokens fed per second of updates."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def answers_per_second(self) -> float:
        """Answers per second of updates."""
        return self.answers / self.seconds if self.seconds else 0.0


class ManyShotTrainer(Trainer):
    """transformers.Trainer on rows, with the loss normalised over the whole optimizer step."""

    def __init__(self, *, objective: ObjectiveConfig, **options: Any) -> None:
        super().__init__(**options)
        self.objective: ObjectiveConfig = objective
        self.progress = Progress()
        self.in_head = head_can_return_losses(options["model"])
        # The loss is already divided by the units of all accumulated batches (read by the trainer's training_step).
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._shot_sums = torch.zeros(NUM_SHOT_BUCKETS)
        self._shot_counts = torch.zeros(NUM_SHOT_BUCKETS)

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)  # type: ignore[arg-type]

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor:
        """Units of the optimizer step, over accumulated batches and processes; transformers would count labels."""
        units = sum((count_units(batch, self.objective) for batch in batch_samples), torch.zeros((), dtype=torch.long))
        return self._sum_over_processes(units.to(device))

    def _sum_over_processes(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of each process's values; every process must come here."""
        if self.args.world_size == 1:
            return values
        gathered: torch.Tensor = self.accelerator.gather(values.unsqueeze(0))
        return gathered.sum(dim=0)

    def total_progress(self) -> Progress:
        """Progress of all processes together; every process must come here."""
        counts = self._sum_over_processes(torch.tensor([self.progress.tokens, self.progress.answers], device=self.args.device))
        return Progress(int(counts[0]), int(counts[1]), self.progress.seconds)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The batch's share of the step's mean loss; DDP averages gradients over processes, hence the factor."""
        losses = answer_losses(model, inputs, self.objective, in_head=self.in_head)
        self._shot_sums += losses.shot_sums.cpu()
        self._shot_counts += losses.shot_counts.cpu()
        share: torch.Tensor = losses.total / num_items_in_batch * self.args.world_size
        return share

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One forward and backward pass, counted."""
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._stop_unless_finite("loss", float(loss))
        self.progress.tokens += int((inputs["episode"] >= 0).sum())
        shot, episode = inputs["shot"], inputs["episode"]
        self.progress.answers += int(torch.stack([episode[shot >= 0], shot[shot >= 0]]).unique(dim=1).shape[1])
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The gradients' norm, looked at before the update: gradients that are not finite never reach the weights."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        self._stop_unless_finite("gradient norm", float(norm))
        return norm

    def _stop_unless_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise ManyICLError(
                f"the {name} is {value} at update {self.state.global_step + 1}. "
                "Lower training.learning_rate, or train in float32 (training.dtype)."
            )

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Mean token loss over every answer of the validation rows, the same for each objective."""
        config = ObjectiveConfig.model_validate({})
        model: Any = self.model
        rows: Any = self.eval_dataset
        model.eval()
        total, units = 0.0, 0
        with torch.no_grad():
            for row in rows:
                batch = self._prepare_inputs(to_tensors([row]))
                total += float(answer_losses(model, batch, config, in_head=self.in_head).total)
                units += int(count_units(batch, config))
        metrics = {"eval_loss": total / units}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the loss by shot index and the speed to what is logged."""
        if "loss" in logs:
            sums, counts = self._sum_over_processes(torch.stack([self._shot_sums, self._shot_counts]).to(self.args.device)).cpu()
            for name, total, count in zip(shot_bucket_names(), sums, counts, strict=True):
                if count:
                    logs[f"loss/shot_{name}"] = round(float(total / count), 4)
            self._shot_sums.zero_()
            self._shot_counts.zero_()
            logs["tokens_per_second"] = round(self.total_progress().tokens / max(self.progress.seconds, 1e-9), 1)
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(str(self.args.output_dir))
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        progress = self.total_progress()
        with storage_errors(checkpoint):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # Each process writes its own random state, which the manifest must hold.
        if not self.args.should_save:
            return
        write_json_atomic(checkpoint / "progress.json", asdict(progress))
        with storage_errors(checkpoint):
            seal_checkpoint(checkpoint)
        best = self.state.best_model_checkpoint
        drop_old_checkpoints(folder, best=Path(best) if best else None)

    def _load_best_model(self) -> None:
        """Load the best checkpoint's weights; transformers only logs when they are not there, and would keep the last ones."""
        best = self.state.best_model_checkpoint
        if best is None or not Path(best).is_dir():
            raise CheckpointError(f"{best}: the best checkpoint is gone, so its weights cannot be kept. Train again.")
        super()._load_best_model()


class _Bookkeeping(TrainerCallback):
    """Where the best checkpoint stands, and the seconds of whole updates: no loading, checkpoints or validation."""

    def __init__(self, trainer: ManyShotTrainer) -> None:
        self.trainer = trainer
        self.start = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        if state.best_global_step:  # The run's folder may have been moved since the checkpoint was written.
            state.best_model_checkpoint = str(Path(args.output_dir) / f"checkpoint-{state.best_global_step}")

    def on_step_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        self.trainer.progress.seconds += time.perf_counter() - self.start


class _PlainLines(TrainerCallback):
    """Log lines for people, through logging and not through a dictionary printed raw."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **options: Any) -> None:
        if logs and state.is_world_process_zero:
            logger.info("update %d/%d %s", state.global_step, state.max_steps, _shown(logs))


class _Bar(ProgressCallback):
    """The trainer's progress bar, with the numbers beside it and not as dictionaries above it."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **options: Any) -> None:
        bar: Any = self.training_bar
        if logs and bar is not None:
            bar.set_postfix_str(_shown(logs))


def _shown(logs: dict[str, Any]) -> str:
    return " ".join(f"{name}={value:.4g}" for name, value in logs.items() if isinstance(value, (int, float)))


def to_tensors(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """A batch of rows as int64 tensors [B, T]; see `packing.collate`."""
    return {name: torch.from_numpy(array) for name, array in collate(rows).items()}


def _peak_memory_bytes() -> int:
    """High-water mark of this process; Linux counts in kibibytes, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _logged(history: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """(update, value) pairs of what was logged under a name."""
    return [(int(entry["step"]), float(entry[name])) for entry in history if name in entry]


def train_model(
    model: torch.nn.Module,
    dataset: RowDataset,
    *,
    arguments: TrainingArguments,
    objective: ObjectiveConfig,
    validation: Sequence[Row] | None = None,
    resume: bool = False,
) -> TrainingResult:
    """Train `model` in place on the rows of `dataset`, in order.

    Args:
        arguments: From `training_arguments`; checkpoints go to its `output_dir`.
        validation: Rows whose loss is measured at each checkpoint; the best checkpoint's weights are kept.
        resume: Go on from the newest whole checkpoint, if there is one.

    Raises:
        ManyICLError: the loss or the gradients are not finite.
        StorageError: a checkpoint cannot be written.
    """
    trainer = ManyShotTrainer(
        objective=objective,
        model=model,
        args=arguments,
        train_dataset=dataset,
        eval_dataset=validation,
        data_collator=to_tensors,
    )
    for shown_raw in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(shown_raw)
    trainer.add_callback(_Bar() if sys.stderr.isatty() else _PlainLines())
    trainer.add_callback(_Bookkeeping(trainer))
    checkpoint = None
    if resume:
        with arguments.main_process_first(local=False):  # Broken checkpoints are removed, which one process must do alone.
            checkpoint = newest_whole_checkpoint(Path(str(arguments.output_dir)))
    if checkpoint is not None:
        logger.info("resuming from %s", checkpoint)
        if arguments.process_index == 0:
            trainer.progress = Progress(**json.loads((checkpoint / "progress.json").read_text(encoding="utf-8")))
    with bars_on_terminals_only():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state, progress = trainer.state, trainer.total_progress()
    kept_best = bool(arguments.load_best_model_at_end and state.best_global_step)
    return TrainingResult(
        updates=state.global_step,
        tokens=progress.tokens,
        answers=progress.answers,
        seconds=progress.seconds,
        peak_memory_bytes=_peak_memory_bytes(),
        best_step=int(state.best_global_step or 0) if kept_best else state.global_step,
        losses=_logged(state.log_history, "loss"),
        validation_losses=_logged(state.log_history, "eval_loss"),
    )


def prepare_for_training(model: Any, kernels: Kernels = OWN_KERNELS) -> None:
    """Give a model, LoRA-wrapped or whole, the attention and the leaner layers that training is fastest with; in place.

    Results are the same but for rounding. Whole weights get the attention alone.
    """
    if kernels.attention is None:
        return
    use_attention(model, kernels)
    keep_fewer_activations(model)


def leave_processes() -> None:
    """End the process group that training has joined, if any; a process that exits without may abort."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def training_arguments(training: TrainingConfig, folder: Path, *, seed: int, validate: bool) -> TrainingArguments:
    """TrainingArguments of a recipe's section, extended by its `trainer` mapping; joins the processes that torchrun started.

    Args:
        folder: Where checkpoints go; nothing is written yet.
        validate: Whether there are validation rows, which choose the checkpoint that is kept.

    Raises:
        RecipeError: an option is unknown or set twice, a value is refused, or the rows of a step cannot be shared out.
        ModelError: the processor lacks the dtype.
    """
    known = signature(TrainingArguments).parameters
    for name in training.trainer:
        if name not in known:
            nearest = get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise RecipeError(f"training.trainer: TrainingArguments has no {name!r}; the nearest is {nearest!r}.")
        if name in _BREAK_RESUMING:
            raise RecipeError(f"training.trainer sets {name!r}, with which a run could not be resumed exactly. Leave it out.")
        if name in _RECIPE_KEYS:
            raise RecipeError(f"training.trainer sets {name!r}, for which a recipe has a key of its own: {_RECIPE_KEYS[name]}.")
    try:
        callbacks = get_reporting_integration_callbacks(training.report_to)
        for callback in callbacks:
            callback()
        arguments = TrainingArguments(**_argument_values(training, folder, seed, validate=validate), **training.trainer)
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        raise RecipeError(f"training: {error} Correct the recipe, or install what is missing.") from error
    if arguments.n_gpu > 1:
        raise RecipeError(
            f"{arguments.n_gpu} GPUs are visible to one process. Start one process each (torchrun --nproc-per-node "
            f"{arguments.n_gpu}), or show one with CUDA_VISIBLE_DEVICES=0."
        )
    return arguments


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
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))  # As torchrun and accelerate say it.
    rows_at_once = training.rows_per_device * num_processes
    if training.rows_per_step % rows_at_once:
        raise RecipeError(
            f"training.rows_per_step = {training.rows_per_step} is no multiple of {rows_at_once}, the rows that {num_processes} "
            f"process(es) of training.rows_per_device = {training.rows_per_device} feed at once. Change one of them."
        )
    return training.rows_per_step // rows_at_once
