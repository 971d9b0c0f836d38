"""Recipes: what a run is, as YAML. Every field has a unit and a default; an unknown key is an error that names the nearest one.

model: default
tasks: builtin
episodes: {max_tokens: 2048}
objective: {name: all_answers, normalisation: token}
training: {num_steps: 150, learning_rate: 3.0e-4}
"""

import difflib
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from manyicl.errors import RecipeError

# What yaml.safe_load raises for a broken text: a ValueError for a date such as 2001-99-99, and its own errors for the rest.
YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class EpisodesConfig(_Section):
    """How examples become episodes and rows."""

    max_tokens: int = Field(2048, ge=16, description="Tokens in a row, at most.")
    num_shots: int | None = Field(None, ge=0, description="Demonstrations before the last example; None fills the row.")
    task_alpha: float = Field(
        0.0, ge=0.0, description="Tasks are drawn with probability proportional to train size ** task_alpha."
    )
    remap_probability: float = Field(0.0, ge=0.0, le=1.0, description="Probability that an episode's label words are remapped.")
    class_balance: bool = Field(False, description="Draw examples so that every label is equally likely.")
    format: Literal["plain", "chat"] = Field("plain", description="Plain text, or the tokenizer's own chat template.")
    pack: bool = Field(False, description="Put several short sequences in one row, each attending only to itself.")


class ObjectiveConfig(_Section):
    """Which answers are targets, and over what their loss is a mean."""

    name: Literal["all_answers", "last_answer", "reweighted"] = Field("all_answers", description="Which answers are targets.")
    normalisation: Literal["token", "answer", "episode"] = Field(
        "token", description="The mean is over these, over the whole step."
    )
    reweight_window: int = Field(8, ge=1, description="Shots over which `reweighted` compares losses.")
    reweight_temperature: float = Field(1.0, gt=0.0, description="Larger is closer to equal weights (`reweighted` only).")


class LoraConfig(_Section):
    """Low-rank adapters (PEFT); weights in fp32 over a base in the training dtype."""

    rank: int = Field(16, ge=1, description="Rank of the update.")
    alpha: int = Field(32, ge=1, description="Scale of the update, divided by the rank.")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Dropout before the update; 0 makes runs exactly repeatable.")
    targets: str | list[str] = Field("all-linear", description="`all-linear`, or the names of the modules that are tuned.")


class TrainingConfig(_Section):
    """The optimizer's side of a run."""

    num_steps: int = Field(150, ge=1, description="Optimizer updates.")
    rows_per_step: int = Field(1, ge=1, description="Rows in one optimizer update, over all processes.")
    rows_per_device: int = Field(1, ge=1, description="Rows in one forward pass; the rest is accumulated.")
    learning_rate: float = Field(3e-4, gt=0.0, description="Peak learning rate.")
    warmup_ratio: float = Field(0.05, ge=0.0, lt=1.0, description="Share of the updates in which the rate rises.")
    schedule: str = Field("cosine", description="A schedule name of transformers.")
    weight_decay: float = Field(0.0, ge=0.0, description="AdamW's decoupled weight decay.")
    max_grad_norm: float = Field(1.0, ge=0.0, description="Gradients are scaled down to this norm; 0 turns it off.")
    tune: Literal["lora", "full"] = Field("lora", description="Train adapters or all weights.")
    lora: LoraConfig = LoraConfig()
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="Base weights' type; auto takes bfloat16 where it is fast."
    )
    kernels: Literal["auto", "none"] = Field(
        "auto", description="Attention and layers: the fastest that are there, or none but those of transformers."
    )
    gradient_checkpointing: bool = Field(False, description="Less memory for about a third more time.")
    save_every: int = Field(50, ge=1, description="Updates between checkpoints.")
    keep_checkpoints: int = Field(2, ge=2, description="Newest checkpoints that are kept; each can be evaluated as a model.")
    validate_checkpoints: bool = Field(False, description="Measure the validation loss at each checkpoint and keep the best.")
    patience: int | None = Field(
        None, ge=1, description="Checkpoints without a better validation loss after which training stops; None trains on."
    )
    validation_rows: int = Field(4, ge=1, description="Rows per validation task.")
    log_every: int = Field(5, ge=1, description="Updates between log lines.")
    report_to: list[str] = Field(default_factory=list, description="Trackers: tensorboard, wandb, trackio.")
    trainer: dict[str, Any] = Field(
        default_factory=dict, description="Anything else for transformers.TrainingArguments, by its name there."
    )


class Recipe(_Section):
    """A whole run."""

    model: str = Field("default", description="`default`, a folder, a hub id, a .gguf file or a finished run's folder.")
    tasks: str = Field("builtin", description="`builtin`, or the folder of a suite.")
    meta_training: list[str] | None = Field(None, description="Names of the tasks trained on; None takes the suite's.")
    rope_scaling: dict[str, Any] | None = Field(
        None, description="More positions than the model has, {rope_type: yarn, factor: 4.0} for instance."
    )
    seed: int = Field(0, ge=0, description="Everything random follows from it.")
    output: str = Field("runs/manyicl", description="Folder of the run.")
    episodes: EpisodesConfig = EpisodesConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    training: TrainingConfig = TrainingConfig()


def load_recipe(path: Path | str, overrides: list[str] | None = None) -> Recipe:
    """The recipe in a YAML file, with `key.subkey=value` overrides applied in order.

    Raises:
        RecipeError: the file is missing or no YAML mapping, a key is unknown (the nearest valid one is named), or a value is
            out of range.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}). Give the path of a recipe in YAML.") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: byte {error.start} is not UTF-8. Save the recipe as UTF-8.") from error
    except YAML_ERRORS as error:
        raise RecipeError(f"{path}: no valid YAML: {error}") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: holds a {type(content).__name__}; a recipe is a mapping of keys to values.")
    for override in overrides or []:
        _apply_override(content, override)
    return parse_recipe(content, where=str(path))


def parse_recipe(content: dict[str, Any], *, where: str = "recipe") -> Recipe:
    """The recipe that a mapping describes.

    Raises:
        RecipeError: see `load_recipe`.
    """
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(explain_validation(error, Recipe, where=where)) from error


def missing_run_hint(folder: Path, *, otherwise: str) -> str:
    """What to do where `folder` holds no finished run: to go on with it where one was started there, or `otherwise`."""
    if (folder / "recipe.yaml").is_file() and not (folder / "summary.json").is_file():
        return "A run was started here and has not finished. Go on with it: manyicl train RECIPE --resume."
    return otherwise


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"{override!r} is no override. Write key=value, for instance training.num_steps=100.")
    *parents, leaf = key.split(".")
    for parent in parents:
        section = content[parent] = {} if content.get(parent) is None else content[parent]
        if not isinstance(section, dict):
            raise RecipeError(f"{override!r}: {parent!r} holds {section!r}, not a section. Name a key of the recipe.")
        content = section
    try:
        content[leaf] = yaml.safe_load(value)
    except YAML_ERRORS as error:
        raise RecipeError(f"{override!r}: the value is no valid YAML: {error}") from error


def explain_validation(error: ValidationError, section: type[BaseModel], *, where: str) -> str:
    """Pydantic's errors as sentences, one a line; an unknown key comes with the nearest valid one."""
    return "\n".join(f"{where}: {_explain(dict(item), section)}" for item in error.errors())


def _explain(item: dict[str, Any], section: type[BaseModel]) -> str:
    location = [str(part) for part in item["loc"]]
    dotted = ".".join(location)
    if item["type"] == "missing":
        return f"{dotted} is missing. Add it."
    if item["type"] not in ("extra_forbidden", "invalid_key"):
        return f"{dotted} = {item['input']!r}: {item['msg'].removeprefix('Value error, ').removesuffix('.')}."
    everywhere = _dotted_keys(section)
    for part in location[:-1]:
        section = _subsection(section, part) or section
    valid = list(section.model_fields)
    elsewhere = [key for key in everywhere if key.rpartition(".")[2] == location[-1]]
    nearest = elsewhere or difflib.get_close_matches(location[-1], valid, n=1, cutoff=0.0)
    return f"unknown key {dotted!r}; the nearest valid one is {nearest[0]!r} (valid here: {', '.join(valid)})."


def _subsection(section: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The section that a key holds, None where it holds a value."""
    annotation = section.model_fields[key].annotation
    candidates = (annotation, *get_args(annotation))
    return next((each for each in candidates if isinstance(each, type) and issubclass(each, BaseModel)), None)


def _dotted_keys(section: type[BaseModel]) -> list[str]:
    """Every key of a section and of those inside it, as key.subkey."""
    keys = []
    for key in section.model_fields:
        inner = _subsection(section, key)
        keys += [key] if inner is None else [key, *(f"{key}.{name}" for name in _dotted_keys(inner))]
    return keys
