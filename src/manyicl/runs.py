"""Recipe -> run folder, which is itself a model.

runs/mine/
  recipe.yaml    the resolved recipe             adapter_model.safetensors (or model.safetensors), adapter_config.json
  run.json       versions, seed, data hashes     tokenizer.json …   manyicl.json   base model and its note
  checkpoints/   for --resume                    summary.json       written last: the run is finished
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
import yaml

from manyicl.accelerators import Kernels, choose_kernels
from manyicl.arguments import context_parallel_size, training_arguments
from manyicl.checkpoints import list_checkpoints
from manyicl.config import EpisodesConfig, Recipe
from manyicl.dtypes import Dtype
from manyicl.encoding import Encoder
from manyicl.engines.native import check_format, open_engine
from manyicl.errors import RecipeError, UserInputError
from manyicl.evaluation import Plan, evaluate_task
from manyicl.files import write_json_atomic, write_text_atomic
from manyicl.forgetting import corpus_loss, read_corpus
from manyicl.methods import InContext
from manyicl.modeling import LoadedModel, add_lora, load_model, load_tokenizer, save_model
from manyicl.objective import check_can_be_cut
from manyicl.packing import Row, RowDataset, build_row
from manyicl.process_group import gather_from_processes, launch_name, place_among_processes
from manyicl.records import EvaluationRecord, RecordWriter, SharedRecordWriter, Shots, read_records
from manyicl.tasks.readers import load_suite
from manyicl.tasks.task import Role, Task, TaskSuite
from manyicl.training import TrainingResult, Validation, WholeModel, prepare_for_training, to_tensors, train_model
from manyicl.training_plan import check_training_memory
from manyicl.versions import library_versions

logger = logging.getLogger(__name__)

_NUM_CHECKED_ROWS = 32


def train(recipe: Recipe, *, resume: bool = False) -> TrainingResult:
    """Train as a recipe says and write the run's folder. Started by torchrun, every process calls it; the main one writes.

    Args:
        resume: Go on with the run in `recipe.output`; a run that is finished is left as it is.

    Raises:
        RecipeError: the folder holds a run already, or (with `resume`) one of another recipe, model or data; or processes were
            not started with the same.
        UserInputError: the model, the tasks or the budget are wrong; nothing has been written.
    """
    output, training = Path(recipe.output), recipe.training
    validate = training.validate_checkpoints
    arguments = training_arguments(training, output / "checkpoints", seed=recipe.seed, validate=validate)
    is_main = arguments.process_index == 0
    suite = load_suite(recipe.tasks)
    tasks = _training_tasks(recipe, suite)
    facts = _run_facts(recipe, tasks, suite.select("validation") if validate else ())
    is_finished = (output / "summary.json").is_file()
    asked = recipe.model_dump(mode="json") | {"--resume": resume}
    _check_agreement(asked | {"finished": is_finished, "examples": facts["data"]})
    if is_main:
        _check_folder(output, recipe, facts, resume=resume)
    if is_finished:
        logger.info("%s is finished; nothing to do", output)
        return _read_result(output)
    dtype: Dtype = "float32" if training.tune == "full" else training.dtype
    loaded = load_model(recipe.model, dtype=dtype, rope_scaling=recipe.rope_scaling)
    facts["model"] = {"name": recipe.model, "note": loaded.note, "fingerprint": loaded.fingerprint}
    _check_agreement({"files of the model": loaded.fingerprint})
    _check_positions(recipe, loaded)
    encoder = Encoder(loaded.tokenizer, format=recipe.episodes.format)
    num_rows = training.num_steps * training.rows_per_step
    dataset = RowDataset(tasks, config=recipe.episodes, encoder=encoder, seed=recipe.seed, num_rows=num_rows)
    check_training_memory(
        recipe,
        loaded.model.config,
        row_tokens=_check_rows(dataset),
        device=arguments.device,
        num_processes=arguments.world_size,
    )
    kernels = _kernels_for(recipe, dataset)
    validation = _validation_rows(recipe, suite, encoder)
    model = loaded.model if training.tune == "full" else add_lora(loaded.model, training.lora, seed=recipe.seed)
    prepare_for_training(model, kernels)
    if is_main:
        _write_start(output, recipe, facts)
    result = train_model(
        model,
        dataset,
        arguments=arguments,
        objective=recipe.objective,
        validation=Validation(validation, training.patience) if validation else None,
        resume=resume,
    )
    if is_main:
        whole = model if result.weights is None else WholeModel(model, result.weights)
        save_model(whole, loaded.tokenizer, output, base=recipe.model, note=loaded.note, format=recipe.episodes.format)
        _write_summary(output, result, note=loaded.note)
    return result


def _check_agreement(facts: dict[str, Any]) -> None:
    """Whether every process was started with the same; each must come here.

    Raises:
        RecipeError: one was not; names what differs, in all of them.
    """
    first, *others = gather_from_processes(facts)
    for number, other in enumerate(others, 1):
        differing = _differences(first, other)
        if differing:
            raise RecipeError(
                f"process {number} was not started with the same as process 0 ({'; '.join(differing)}; on the left process 0). "
                "Give all of them the same recipe and options, and the same files, or a folder that they share."
            )


def _kernels_for(recipe: Recipe, dataset: RowDataset) -> Kernels:
    """The kernels of a run, which can be shared out over processes where it asks for that.

    Raises:
        ManyICLError: processes are to share rows that cannot be cut.
    """
    kernels = choose_kernels(recipe.training)
    if context_parallel_size(recipe.training) == 1:
        return kernels
    check_can_be_cut(to_tensors([dataset[0]]), recipe.objective)
    return replace(kernels, attention=kernels.attention and "sdpa")  # The one that torch makes a ring of.


def _check_rows(dataset: RowDataset) -> int:
    """Build the first rows, so that a budget that does not fit shows before the first update; says how many shots are missing.

    Returns:
        Tokens of the longest of them.
    """
    wanted = dataset.config.num_shots
    rows = [dataset[index] for index in range(min(len(dataset), _NUM_CHECKED_ROWS))]
    episodes = [sequence.episode for row in rows for sequence in row.sequences]
    short = [episode for episode in episodes if wanted is not None and len(episode.examples) <= wanted]
    if short:
        logger.warning(
            "%d of the first %d episodes hold fewer than episodes.num_shots=%d demonstrations, the shortest %d (task %s): "
            "episodes.max_tokens=%d is full, or the task has no more examples",
            len(short),
            len(episodes),
            wanted,
            min(len(episode.examples) - 1 for episode in short),
            min(short, key=lambda episode: len(episode.examples)).task,
            dataset.config.max_tokens,
        )
    return max(row.num_tokens for row in rows)


def _training_tasks(recipe: Recipe, suite: TaskSuite) -> tuple[Task, ...]:
    """The tasks trained on; a validation or held-out task among them is an error."""
    names = suite.meta_training if recipe.meta_training is None else tuple(recipe.meta_training)
    if not names:
        raise RecipeError(
            f"suite {suite.name!r} has no meta-training tasks. List some under meta_training in its suite.yaml or the recipe."
        )
    for name in names:
        if name not in suite.tasks:
            raise RecipeError(
                f"meta_training names {name!r}, which suite {suite.name!r} does not have ({', '.join(suite.tasks)})."
            )
        if suite.role(name) in ("validation", "held_out"):
            raise RecipeError(
                f"meta_training names {name!r}, which is a {suite.role(name)} task. Training on it would void every result."
            )
    return tuple(suite.tasks[name] for name in names)


def _validation_rows(recipe: Recipe, suite: TaskSuite, encoder: Encoder) -> list[Row] | None:
    """Many-shot rows of the validation tasks, the same whatever the objective and the shots that are trained."""
    tasks = suite.select("validation")
    if not recipe.training.validate_checkpoints:
        return None
    if not tasks:
        raise RecipeError(
            f"training.validate_checkpoints: suite {suite.name!r} has no validation tasks. Turn it off or name some."
        )
    config = EpisodesConfig.model_validate({"max_tokens": recipe.episodes.max_tokens, "format": recipe.episodes.format})
    num_rows = recipe.training.validation_rows * len(tasks)
    return list(RowDataset(tasks, config=config, encoder=encoder, seed=recipe.seed, num_rows=num_rows))


def _check_positions(recipe: Recipe, loaded: LoadedModel) -> None:
    if recipe.episodes.max_tokens > loaded.context_tokens:
        raise RecipeError(
            f"episodes.max_tokens = {recipe.episodes.max_tokens} is "
            f"more than the {loaded.context_tokens} positions of {recipe.model}. Lower it, or scale the positions (rope_scaling)."
        )


def _run_facts(recipe: Recipe, tasks: Sequence[Task], validation: Sequence[Task]) -> dict[str, Any]:
    """What a run's results depend on beside its recipe, as run.json holds it; the model is added when it is loaded."""
    return {
        "versions": library_versions(),
        "threads": torch.get_num_threads(),
        "processes": place_among_processes()[1],
        "data": {task.name: task.fingerprint() for task in (*tasks, *validation)},
    }


def _check_folder(output: Path, recipe: Recipe, facts: dict[str, Any], *, resume: bool) -> None:
    """Whether a run may be started, or gone on with, in `output`.

    Raises:
        RecipeError: see `train`.
    """
    started = (output / "recipe.yaml").is_file()
    if not started:
        if list_checkpoints(output / "checkpoints"):
            raise RecipeError(f"{output}: holds checkpoints without a recipe.yaml. Choose another output folder.")
        return
    if not resume:
        raise RecipeError(f"{output}: holds a run already. Go on with it (--resume, or resume=True), or choose another output.")
    before = yaml.safe_load((output / "recipe.yaml").read_text(encoding="utf-8"))
    now = recipe.model_dump(mode="json")
    differing = _differences(before | {"output": None}, now | {"output": None})
    if differing:
        raise RecipeError(
            f"{output}: was started with another recipe ({'; '.join(differing)}). Use that recipe, or another output."
        )
    known = json.loads((output / "run.json").read_text(encoding="utf-8"))
    changed = sorted(name for name, hash in facts["data"].items() if known["data"].get(name) != hash)
    if changed:
        raise RecipeError(
            f"{output}: the examples of {', '.join(changed)} have changed since the run was started. Choose another output."
        )
    for name in ("versions", "threads", "processes"):
        if known.get(name, 1) != facts[name]:  # Runs of 0.1.0 before processes were recorded.
            logger.warning(
                "%s was started with %s %s and goes on with %s: its weights will differ in the last digits from those of an "
                "uninterrupted run",
                output,
                name,
                known.get(name, 1),
                facts[name],
            )


def _differences(before: dict[str, Any], now: dict[str, Any], where: str = "") -> list[str]:
    """Keys whose values differ, as "key: old -> new"."""
    found = []
    for key in now.keys() | before.keys():
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{where}{key}.")
        elif old != new:
            found.append(f"{where}{key}: {old} -> {new}")
    return sorted(found)


def _write_start(output: Path, recipe: Recipe, facts: dict[str, Any]) -> None:
    """Write run.json and recipe.yaml; on resuming, look whether the model is still the one that was started with.

    Raises:
        RecipeError: it is not.
        StorageError: the folder cannot be written.
    """
    if (output / "recipe.yaml").is_file():
        known = json.loads((output / "run.json").read_text(encoding="utf-8"))["model"]["fingerprint"]
        if known != facts["model"]["fingerprint"]:
            raise RecipeError(f"{output}: the files of model {recipe.model} have changed since the run was started. Train again.")
        return
    write_json_atomic(output / "run.json", facts)
    write_text_atomic(output / "recipe.yaml", yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))


def _write_summary(output: Path, result: TrainingResult, *, note: str) -> None:
    rates = {"tokens_per_second": result.tokens_per_second, "answers_per_second": result.answers_per_second}
    summary = {name: value for name, value in asdict(replace(result, weights=None)).items() if name != "weights"}
    write_json_atomic(output / "summary.json", summary | rates | {"note": note})


def _read_result(output: Path) -> TrainingResult:
    content = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    losses, validation = ([(int(step), float(loss)) for step, loss in content[name]] for name in ("losses", "validation_losses"))
    fields = {name: content[name] for name in ("updates", "tokens", "answers", "seconds", "peak_memory_bytes", "best_step")}
    return TrainingResult(**fields, losses=losses, validation_losses=validation)


@dataclass(frozen=True)
class EvaluationRequest:
    """What `manyicl evaluate` was asked for; see its options. A role of None means held-out tasks, or those of `only` alone."""

    models: tuple[str, ...]
    tasks: str = "builtin"
    role: str | None = None
    only: tuple[str, ...] = ()
    shots: tuple[Shots, ...] = (0, 1, 4, 16, 64, "max")
    num_seeds: int = 3
    num_queries: int = 100
    context_tokens: int | None = None
    format: str | None = None


def evaluate_models(request: EvaluationRequest, output: Path) -> list[EvaluationRecord] | None:
    """Evaluate models one after the other and return all records asked for; finished cells are read from `output`.

    Started by torchrun, or several times with RANK and WORLD_SIZE set, processes share out the cells (model, task, seed).

    Returns:
        None in a process that has finished its share while others are at work; the last to finish has all records.

    Raises:
        UserInputError: a task, a role or a model is wrong, or `output` holds other results of these cells.
    """
    suite = load_suite(request.tasks)
    tasks = _chosen_tasks(suite, request)
    check_format(request.format)
    rank, num_processes = place_among_processes()
    cells = [
        (name, task.name, seed) for name in dict.fromkeys(request.models) for task in tasks for seed in range(request.num_seeds)
    ]
    own = cells[rank::num_processes]
    writer: RecordWriter | None = None
    records: list[EvaluationRecord] = []
    for name in dict.fromkeys(name for name, _, _ in own):
        loaded = load_model(name)
        method = InContext(open_engine(loaded, request.format, request.context_tokens))
        writer = writer or _open_writer(request, tasks, output)  # Only now, so that a wrong model leaves no file behind.
        plan = Plan(
            shots=request.shots,
            num_seeds=request.num_seeds,
            num_queries=request.num_queries,
            model=name,
            model_note=loaded.note,
            versions=tuple(library_versions().items()),
        )
        for task in tasks:
            seeds = [seed for seed in range(request.num_seeds) if (name, task.name, seed) in own]
            records += evaluate_task(method, task, suite.role(task.name), plan=plan, writer=writer, seeds=seeds)
    writer = writer or _open_writer(request, tasks, output)
    if not writer.finish():
        logger.info("process %d of %d has finished its share; the last to finish writes %s", rank, num_processes, output)
        return None
    if num_processes == 1:
        return records
    asked = set(cells)
    found = read_records(output)
    return [record for record in found if (record.model, record.task, record.seed) in asked and record.shots in request.shots]


def _open_writer(request: EvaluationRequest, tasks: Sequence[Task], output: Path) -> RecordWriter:
    place = place_among_processes()
    if place[1] == 1:
        return RecordWriter(output)
    # With the launch, as a share that an earlier one finished is being gone through again by a process of this one.
    asked = f"{request} {[task.fingerprint() for task in tasks]} {launch_name()}"
    return SharedRecordWriter(output, place=place, request=asked)


def measure_corpora(
    models: Sequence[str], texts: Sequence[Path], output: Path, *, max_bytes: int, window_tokens: int
) -> list[dict[str, Any]]:
    """Bits per byte of each text under each model, also written to `output` as JSON.

    Raises:
        UserInputError: a text or a model cannot be read, or the window is wider than the model's positions.
    """
    names = [path.name for path in texts]
    corpora = {path.name if names.count(path.name) == 1 else str(path): read_corpus(path, max_bytes=max_bytes) for path in texts}
    rows = []
    for name in dict.fromkeys(models):
        loaded = load_model(name)
        for corpus, text in corpora.items():
            loss = corpus_loss(loaded, text, window_tokens=window_tokens)
            rows.append({"model": name, "note": loaded.note, "corpus": corpus, "window_tokens": window_tokens} | asdict(loss))
    write_json_atomic(output, {"versions": library_versions(), "results": rows})
    return rows


def open_row(recipe: Recipe, index: int) -> tuple[Row, Any]:
    """Row `index` of a run and the tokenizer, without loading the model's weights."""
    suite = load_suite(recipe.tasks)
    tokenizer = load_tokenizer(recipe.model)
    encoder = Encoder(tokenizer, format=recipe.episodes.format)
    tasks = _training_tasks(recipe, suite)
    return build_row(tasks, config=recipe.episodes, encoder=encoder, seed=recipe.seed, index=index), tokenizer


def _chosen_tasks(suite: TaskSuite, request: EvaluationRequest) -> tuple[Task, ...]:
    """The tasks of a role, those named, or those named within a role."""
    roles = (*get_args(Role), "all", None)
    if request.role not in roles:
        raise UserInputError(f"role {request.role!r} is none of {', '.join(get_args(Role))} and all.")
    for name in request.only:
        if name not in suite.tasks:
            raise UserInputError(f"suite {suite.name!r} has no task {name!r} ({', '.join(suite.tasks)}).")
        if request.role not in (None, "all", suite.role(name)):
            raise UserInputError(
                f"task {name!r} of suite {suite.name!r} has the role {suite.role(name)}, not {request.role}. "
                "Leave one of the two out."
            )
    if request.only:
        return tuple(suite.tasks[name] for name in request.only)
    if request.role == "all":
        return tuple(suite.tasks.values())
    role = request.role or "held_out"
    tasks = tuple(task for name, task in suite.tasks.items() if suite.role(name) == role)
    if not tasks:
        raise UserInputError(f"suite {suite.name!r} has no {role} task. Name tasks, or choose the role all.")
    return tasks
