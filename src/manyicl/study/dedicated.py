"""Dedicated tuning: one adapter on one task's examples, without demonstrations; a fifth is kept back to stop in time."""

import json
import logging
import math
import shutil
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, fields, replace
from pathlib import Path

from manyicl.arguments import training_arguments
from manyicl.config import EpisodesConfig
from manyicl.encoding import Encoder, Sequence, encode_episode
from manyicl.episodes import Episode, order_examples
from manyicl.errors import TaskError
from manyicl.files import write_json_atomic
from manyicl.modeling import add_lora, load_model, save_model
from manyicl.packing import Row, RowDataset
from manyicl.results.dedicated import count_kept_back
from manyicl.study.cells import rate_name
from manyicl.study.recipe import StudyRecipe
from manyicl.tasks.task import Example, Task
from manyicl.training import TrainingResult, Validation, prepare_for_training, train_model

logger = logging.getLogger(__name__)

_ROW_TOKENS = 2048
_RESULT_FILE = "result.json"


@dataclass(frozen=True)
class DedicatedRun:
    """A dedicated model and what it took."""

    folder: Path
    result: TrainingResult
    num_examples: int
    rate: float

    @property
    def kept_back_loss(self) -> float:
        """The loss on the fifth kept back of the weights that were kept, in nats a token."""
        return min(loss for _, loss in self.result.validation_losses)


def tune_at_rates(
    recipe: StudyRecipe, task: Task, examples: SequenceOf[Example], *, rates: SequenceOf[float], seed: int, folder: Path
) -> list[DedicatedRun]:
    """A run at each rate, in a folder of `folder` named after it; one that is finished is read, and not done again.

    Raises:
        TaskError: there are fewer than two examples.
    """
    runs = []
    for rate in rates:
        own = folder / rate_name(rate)
        if not (own / _RESULT_FILE).is_file():
            tune_dedicated(recipe, task, examples, rate=rate, seed=seed, folder=own)
        content = json.loads((own / _RESULT_FILE).read_text(encoding="utf-8"))
        runs.append(DedicatedRun(own, TrainingResult(**content), len(examples), rate))
    return runs


def tune_dedicated(
    recipe: StudyRecipe, task: Task, examples: SequenceOf[Example], *, rate: float, seed: int, folder: Path
) -> None:
    """Tune on `examples` alone and write the model to `folder`, which is emptied first; what it took is written last.

    A row holds the examples of about one pass, or 2,048 tokens; `max_epochs` counts passes rounded up to whole rows. After each
    pass, or a quarter of the budget where a pass is longer, the loss on the fifth kept back is looked at; the weights of the best
    look are kept.

    Raises:
        TaskError: there are fewer than two examples.
    """
    if len(examples) < 2:
        raise TaskError(f"task {task.name!r}: {len(examples)} example(s) cannot be shared out for dedicated tuning. Give more.")
    shutil.rmtree(folder, ignore_errors=True)
    kept_back, trained = split_fifth(examples, task.name, seed)
    loaded = load_model(recipe.model, dtype=recipe.dtype)
    encoder = Encoder(loaded.tokenizer)
    lengths = [encoder.count_opening(task.instruction) + encoder.count_example(each.input, each.answer) for each in trained]
    row_tokens = max(16, max(lengths), min(_ROW_TOKENS, sum(lengths)))
    rows_per_pass = max(1, math.ceil(sum(lengths) / row_tokens))
    num_rows = max(1, min(recipe.dedicated.max_epochs * rows_per_pass, recipe.dedicated.max_tokens // row_tokens))
    config = EpisodesConfig(max_tokens=row_tokens, num_shots=0, pack=True)
    dataset = RowDataset([replace(task, train=trained)], config=config, encoder=encoder, seed=seed, num_rows=num_rows)
    save_every = min(rows_per_pass, math.ceil(num_rows / 4))
    training = recipe.training_recipe(
        "zero_shot",
        training={"learning_rate": rate, "num_steps": num_rows, "save_every": save_every, "log_every": save_every},
    ).training
    model = add_lora(loaded.model, training.lora, seed=seed)
    prepare_for_training(model)
    result = train_model(
        model,
        dataset,
        arguments=training_arguments(training, folder / "checkpoints", seed=seed, validate=True),
        objective=recipe.training_recipe("zero_shot").objective,
        validation=Validation(_rows_of(task, kept_back, encoder), recipe.dedicated.patience),
    )
    save_model(model, loaded.tokenizer, folder, base=recipe.model, note=loaded.note)
    shutil.rmtree(folder / "checkpoints")
    told = {each.name: getattr(result, each.name) for each in fields(result) if each.name != "weights"}
    write_json_atomic(folder / _RESULT_FILE, told)


def split_fifth(examples: SequenceOf[Example], name: str, seed: int) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """A fifth of the examples, and the rest; a pure function of (seed, name)."""
    order = order_examples(examples, seed=seed, purpose=f"dedicated/{name}", index=0)
    num_kept_back = count_kept_back(len(order))
    return tuple(order[:num_kept_back]), tuple(order[num_kept_back:])


def _rows_of(task: Task, examples: SequenceOf[Example], encoder: Encoder) -> list[Row]:
    """Rows in which each example stands once, without demonstrations."""
    rows: list[list[Sequence]] = [[]]
    for example in examples:
        sequence = encode_episode(Episode(task.name, task.instruction, (example,)), encoder)
        if rows[-1] and sum(len(each.token_ids) for each in rows[-1]) + len(sequence.token_ids) > _ROW_TOKENS:
            rows.append([])
        rows[-1].append(sequence)
    return [Row(tuple(sequences)) for sequences in rows]
