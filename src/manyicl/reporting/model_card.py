"""A run's README.md as the Hub reads it: front matter, what was trained and how, and results where records are given.

In: recipe.yaml, run.json and summary.json of a run, and records of its evaluation. Every number of the card is in one of them.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from manyicl.config import Recipe, missing_run_hint, parse_recipe
from manyicl.errors import RecordsError, UserInputError
from manyicl.files import write_text_atomic
from manyicl.records import CurvePoint, EvaluationRecord, task_curves
from manyicl.reporting.tables import show_bytes, show_number, show_seconds
from manyicl.reporting.terminal import markdown_curves

try:
    import jinja2
except ImportError as error:
    raise UserInputError("Jinja2 is not installed. Type: pip install 'manyicl[report]'") from error

MARK = "<!-- made by manyicl card -->"
DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_HUB_TASKS = {
    "classification": "text-classification",
    "nli": "text-classification",
    "qa": "question-answering",
    "summarization": "summarization",
}


def write_model_card(
    run_folder: Path, records: Sequence[EvaluationRecord] = (), *, model: str | None = None, name: str = ""
) -> Path:
    """Write the README.md of a finished run and return its path.

    Args:
        records: Results; those of `model` are shown.
        model: The run's name in the records; the folder as it was given unless said otherwise.
        name: What the card calls the model; the folder's name unless given.

    Raises:
        UserInputError: the folder holds no finished run, or a README.md that somebody has written.
        RecordsError: records are given, and none is of the run.
        StorageError: it cannot be written.
    """
    path = run_folder / "README.md"
    if path.is_file() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        raise UserInputError(f"{path}: was not written by this command. Move it away, or keep it.")
    own = _own_records(records, model or str(run_folder))
    write_text_atomic(path, render_model_card(run_folder, own, name=name))
    return path


def write_study_cards(runs: Mapping[str, Path], records: Sequence[EvaluationRecord]) -> list[str]:
    """Write the README.md of each finished training of a study; what hindered those that were not written, one text a card.

    Args:
        runs: Run folders by the names of the models in the records.
        records: Of the whole study; cards show what chose nothing. A model that has no such record yet is shown without results.
    """
    # Tasks of a family that was left out have another role in the suite.
    shown = [record for record in records if record.role not in ("validation", "builtin") and not record.condition]
    evaluated = {record.model for record in shown}
    refused = []
    for model, run in runs.items():
        try:
            write_model_card(run, shown if model in evaluated else (), model=model, name=model)
        except UserInputError as error:
            refused.append(str(error))
    return refused


def _own_records(records: Sequence[EvaluationRecord], model: str) -> list[EvaluationRecord]:
    own = [record for record in records if record.model == model and not record.condition]
    if records and not own:
        names = sorted({record.model for record in records})
        raise RecordsError(f"none of {len(records)} records is of {model!r} ({', '.join(names)}). Name it: --model NAME.")
    return own


def render_model_card(run_folder: Path, records: Sequence[EvaluationRecord] = (), *, name: str = "") -> str:
    """The card as text; `records` are all of this run, and `name` is what it is called, its folder's name unless given.

    Raises:
        UserInputError: the folder holds no finished run.
    """
    recipe = parse_recipe(_read(run_folder / "recipe.yaml"), where=str(run_folder / "recipe.yaml"))
    run = _read(run_folder / "run.json", "versions", "data", "model")
    summary = _read(run_folder / "summary.json", "updates", "tokens", "answers", "seconds", "peak_memory_bytes")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("manyicl.reporting", "templates"),
        autoescape=False,  # Markdown: the Hub cleans what it shows, and a name in code must not hold &amp;.
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    name = name or run_folder.resolve().name
    front = _front_matter(recipe, records, name)
    return environment.get_template("model_card.md.j2").render(
        mark=MARK,
        front_matter=yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
        name=name,
        base=front.get("base_model", recipe.model),
        recipe=recipe,
        manner=_manner(recipe),
        run=run,
        summary=summary,
        memory=show_bytes(summary["peak_memory_bytes"]),
        time=show_seconds(summary["seconds"]),
        number=show_number,
        results=markdown_curves(records) if records else "",
        resolved=yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True).strip(),
    )


def _read(path: Path, *keys: str) -> dict[str, Any]:
    """A mapping that holds at least these keys."""
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except OSError as error:
        hint = missing_run_hint(path.parent, otherwise="Give the folder of a finished run.")
        raise UserInputError(f"{path}: cannot be read ({error.strerror}). {hint}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise UserInputError(f"{path}: is damaged ({error}). Give the folder of a finished run.") from error
    if not isinstance(content, dict):
        raise UserInputError(f"{path}: holds a {type(content).__name__}, not a mapping. Give the folder of a finished run.")
    missing = [key for key in keys if key not in content]
    if missing:
        raise UserInputError(f"{path}: has no {', '.join(missing)}. Give the folder of a finished run.")
    return content


def _manner(recipe: Recipe) -> str:
    """How a run was tuned, in words."""
    num_shots = recipe.episodes.num_shots
    if num_shots == 0:
        return "without demonstrations"
    return "by many-shot in-context fine-tuning" if num_shots is None else f"behind {num_shots} demonstrations"


def _front_matter(recipe: Recipe, records: Sequence[EvaluationRecord], name: str) -> dict[str, Any]:
    """What the Hub indexes; a base model that is not on the Hub is left out."""
    front: dict[str, Any] = {
        "library_name": "peft" if recipe.training.tune == "lora" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["manyicl", "in-context-learning", "many-shot"],
    }
    base = DEFAULT_MODEL if recipe.model == "default" else recipe.model
    if base.count("/") == 1 and not base.endswith(".gguf") and not Path(base).exists():
        front = {"base_model": base} | front
    if records:
        front["model-index"] = [{"name": name, "results": _index_results(records)}]
    return front


def _index_results(records: Sequence[EvaluationRecord]) -> list[dict[str, Any]]:
    """One entry per task, a metric per number of shots, on 0-100."""
    tasks = {record.task: record for record in records}
    points: dict[str, list[CurvePoint]] = {}
    for point in task_curves(records):
        points.setdefault(point.task, []).append(point)
    return [
        {
            "task": {"type": _HUB_TASKS.get(tasks[task].family, "text-generation")},
            "dataset": {"name": task, "type": task},
            "metrics": [
                {
                    "type": tasks[task].metric,
                    "name": f"{tasks[task].metric}, {point.shots} shots, {point.num_seeds} orders of demonstrations",
                    "value": round(100 * point.mean, 2),
                }
                for point in own
            ],
        }
        for task, own in points.items()
    ]
