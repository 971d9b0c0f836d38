"""Training: transformers.Trainer with our rows, our loss and checkpoints that survive a kill.

In: a model (LoRA-wrapped or whole), a dataset of rows, and two sections of a recipe. Out: the trained model in place, and a
`TrainingResult`. The same call with `resume=True` after a SIGKILL gives bit-identical weights, given the same threads and
library versions. Started by torchrun, every process calls it with the same arguments; row i is fed once, whatever their
number, and only the main process writes checkpoints. Where processes hold shards of the model (FSDP, DeepSpeed), the result
carries its whole weights to the main process.
"""

import json
import logging
import math
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from manyicl.accelerators import OWN_KERNELS, Kernels, use_attention
from manyicl.activations import keep_fewer_activations
from manyicl.checkpoints import NUM_KEPT, drop_old_checkpoints, newest_whole_checkpoint, seal_checkpoint
from manyicl.config import ObjectiveConfig
from manyicl.errors import CheckpointError, ManyICLError, RecipeError
from manyicl.files import storage_errors, write_json_atomic
from manyicl.model_names import bars_on_terminals_only
from manyicl.objective import (
    NUM_SHOT_BUCKETS,
    answer_losses,
    count_units,
    head_can_return_losses,
    shard_losses,
    shift_targets,
    shot_bucket_names,
)
from manyicl.packing import Row, RowDataset, collate
from manyicl.process_group import gather_from_processes, gather_weights, naming_lost_processes, place_among_processes

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
        tokens: Tokens fed, padding not counted, over all processes.
        answers: Answers that were targets or context, over all processes; with `all_answers` each was a target.
        seconds: Time spent in updates, without loading, checkpoints and validation.
        peak_memory_bytes: High-water mark of the main process.
        best_step: Update whose weights were kept, when checkpoints were validated; else the last.
        losses: Logged (update, loss) pairs.
        validation_losses: (update, loss) pairs of the checkpoints, when they were validated.
        weights: Whole weights by name, in the main process, where processes hold shards; None where the model holds them.
    """

    updates: int
    tokens: int
    answers: int
    seconds: float
    peak_memory_bytes: int
    best_step: int
    losses: list[tuple[int, float]] = field(default_factory=list)
    validation_losses: list[tuple[int, float]] = field(default_factory=list)
    weights: dict[str, torch.Tensor] | None = field(default=None, repr=False, compare=False)

    @property
    def tokens_per_second(self) -> float:
        """Tokens fed per second of updates."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def answers_per_second(self) -> float:
        """Answers per second of updates."""
        return self.answers / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Validation:
    """What is measured at each checkpoint, so that the best one's weights are kept.

    Attributes:
        rows: Rows whose mean token loss is measured.
        patience: Training stops after so many checkpoints without a better loss; None trains to the end.
    """

    rows: Sequence[Row]
    patience: int | None = None


class WholeModel:
    """A model of which processes hold shards, as `modeling.save_model` takes it: with its whole weights beside it."""

    def __init__(self, model: Any, weights: dict[str, torch.Tensor]) -> None:
        self.model = model
        self.weights = weights
        self.config = getattr(model, "config", None)

    def save_pretrained(self, folder: str) -> None:
        """Write config and weights; in the main process alone."""
        self.model.save_pretrained(folder, state_dict=dict(self.weights))


class ManyShotTrainer(Trainer):
    """transformers.Trainer on rows, with the loss normalised over the whole optimizer step."""

    def __init__(self, *, objective: ObjectiveConfig, **options: Any) -> None:
        super().__init__(**options)
        self.objective: ObjectiveConfig = objective
        self.progress = Progress()
        self.in_head = head_can_return_losses(options["model"])
        # Ours alone removes old checkpoints; transformers would before the newest is whole.
        self.num_kept, self.args.save_total_limit = self.args.save_total_limit or NUM_KEPT, None
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
        return self._sum_over_rows(units.to(device))

    def _sum_over_processes(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of each process's values; every process must come here."""
        if self.args.world_size == 1:
            return values
        gathered: torch.Tensor = self.accelerator.gather(values.unsqueeze(0))
        return gathered.sum(dim=0)

    def _sum_over_rows(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of counts of whole rows, which processes that share a row between them all count."""
        return self._sum_over_processes(values) // int(self.get_cp_size())

    def total_progress(self) -> Progress:
        """Progress of all processes together; every process must come here."""
        counts = self._sum_over_rows(torch.tensor([self.progress.tokens, self.progress.answers], device=self.args.device))
        return Progress(int(counts[0]), int(counts[1]), self.progress.seconds)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The batch's share of the step's mean loss; DDP and FSDP average gradients over processes, hence the factor."""
        if "target" in inputs:
            losses = shard_losses(model, inputs, in_head=self.in_head)
        else:
            losses = answer_losses(model, inputs, self.objective, in_head=self.in_head)
        self._shot_sums += losses.shot_sums.cpu()
        self._shot_counts += losses.shot_counts.cpu()
        share: torch.Tensor = losses.total / num_items_in_batch * self.args.world_size
        return share

    def _prepare_context_parallel_inputs(self, model: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The batch with targets beside its tokens, and the context in which both are cut into shards.

        In place of transformers' own, which shifts labels that our rows do not have. Ring attention needs rows of a multiple of
        twice as many tokens as processes share them. Not run here: it needs GPUs.
        """
        num_sharing = int(self.get_cp_size())
        if num_sharing == 1:
            return nullcontext, inputs
        shifted = shift_targets(self._prepare_inputs(inputs), self.objective, multiple=2 * num_sharing)
        buffers = list(shifted.values())
        dimensions = [1] * len(buffers)
        cut = self.accelerator.maybe_context_parallel
        return partial(cut, buffers=buffers, buffer_seq_dims=dimensions, no_restore_buffers=set(buffers)), shifted

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
        drop_old_checkpoints(folder, best=Path(best) if best else None, num_kept=self.num_kept)

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


@naming_lost_processes()
def train_model(
    model: torch.nn.Module,
    dataset: RowDataset,
    *,
    arguments: TrainingArguments,
    objective: ObjectiveConfig,
    validation: Validation | None = None,
    resume: bool = False,
) -> TrainingResult:
    """Train `model` in place on the rows of `dataset`, in order.

    Args:
        arguments: From `training_arguments`; checkpoints go to its `output_dir`.
        validation: What is measured at each checkpoint, for which `arguments` were made with `validate`.
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
        eval_dataset=validation.rows if validation else None,
        data_collator=to_tensors,
    )
    _check_rows_per_step(trainer, len(dataset))
    for shown_raw in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(shown_raw)
    trainer.add_callback(_Bar() if sys.stderr.isatty() else _PlainLines())
    trainer.add_callback(_Bookkeeping(trainer))
    if validation and validation.patience:
        trainer.add_callback(EarlyStoppingCallback(validation.patience))
    checkpoint = _find_checkpoint(arguments) if resume else None
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
        weights=_whole_weights(trainer),
    )


def _find_checkpoint(arguments: TrainingArguments) -> Path | None:
    """The newest whole checkpoint; every process must come here.

    Raises:
        CheckpointError: processes find different ones.
    """
    with arguments.main_process_first(local=False):  # Broken checkpoints are removed, which one process must do alone.
        checkpoint = newest_whole_checkpoint(Path(str(arguments.output_dir)))
    names = gather_from_processes(checkpoint.name if checkpoint else "none")
    if len(set(names)) > 1:
        raise CheckpointError(
            f"{arguments.output_dir}: the processes find different checkpoints to go on from ({', '.join(names)}). "
            "Give an output folder that all machines share."
        )
    return checkpoint


def _check_rows_per_step(trainer: ManyShotTrainer, num_rows: int) -> None:
    """Whether all processes that Accelerate found feed the recipe's rows, neither more nor fewer."""
    arguments = trainer.args
    planned, fed = num_rows // arguments.max_steps, trainer.get_total_train_batch_size(arguments)
    several = max(arguments.world_size, place_among_processes()[1]) > 1
    if several and fed != planned:
        raise RecipeError(
            f"{arguments.world_size} process(es) would feed {fed} rows in an update, and training.rows_per_step = {planned}. "
            "Start them with torchrun, or set RANK and WORLD_SIZE; a parallelism is chosen under training.trainer alone."
        )


def _whole_weights(trainer: ManyShotTrainer) -> dict[str, torch.Tensor] | None:
    """Weights that no process holds whole, in the main one; every process must come here."""
    model: Any = trainer.model
    weights = gather_weights(model, trained_only=hasattr(model, "peft_config"))
    if weights is None and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return weights


def prepare_for_training(model: Any, kernels: Kernels = OWN_KERNELS) -> None:
    """Give a model, LoRA-wrapped or whole, the attention and the leaner layers that training is fastest with; in place.

    Results are the same but for rounding. Whole weights get the attention alone.
    """
    if kernels.attention is None:
        return
    use_attention(model, kernels)
    keep_fewer_activations(model)
