"""A study's work as cells: named pieces that need others to be done first, none of them longer than some minutes.

    rate/all_answers/0.0006            short training and its score on the validation tasks
    rate/all_answers/extension         the rate beyond a winning edge, or nothing
    train/all_answers/seed-0           the whole budget, with snapshots on the way
    evaluate/all_answers/seed-0/sick   final weights on one task
    evaluate/all_answers/seed-0/1of3/sick      a snapshot
    forgetting/all_answers/seed-0      plain text and chat questions
    harness/all_answers/seed-0         tasks of lm-evaluation-harness
    dedicated-rate/snli_sample/0.0006  dedicated-tuned on a validation task
    dedicated/sick/prefix-0            dedicated-tuned on the demonstrations of order 0
    classic/sick                       TF-IDF
    robustness/all_answers/sick        demonstrations altered
    calibrated/all_answers/seed-0/sick final weights on one label task, its scores calibrated
    calibrated/all_answers/seed-1/sick those of a further training seed, at 0 and at max

The list is a pure function of recipe and suite, in the order in which cells are best done. A model's name in the records is the
part of a cell's name after its kind.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from manyicl.errors import RecipeError
from manyicl.results.causes import SEED_SHOTS
from manyicl.results.files import BASE
from manyicl.study.recipe import JOINT_METHODS, StudyRecipe
from manyicl.tasks.task import TaskSuite


@dataclass(frozen=True)
class Cell:
    """One piece of a study's work.

    Attributes:
        name: Its place in the folder of cells; the first part is its kind.
        needs: Names of the cells that must be done before.
        method: The method that it is a part of.
        task: The task that it is about, empty for none.
        options: What else its kind needs to know.
    """

    name: str
    needs: tuple[str, ...] = ()
    method: str = ""
    task: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The first part of the name."""
        return self.name.partition("/")[0]


def select_cells(cells: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """The cells that any of the patterns names; all where there is no pattern.

    Args:
        only: Names as `fnmatch` reads them, as `train/*/seed-1`, or the beginning of names up to a slash, as `robustness`, in
            which * has no meaning.
    """
    return [
        cell
        for cell in cells
        if not only or any(fnmatchcase(cell.name, pattern) or cell.name.startswith(f"{pattern}/") for pattern in only)
    ]


def list_cells(recipe: StudyRecipe, suite: TaskSuite) -> list[Cell]:
    """Every cell of a study, each after those it needs.

    Raises:
        RecipeError: the suite lacks tasks that the recipe names or needs, or a task that is evaluated would be trained on.
    """
    check_roles(recipe, suite)
    cells = [*_rate_cells(recipe), *_training_cells(recipe)]
    held_out, validation = suite.held_out, suite.validation
    finals: list[tuple[str, str, tuple[str, ...]]] = [(BASE, "in_context", ())] if "in_context" in recipe.methods else []
    finals += [
        (f"{method}/seed-{recipe.seed}", method, (f"train/{method}/seed-{recipe.seed}",)) for method in recipe.joint_methods()
    ]
    for tasks in (validation, held_out):  # All methods on one split before the next, so that early results compare.
        for task in tasks:
            cells += [Cell(f"evaluate/{model}/{task}", needs, method, task) for model, method, needs in finals]
            if "classic" in recipe.methods:
                cells.append(Cell(f"classic/{task}", (), "classic", task))
    cells += [Cell(f"forgetting/{model}", needs, method) for model, method, needs in finals] if recipe.forgetting.corpora else []
    cells += [Cell(f"harness/{model}", needs, method) for model, method, needs in finals if recipe.forgetting.harness_tasks]
    cells += _dedicated_cells(recipe, suite)
    cells += _robustness_cells(recipe)
    cells += _snapshot_cells(recipe, suite)
    cells += _seed_cells(recipe, suite)
    cells += _family_cells(recipe)
    if recipe.calibrated:
        read_again = [task for task in (*validation, *held_out) if suite.tasks[task].labels]
        cells += [
            Cell(f"calibrated/{model}/{task}", needs, method, task) for task in read_again for model, method, needs in finals
        ]
        cells += _calibrated_seed_cells(recipe, suite)
    return cells


def check_roles(recipe: StudyRecipe, suite: TaskSuite) -> None:
    """Whether what is evaluated is trained by no method, and what is named is there.

    Raises:
        RecipeError: it is not.
    """
    missing = [role for role in ("meta_training", "validation", "held_out") if not suite.select(role)]
    if missing:
        raise RecipeError(
            f"suite {suite.name!r} has no {' and no '.join(missing)} tasks, which a study needs. Name some in its suite.yaml."
        )
    named = [*recipe.robustness.tasks, *recipe.dedicated.overtaking_tasks]
    family = recipe.held_out_family
    named += [*family.meta_training_without, *family.held_out] if family else []
    for name in named:
        if name not in suite.tasks:
            raise RecipeError(
                f"the recipe names task {name!r}, which suite {suite.name!r} does not have ({', '.join(suite.tasks)})."
            )
    for name in (*recipe.robustness.tasks, *recipe.dedicated.overtaking_tasks):
        if suite.role(name) != "held_out":
            raise RecipeError(
                f"task {name!r} is a {suite.role(name)} task; robustness and overtaking are read on held-out tasks."
            )
    trained = set(suite.meta_training) - set(family.meta_training_without if family else ())
    leaked = [name for name in (family.held_out if family else ()) if name in trained or suite.role(name) == "validation"]
    if leaked:
        raise RecipeError(
            f"held_out_family evaluates {', '.join(leaked)}, which is trained on. Name it in meta_training_without."
        )
    for method in recipe.joint_methods():
        chosen = recipe.training_recipe(method).meta_training or ()
        wrong = [name for name in chosen if name not in suite.meta_training]
        if wrong:
            raise RecipeError(
                f"method {method!r} would train on {', '.join(wrong)}, which is no meta-training task. Leave it out."
            )


def rate_method(recipe: StudyRecipe, method: str) -> str:
    """The method whose learning rate a method or variant takes."""
    return recipe.variants[method].method if method in recipe.variants else method


def rate_name(rate: float) -> str:
    """A learning rate as it stands in names."""
    return f"{rate:g}"


def _rate_cells(recipe: StudyRecipe) -> Iterator[Cell]:
    for method in dict.fromkeys(rate_method(recipe, name) for name in recipe.joint_methods()):
        names = []
        for rate in recipe.rates.values:
            names.append(f"rate/{method}/{rate_name(rate)}")
            yield Cell(names[-1], (), method, options={"rate": rate})
        yield Cell(f"rate/{method}/extension", tuple(names), method)


def _training_cells(recipe: StudyRecipe) -> Iterator[Cell]:
    for method in recipe.joint_methods():
        yield _training_cell(recipe, method, recipe.seed)


def _training_cell(recipe: StudyRecipe, method: str, seed: int, *, family: bool = False) -> Cell:
    middle = f"{method}/family" if family else method
    needs = (f"rate/{rate_method(recipe, method)}/extension",)
    return Cell(f"train/{middle}/seed-{seed}", needs, method, options={"seed": seed, "family": family})


def _snapshot_cells(recipe: StudyRecipe, suite: TaskSuite) -> Iterator[Cell]:
    """Snapshots on every held-out task, at the shots that the validation tasks have chosen for the final weights, and at max."""
    for number in range(1, recipe.num_snapshots):
        for method in recipe.joint_methods():
            final = f"{method}/seed-{recipe.seed}"
            model = f"{final}/{number}of{recipe.num_snapshots}"
            chosen = tuple(f"evaluate/{final}/{task}" for task in suite.validation)
            for task in suite.held_out:
                options = {"snapshot": number, "shots": "best and max", "final": final, "num_seeds": recipe.num_snapshot_seeds}
                yield Cell(f"evaluate/{model}/{task}", (f"train/{final}", *chosen), method, task, options)
            if recipe.forgetting.corpora:
                yield Cell(f"forgetting/{model}", (f"train/{final}",), method, options={"snapshot": number})


def _seed_cells(recipe: StudyRecipe, suite: TaskSuite) -> Iterator[Cell]:
    for seed in recipe.training_seeds.values if recipe.training_seeds else ():
        for method in recipe.training_seeds.methods if recipe.training_seeds else ():
            training = _training_cell(recipe, method, seed)
            yield training
            for task in suite.held_out:
                name = f"evaluate/{method}/seed-{seed}/{task}"
                yield Cell(name, (training.name,), method, task, {"shots": list(SEED_SHOTS)})


def _calibrated_seed_cells(recipe: StudyRecipe, suite: TaskSuite) -> Iterator[Cell]:
    for cell in list(_seed_cells(recipe, suite)):
        if cell.kind == "evaluate" and suite.tasks[cell.task].labels:
            yield replace(cell, name=cell.name.replace("evaluate/", "calibrated/", 1))


def _family_cells(recipe: StudyRecipe) -> Iterator[Cell]:
    family = recipe.held_out_family
    for method in family.methods if family else ():
        training = _training_cell(recipe, method, recipe.seed, family=True)
        yield training
        for task in family.held_out if family else ():
            yield Cell(f"evaluate/{method}/family/seed-{recipe.seed}/{task}", (training.name,), method, task)


def _dedicated_cells(recipe: StudyRecipe, suite: TaskSuite) -> Iterator[Cell]:
    if "dedicated" not in recipe.methods:
        return
    rates = [
        Cell(f"dedicated-rate/{task}/{rate_name(rate)}", (), "dedicated_full", task, {"rate": rate, "examples": "full"})
        for task in suite.validation
        for rate in recipe.dedicated.rates
    ]
    yield from rates
    needs = tuple(cell.name for cell in rates)
    for task in suite.held_out:
        yield Cell(f"dedicated/{task}/full", needs, "dedicated_full", task, {"examples": "full", "seed": 0})
        for seed in range(recipe.num_seeds):
            yield Cell(f"dedicated/{task}/prefix-{seed}", needs, "dedicated_prefix", task, {"examples": "prefix", "seed": seed})
    for task in recipe.dedicated.overtaking_tasks:
        for count in recipe.dedicated.overtaking_examples:
            for seed in range(recipe.num_seeds):
                options = {"examples": count, "seed": seed}
                yield Cell(f"dedicated/{task}/{count}-{seed}", needs, f"dedicated_{count}", task, options)
            if "all_answers" in recipe.methods and count not in recipe.shots:
                final = f"all_answers/seed-{recipe.seed}"
                yield Cell(f"evaluate/{final}/{task}/{count}", (f"train/{final}",), "all_answers", task, {"shots": [count]})


def _robustness_cells(recipe: StudyRecipe) -> Iterator[Cell]:
    for task in recipe.robustness.tasks:
        for method in recipe.robustness.methods:
            model = BASE if method == "in_context" else f"{method}/seed-{recipe.seed}"
            needs = () if model == BASE else (f"train/{model}",)
            yield Cell(f"robustness/{model}/{task}", needs, method, task)


def is_joint(recipe: StudyRecipe, method: str) -> bool:
    """Whether a method is one model that is tuned on many tasks."""
    return method in JOINT_METHODS or method in recipe.variants
