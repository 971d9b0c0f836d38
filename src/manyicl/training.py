"""Training: transformers.Trainer with our rows, our loss and checkpoints that survive a kill.

In: a model (LoRA-wrapped or whole), a dataset of rows, and two sections of a recipe. Out: the trained model in place, and a
`TrainingResult`. The same call with `resume=True` after a SIGKILL gives bit-identical weights, given the same threads and
library versions.
"""

import json
import logging
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from manyicl.checkpoints import drop_old_checkpoints, newest_whole_checkpoint, seal_checkpoint
from manyicl.config import ObjectiveConfig, TrainingConfig
from manyicl.errors import ManyICLError, RecipeError
from manyicl.files import storage_errors, write_json_atomic
from manyicl.objective import NUM_SHOT_BUCKETS, answer_losses, count_units, head_can_return_losses, shot_bucket_names
from manyicl.packing import Row, RowDataset, collate

logger = logging.getLogger(__name__)


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
        tokens: Tokens fed, padding not counted.
        answers: Answers that were targets or context; with `all_answers` each was a target.
        seconds: Time spent in updates, without loading, checkpoints and validation.
        peak_memory_bytes: High-water mark of the process.
        best_step: Update whose weights were kept, when checkpoints were validated; else the last.
        losses: Logged (update, loss) pairs.
    """

    updates: int
    tokens: int
    answers: int
    seconds: float
    peak_memory_bytes: int
    best_step: int
    losses: list[tuple[int, float]] = field(default_factory=list)

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
        """Units of the optimizer step, over accumulated batches and ranks; transformers would count labels."""
        units = sum((count_units(batch, self.objective) for batch in batch_samples), torch.zeros((), dtype=torch.long))
        if self.args.world_size > 1:
            units = self.accelerator.gather(units.to(device)).sum()
        return units.to(device)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The batch's share of the step's mean loss; DDP averages gradients over ranks, hence the factor."""
        losses = answer_losses(model, inputs, self.objective, in_head=self.in_head)
        self._shot_sums += losses.shot_sums.cpu()
        self._shot_counts += losses.shot_counts.cpu()
        share: torch.Tensor = losses.total / num_items_in_batch * self.args.world_size
        return share

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One forward and backward pass, counted and timed."""
        start = time.perf_counter()
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not bool(torch.isfinite(loss)):
            raise ManyICLError(
                f"the loss is {float(loss)} at update {self.state.global_step + 1}. "
                "Lower training.learning_rate, or train in float32."
            )
        self.progress.seconds += time.perf_counter() - start
        self.progress.tokens += int((inputs["episode"] >= 0).sum())
        shot, episode = inputs["shot"], inputs["episode"]
        self.progress.answers += int(torch.stack([episode[shot >= 0], shot[shot >= 0]]).unique(dim=1).shape[1])
        return loss

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
            for name, total, count in zip(shot_bucket_names(), self._shot_sums, self._shot_counts, strict=True):
                if count:
                    logs[f"loss/shot_{name}"] = round(float(total / count), 4)
            self._shot_sums.zero_()
            self._shot_counts.zero_()
            logs["tokens_per_second"] = round(self.progress.tokens / max(self.progress.seconds, 1e-9), 1)
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(str(self.args.output_dir))
        with storage_errors(folder):
            super()._save_checkpoint(model, trial)
        if not self.args.should_save:
            return
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        write_json_atomic(checkpoint / "progress.json", asdict(self.progress))
        with storage_errors(checkpoint):
            seal_checkpoint(checkpoint)
        best = self.state.best_model_checkpoint
        drop_old_checkpoints(folder, best=Path(best) if best else None)


class _PlainLines(TrainerCallback):
    """Log lines for people, through logging and not through a dictionary printed raw."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **options: Any) -> None:
        if logs and state.is_world_process_zero:
            shown = " ".join(f"{name}={value:.4g}" for name, value in logs.items() if isinstance(value, (int, float)))
            logger.info("update %d/%d %s", state.global_step, state.max_steps, shown)


def to_tensors(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """A batch of rows as int64 tensors [B, T]; see `packing.collate`."""
    return {name: torch.from_numpy(array) for name, array in collate(rows).items()}


def train_model(
    model: torch.nn.Module,
    dataset: RowDataset,
    *,
    training: TrainingConfig,
    objective: ObjectiveConfig,
    output: Path,
    validation: Sequence[Row] | None = None,
    resume: bool = False,
) -> TrainingResult:
    """Train `model` in place on the rows of `dataset`, in order.

    Args:
        output: Folder of the run; checkpoints go to its `checkpoints` folder.
        validation: Rows whose loss is measured at each checkpoint; the best checkpoint's weights are kept.
        resume: Go on from the newest whole checkpoint, if there is one.

    Raises:
        RecipeError: `training.trainer` names an option that TrainingArguments does not have.
        ManyICLError: the loss is not finite.
        StorageError: a checkpoint cannot be written.
    """
    folder = output / "checkpoints"
    trainer = ManyShotTrainer(
        objective=objective,
        model=model,
        args=_arguments(training, folder, dataset.seed, validate=bool(validation)),
        train_dataset=dataset,
        eval_dataset=validation,
        data_collator=to_tensors,
    )
    trainer.remove_callback(_printer(trainer))
    trainer.add_callback(_PlainLines())
    checkpoint = newest_whole_checkpoint(folder) if resume else None
    if checkpoint is not None:
        trainer.progress = Progress(**json.loads((checkpoint / "progress.json").read_text(encoding="utf-8")))
        logger.info("resuming from %s", checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state, progress = trainer.state, trainer.progress
    return TrainingResult(
        updates=state.global_step,
        tokens=progress.tokens,
        answers=progress.answers,
        seconds=progress.seconds,
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        best_step=state.best_global_step or state.global_step,
        losses=[(int(entry["step"]), float(entry["loss"])) for entry in state.log_history if "loss" in entry],
    )


def _printer(trainer: Trainer) -> type[TrainerCallback]:
    """The trainer's own callback that prints log dictionaries, of one kind on a terminal and another elsewhere."""
    from transformers import PrinterCallback, ProgressCallback

    return PrinterCallback if trainer.args.disable_tqdm else ProgressCallback


def _arguments(training: TrainingConfig, folder: Path, seed: int, *, validate: bool) -> TrainingArguments:
    """TrainingArguments of a recipe's section; its `trainer` mapping overrides and extends them."""
    known = signature(TrainingArguments).parameters
    for name in training.trainer:
        if name not in known:
            nearest = get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise RecipeError(f"training.trainer: TrainingArguments has no {name!r}; the nearest is {nearest!r}.")
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": training.num_steps,
        "per_device_train_batch_size": training.rows_per_device,
        "gradient_accumulation_steps": max(1, training.rows_per_step // training.rows_per_device),
        "learning_rate": training.learning_rate,
        "warmup_steps": round(training.warmup_ratio * training.num_steps),
        "lr_scheduler_type": training.schedule,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "gradient_checkpointing": training.gradient_checkpointing,
        "bf16": training.tune == "full" and training.dtype == "bfloat16",
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
    }
    return TrainingArguments(**(options | training.trainer))
