"""Study recipes: which methods are compared on which tasks, with what budget. Every field has a unit and a default.

model: default
tasks: ../shared/data
output: runs/study-small
budget_tokens: 200000
methods: [in_context, zero_shot, few_shot_5, all_answers, classic]
"""

import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from manyicl.config import YAML_ERRORS, Recipe, explain_validation, parse_recipe
from manyicl.dtypes import Dtype, resolve_dtype
from manyicl.errors import RecipeError

# What a jointly tuned method changes in the training recipe. Short sequences share rows; each attends only to itself.
JOINT_METHODS: dict[str, dict[str, Any]] = {
    "zero_shot": {"episodes": {"num_shots": 0, "pack": True}, "objective": {"name": "last_answer"}},
    "few_shot_5": {"episodes": {"num_shots": 5, "pack": True}, "objective": {"name": "last_answer"}},
    "few_shot_16": {"episodes": {"num_shots": 16, "pack": True}, "objective": {"name": "last_answer"}},
    "last_answer": {"objective": {"name": "last_answer"}},
    "all_answers": {"objective": {"name": "all_answers"}},
    "reweighted": {"objective": {"name": "reweighted"}},
}
OTHER_METHODS = ("in_context", "dedicated", "classic")
METHODS = (*JOINT_METHODS, *OTHER_METHODS)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Variant(_Section):
    """A jointly tuned method with something changed in its training recipe, for ablations."""

    method: str = Field("all_answers", description="The jointly tuned method that it is a variant of.")
    change: dict[str, Any] = Field(description="Keys of a training recipe, nested as there.")


class RatesConfig(_Section):
    """How each method's learning rate is chosen: on the validation tasks, by the score at the best of a few shot counts."""

    values: list[float] = Field([2e-4, 6e-4, 2e-3], min_length=1, description="Rates tried; a winning edge is extended.")
    budget_share: float = Field(0.2, gt=0.0, le=1.0, description="Share of the budget that each is trained for.")
    shots: list[int | Literal["max"]] = Field([0, 16, 64], min_length=1, description="Shot counts; the best one counts.")
    num_seeds: int = Field(2, ge=1, description="Orders of demonstrations.")
    extension: float = Field(3.0, gt=1.0, description="Factor by which a winning edge is extended, once.")


class DedicatedConfig(_Section):
    """Dedicated tuning: one model per task and set of examples, without demonstrations."""

    rates: list[float] = Field([2e-4, 6e-4, 2e-3], min_length=1, description="Rates tried on validation tasks.")
    num_rates: int = Field(1, ge=1, description="How many of the best each model is tuned at; the fifth kept back chooses.")
    max_epochs: int = Field(10, ge=1, description="Passes over the examples, rounded up to whole rows, at most.")
    max_tokens: int = Field(200_000, ge=1, description="Tokens fed, at most.")
    rate_tokens: int | None = Field(None, ge=1, description="The same at each rate that is tried; None for as many.")
    patience: int = Field(2, ge=1, description="Stops after so many looks at the fifth kept back without a better loss.")
    overtaking_tasks: list[str] = Field(default_factory=list, description="Tasks on which several sizes are tuned.")
    overtaking_examples: list[int] = Field([16, 64, 256], description="Those sizes, in examples.")

    @model_validator(mode="after")
    def _check_rates(self) -> "DedicatedConfig":
        if self.num_rates > len(self.rates):
            raise ValueError(
                f"dedicated.num_rates is {self.num_rates}, and rates holds {len(self.rates)}. Name more, or ask for fewer."
            )
        return self

    def for_kind(self, kind: str) -> "DedicatedConfig":
        """The limits of a kind of cells: fewer tokens, where asked for, while rates are tried (`dedicated-rate`)."""
        is_rate = kind == "dedicated-rate" and self.rate_tokens is not None
        return self.model_copy(update={"max_tokens": self.rate_tokens}) if is_rate else self


class FamilyConfig(_Section):
    """The second setting: a whole family of tasks left out of the training."""

    family: str
    meta_training_without: list[str] = Field(description="Tasks of the family, not trained on in this setting.")
    held_out: list[str] = Field(description="Tasks of the family that are evaluated.")
    methods: list[str] = Field(["all_answers", "few_shot_5"], description="Jointly tuned methods.")


class SeedsConfig(_Section):
    """Further training seeds, read on held-out tasks at 0 and at max; with `calibrated`, label tasks with such scores too."""

    values: list[int] = Field([1, 2], description="Training seeds beside the first.")
    methods: list[str] = Field(["all_answers", "few_shot_5", "few_shot_16", "zero_shot"], description="Jointly tuned methods.")


class ForgettingConfig(_Section):
    """What is measured of forgetting."""

    corpora: list[str] = Field(default_factory=list, description="Plain text files.")
    max_bytes: int = Field(100_000, ge=1000, description="Bytes read from the start of each.")
    window_tokens: int = Field(1024, ge=2, description="Tokens in a window.")
    num_queries: int = Field(40, ge=1, description="Chat questions from each built-in task, without demonstrations.")
    harness_tasks: list[str] = Field(default_factory=list, description="Tasks of lm-evaluation-harness, if it is installed.")
    harness_path: str | None = Field(None, description="Folder of further tasks in its format; None for none.")
    harness_limit: int = Field(200, ge=1, description="Documents of each of these tasks, at most.")


class RobustnessConfig(_Section):
    """What is done to demonstrations, and to whose."""

    tasks: list[str] = Field(default_factory=list, description="Held-out label tasks.")
    methods: list[str] = Field(["in_context", "all_answers"], description="Methods.")
    num_shots: int = Field(32, ge=1, description="Demonstrations.")
    flipped: list[float] = Field([0.1, 0.25, 0.5], description="Shares of labels replaced by another.")
    contexts: list[int] = Field([2048, 4096, 8192], description="Context lengths in tokens, filled with demonstrations.")


class StudyRecipe(_Section):
    """A whole study."""

    model: str = Field("default", description="`default`, a folder, a hub id or a .gguf file.")
    dtype: Dtype = Field("auto", description="Number format of all weights; auto takes bfloat16 where it is fast.")
    tasks: str = Field("builtin", description="`builtin`, or the folder of a suite.")
    output: str = Field("runs/study", description="Folder of the cells; results are in its folder `results`.")
    seed: int = Field(0, ge=0, description="First training seed.")
    methods: list[str] = Field(list(METHODS), min_length=1, description="What is compared.")
    variants: dict[str, Variant] = Field(default_factory=dict, description="Methods with something changed, by name.")
    budget_tokens: int = Field(150_000, ge=1, description="Tokens fed to each jointly tuned method, padding not counted.")
    num_snapshots: int = Field(3, ge=1, description="Points of each training that are evaluated, the end included.")
    num_snapshot_seeds: int = Field(1, ge=1, description="Orders of demonstrations at the points before the end.")
    training: dict[str, Any] = Field(default_factory=dict, description="Changes to the training recipe of every method.")
    rates: RatesConfig = RatesConfig()
    context_tokens: int | None = Field(None, ge=16, description="Context in evaluation; None takes the model's positions.")
    shots: list[int | Literal["max"]] = Field([0, 4, 16, 64, "max"], min_length=1, description="Shot counts evaluated.")
    num_seeds: int = Field(3, ge=1, description="Orders of demonstrations.")
    num_queries: int = Field(100, ge=1, description="Queries per task; all of a smaller test split.")
    num_validation_queries: int = Field(100, ge=1, description="Queries per validation task, which choose rates and shots.")
    calibrated: bool = Field(False, description="Whether label tasks are read a second time, with calibrated scores.")
    dedicated: DedicatedConfig = DedicatedConfig()
    held_out_family: FamilyConfig | None = Field(None, description="The second setting; None leaves it out.")
    training_seeds: SeedsConfig | None = Field(None, description="Further training seeds; None leaves them out.")
    forgetting: ForgettingConfig = ForgettingConfig()
    robustness: RobustnessConfig = RobustnessConfig()
    notes: list[str] = Field(default_factory=list, description="Known leaks and other things a reader must know.")

    @model_validator(mode="after")
    def _check_methods(self) -> "StudyRecipe":
        joint = [*JOINT_METHODS, *self.variants]
        wanted = {
            "methods": (self.methods, [*METHODS, *self.variants]),
            "robustness.methods": (self.robustness.methods, ["in_context", *joint]),
        }
        if self.training_seeds:
            wanted["training_seeds.methods"] = (self.training_seeds.methods, joint)
        if self.held_out_family:
            wanted["held_out_family.methods"] = (self.held_out_family.methods, joint)
        wanted |= {f"variants.{name}.method": ([variant.method], list(JOINT_METHODS)) for name, variant in self.variants.items()}
        for key, (names, known) in wanted.items():
            for name in names:
                if name not in known:
                    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
                    raise ValueError(f"{key} names an unknown method {name!r}; the nearest is {nearest!r} ({', '.join(known)})")
        return self

    def joint_methods(self) -> list[str]:
        """The jointly tuned methods and variants that are compared."""
        return [name for name in self.methods if name in JOINT_METHODS or name in self.variants]

    def resolved(self) -> "StudyRecipe":
        """The recipe with the number format that `auto` means on this machine: cells of one study share it.

        Raises:
            ModelError: this processor does not have the format.
        """
        return self.model_copy(update={"dtype": str(resolve_dtype(self.dtype)).removeprefix("torch.")})

    def training_recipe(self, method: str, **changes: Any) -> Recipe:
        """The training recipe of a jointly tuned method.

        Raises:
            RecipeError: the study changes a key that a training recipe does not have.
        """
        variant = self.variants.get(method)
        content: dict[str, Any] = {"model": self.model, "tasks": self.tasks, "seed": self.seed}
        base = {"training": {"schedule": "constant_with_warmup", "dtype": self.dtype}}
        layers = [
            base,
            JOINT_METHODS[variant.method if variant else method],
            self.training,
            variant.change if variant else {},
            changes,
        ]
        for layer in layers:
            content = merge(content, layer)
        return parse_recipe(content, where=f"training recipe of {method}")


def merge(content: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """A mapping with the entries of another put over it, section by section."""
    merged = dict(content)
    for key, value in change.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def load_study_recipe(path: Path) -> StudyRecipe:
    """The study recipe in a YAML file.

    Raises:
        RecipeError: the file is missing or no YAML mapping, a key is unknown (the nearest valid one is named), or a value is
            out of range.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}). Give the path of a study recipe in YAML.") from error
    except YAML_ERRORS as error:
        raise RecipeError(f"{path}: no valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: holds a {type(content).__name__}; a study recipe is a mapping of keys to values.")
    try:
        recipe = StudyRecipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(explain_validation(error, StudyRecipe, where=str(path))) from error
    for method in recipe.joint_methods():
        recipe.training_recipe(method)
    return recipe
