"""Every shipped recipe parses, and what it names exists."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from manyicl.config import Recipe, load_recipe
from manyicl.errors import RecipeError
from manyicl.study.cells import list_cells
from manyicl.study.jobs import count_updates
from manyicl.study.recipe import load_study_recipe
from manyicl.tasks.readers import load_suite

RECIPES = Path(__file__).parents[1] / "recipes"
STUDIES = sorted([*RECIPES.glob("study-*.yaml"), *RECIPES.glob("ablations/*.yaml")])
# Those of the catalogue have their tests in test_catalogue.py.
PATHS = sorted(path for path in RECIPES.rglob("*.yaml") if "catalogue" not in path.parts and path not in STUDIES)


def name_of(path: Path) -> str:
    return path.relative_to(RECIPES).as_posix()


def test_the_recipes_of_the_documentation_are_there() -> None:
    assert {"default.yaml", "demo.yaml"} <= {name_of(path) for path in PATHS}


@pytest.mark.parametrize("path", PATHS, ids=name_of)
def test_recipe_parses(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.output.startswith("runs/")


@pytest.mark.parametrize("path", [path for path in PATHS if load_recipe(path).tasks == "builtin"], ids=name_of)
def test_builtin_tasks_of_a_recipe_exist(path: Path) -> None:
    recipe = load_recipe(path)
    suite = load_suite("builtin")
    names = suite.meta_training if recipe.meta_training is None else tuple(recipe.meta_training)
    assert names
    assert set(names) <= set(suite.tasks)
    assert {suite.role(name) for name in names} == {"meta_training"}


@pytest.mark.parametrize("path", STUDIES, ids=name_of)
def test_study_recipe_parses_and_every_training_recipe_in_it(path: Path) -> None:
    study = load_study_recipe(path)
    assert study.output.startswith("runs/")
    chosen = [study.training_recipe(method) for method in study.joint_methods()]
    assert len({recipe.model_dump_json() for recipe in chosen}) == len(chosen)


def test_the_ablations_are_there() -> None:
    names = {path.stem for path in STUDIES if path.parent.name == "ablations"}
    assert names == {"normalisation", "lora-targets", "remapping", "num-tasks", "context-length"}


@pytest.mark.parametrize("path", [path for path in STUDIES if load_study_recipe(path).tasks == "../shared/data"], ids=name_of)
def test_the_tasks_of_a_study_exist_and_none_is_trained_on_that_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (RECIPES.parent.parent / "shared" / "data").is_dir():
        pytest.skip("needs the folder of real tasks ../shared/data")
    monkeypatch.chdir(RECIPES.parent)
    study = load_study_recipe(path)
    suite = load_suite(study.tasks)
    names = [cell.name for cell in list_cells(study, suite)]
    assert len(names) == len(set(names))
    read = "dedicated/{}/full" if study.methods == ["dedicated"] else "evaluate/all_answers/seed-0/{}"
    assert {read.format(task) for task in suite.held_out} <= set(names)


def test_the_full_size_study_names_tasks_of_the_catalogue_by_their_roles() -> None:
    """Its data sets are on the hub: roles and families are read from their files, and the cells listed from those."""
    (path,) = (path for path in STUDIES if load_study_recipe(path).tasks == "recipes/catalogue")
    study, folder = load_study_recipe(path), RECIPES / "catalogue"
    roles = yaml.safe_load((folder / "suite.yaml").read_text(encoding="utf-8"))
    described = {
        name: yaml.safe_load((folder / name / "task.yaml").read_text(encoding="utf-8"))
        for role in ("meta_training", "validation", "held_out")
        for name in roles[role]
    }
    family = study.held_out_family
    assert family is not None
    for left_out, role in ((family.meta_training_without, "meta_training"), (family.held_out, "held_out")):
        assert set(left_out) == {name for name in roles[role] if described[name]["family"] == family.family}
    label_tasks = {name for name, task in described.items() if "labels" in task}
    assert {*study.robustness.tasks, *study.dedicated.overtaking_tasks} <= label_tasks
    tasks = {name: SimpleNamespace(labels=("a", "b") if name in label_tasks else ()) for name in described}
    role_of = {name: role for role, members in roles.items() for name in members}
    suite: Any = SimpleNamespace(name="catalogue", tasks=tasks, select=roles.__getitem__, role=role_of.__getitem__, **roles)
    names = [cell.name for cell in list_cells(study, suite)]
    assert len(names) == len(set(names))
    assert {f"evaluate/all_answers/seed-0/{task}" for task in roles["held_out"]} <= set(names)


@pytest.mark.parametrize("path", [path for path in STUDIES if path.parent.name == "ablations"], ids=name_of)
def test_every_variant_of_an_ablation_can_be_trained(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows hold an example of every task, and its budget is some updates."""
    if not (RECIPES.parent.parent / "shared" / "data").is_dir():
        pytest.skip("needs the folder of real tasks ../shared/data")
    monkeypatch.chdir(RECIPES.parent)
    study = load_study_recipe(path)
    suite = load_suite(study.tasks)
    for method in study.joint_methods():
        assert count_updates(study.training_recipe(method), suite, study.budget_tokens) >= 10, method


def test_no_two_recipes_share_an_output_folder() -> None:
    outputs = [load_recipe(path).output for path in PATHS] + [load_study_recipe(path).output for path in STUDIES]
    assert sorted(set(outputs)) == sorted(outputs)


def test_the_demonstration_recipe_fits_its_documentation() -> None:
    recipe = load_recipe(RECIPES / "demo.yaml")
    assert (recipe.model, recipe.tasks, recipe.output) == ("default", "builtin", "runs/demo")
    assert recipe.episodes.max_tokens == 1024
    assert recipe.objective.name == "all_answers"


def test_a_recipe_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("training: {num_step: 3}\n", encoding="utf-8")
    with pytest.raises(RecipeError) as raised:
        load_recipe(path)
    assert str(raised.value).startswith(f"{path}: unknown key 'training.num_step'; the nearest valid one is 'num_steps'")


def test_an_empty_recipe_is_the_default_one(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("", encoding="utf-8")
    assert load_recipe(path) == Recipe()
