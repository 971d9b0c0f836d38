"""Recipe -> run folder, which is itself a model.

    runs/mine/
      recipe.yaml    the resolved recipe             adapter_model.safetensors (or model.safetensors), adapter_config.json
      run.json       versions, seed, data hashes     tokenizer.json …   manyicl.json   base model and its note
      checkpoints/   for --resume                    summary.json       written last: the run is finished
"""

import importlib.metadata
import json
import logging
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from manyicl.checkpoints import list_checkpoints
from manyicl.config import EpisodesConfig, Recipe
from manyicl.encoding import Encoder
from manyicl.errors import RecipeError
from manyicl.files import write_json_atomic, write_text_atomic
from manyicl.modeling import LoadedModel, add_lora, load_model, save_model
from manyicl.packing import Row, RowDataset
from manyicl.tasks.readers import load_suite
from manyicl.tasks.task import Task, TaskSuite
from manyicl.training import TrainingResult, train_model

logger = logging.getLogger(__name__)

_NUM_CHECKED_ROWS = 32


def train(recipe: Recipe, *, resume: bool = False) -> TrainingResult:
    """Train as a recipe says and write the run's folder.

    Args:
        resume: Go on with the run in `recipe.output`; a run that is finished is left as it is.

    Raises:
        RecipeError: the folder holds a run already, or (with `resume`) one of another recipe or of other data.
        UserInputError: the model, the tasks or the budget are wrong; nothing has been written.
    """
    output = Path(recipe.output)
    suite = load_suite(recipe.tasks)
    tasks = _training_tasks(recipe, suite)
    _check_folder(output, recipe, tasks, resume=resume)
    if (output / "summary.json").is_file():
        logger.info("%s is finished; nothing to do", output)
        return _read_result(output)
    full = recipe.training.tune == "full"
    loaded = load_model(recipe.model, dtype="float32" if full else recipe.training.dtype)
    _check_positions(recipe, loaded)
    encoder = Encoder(loaded.tokenizer, format=recipe.episodes.format)
    num_rows = recipe.training.num_steps * recipe.training.rows_per_step
    dataset = RowDataset(tasks, config=recipe.episodes, encoder=encoder, seed=recipe.seed, num_rows=num_rows)
    for index in range(min(num_rows, _NUM_CHECKED_ROWS)):  # A budget that does not fit shows before the first update.
        dataset[index]
    _write_start(output, recipe, tasks, loaded)
    model = loaded.model if full else add_lora(loaded.model, recipe.training.lora, seed=recipe.seed)
    result = train_model(
        model,
        dataset,
        training=recipe.training,
        objective=recipe.objective,
        output=output,
        validation=_validation_rows(recipe, suite, encoder),
        resume=resume,
    )
    save_model(model, loaded.tokenizer, output, base=recipe.model, note=loaded.note)
    rates = {"tokens_per_second": result.tokens_per_second, "answers_per_second": result.answers_per_second}
    write_json_atomic(output / "summary.json", asdict(result) | rates | {"note": loaded.note})
    return result


def library_versions() -> dict[str, str]:
    """Versions of what results depend on, and the processor's capability."""
    names = ("manyicl", "torch", "transformers", "peft", "accelerate")
    versions = {name: importlib.metadata.version(name) for name in names}
    return versions | {"python": platform.python_version(), "cpu": torch.backends.cpu.get_cpu_capability()}


def _training_tasks(recipe: Recipe, suite: TaskSuite) -> tuple[Task, ...]:
    """The tasks trained on; a validation or held-out task among them is an error."""
    names = suite.meta_training if recipe.meta_training is None else tuple(recipe.meta_training)
    if not names:
        raise RecipeError(f"suite {suite.name!r} has no meta-training tasks. List some under meta_training in its suite.yaml or the recipe.")
    for name in names:
        if name not in suite.tasks:
            raise RecipeError(f"meta_training names {name!r}, which suite {suite.name!r} does not have ({', '.join(suite.tasks)}).")
        if suite.role(name) in ("validation", "held_out"):
            raise RecipeError(f"meta_training names {name!r}, which is a {suite.role(name)} task. Training on it would void every result.")
    return tuple(suite.tasks[name] for name in names)


def _validation_rows(recipe: Recipe, suite: TaskSuite, encoder: Encoder) -> list[Row] | None:
    """Many-shot rows of the validation tasks, the same whatever the objective and the shots that are trained."""
    tasks = suite.select("validation")
    if not recipe.training.validate_checkpoints:
        return None
    if not tasks:
        raise RecipeError(f"training.validate_checkpoints: suite {suite.name!r} has no validation tasks. Turn it off or name some.")
    config = EpisodesConfig.model_validate({"max_tokens": recipe.episodes.max_tokens, "format": recipe.episodes.format})
    num_rows = recipe.training.validation_rows * len(tasks)
    return list(RowDataset(tasks, config=config, encoder=encoder, seed=recipe.seed, num_rows=num_rows))


def _check_positions(recipe: Recipe, loaded: LoadedModel) -> None:
    if recipe.episodes.max_tokens > loaded.context_tokens:
        raise RecipeError(
            f"episodes.max_tokens = {recipe.episodes.max_tokens} is more than the {loaded.context_tokens} positions of {recipe.model}. Lower it."
        )


def _check_folder(output: Path, recipe: Recipe, tasks: tuple[Task, ...], *, resume: bool) -> None:
    started = (output / "recipe.yaml").is_file()
    if not started:
        if list_checkpoints(output / "checkpoints"):
            raise RecipeError(f"{output}: holds checkpoints without a recipe.yaml. Choose another output folder.")
        return
    if not resume:
        raise RecipeError(f"{output}: holds a run already. Add --resume to go on with it, or choose another output.")
    before = yaml.safe_load((output / "recipe.yaml").read_text(encoding="utf-8"))
    now = recipe.model_dump(mode="json")
    differing = _differences(before, now)
    if differing:
        raise RecipeError(f"{output}: was started with another recipe ({'; '.join(differing)}). Use that recipe, or another output.")
    hashes = json.loads((output / "run.json").read_text(encoding="utf-8"))["data"]
    changed = [task.name for task in tasks if hashes.get(task.name) != task.fingerprint()]
    if changed:
        raise RecipeError(f"{output}: the examples of {', '.join(changed)} have changed since the run was started. Choose another output.")


def _differences(before: dict[str, Any], now: dict[str, Any], where: str = "") -> list[str]:
    """Keys whose values differ, as "key: old -> new"."""
    found = []
    for key in now.keys() | before.keys():
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{where}{key}.")
        elif old != new and where + key != "output":
            found.append(f"{where}{key}: {old} -> {new}")
    return sorted(found)


def _write_start(output: Path, recipe: Recipe, tasks: tuple[Task, ...], loaded: LoadedModel) -> None:
    if (output / "recipe.yaml").is_file():
        return
    facts = {
        "versions": library_versions(),
        "model": {"name": recipe.model, "note": loaded.note, "fingerprint": loaded.fingerprint},
        "threads": torch.get_num_threads(),
        "data": {task.name: task.fingerprint() for task in tasks},
    }
    write_json_atomic(output / "run.json", facts)
    write_text_atomic(output / "recipe.yaml", yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))


def _read_result(output: Path) -> TrainingResult:
    content = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    losses = [(int(step), float(loss)) for step, loss in content["losses"]]
    fields = {name: content[name] for name in ("updates", "tokens", "answers", "seconds", "peak_memory_bytes", "best_step")}
    return TrainingResult(**fields, losses=losses)
