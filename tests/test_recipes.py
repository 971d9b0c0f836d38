"""Every shipped recipe parses, and what it names exists."""

from pathlib import Path

import pytest

from manyicl.config import Recipe, load_recipe
from manyicl.errors import RecipeError
from manyicl.tasks.readers import load_suite

RECIPES = Path(__file__).parents[1] / "recipes"
PATHS = sorted(path for path in RECIPES.rglob("*.yaml") if "catalogue" not in path.parts)  # Its tests: test_catalogue.py.


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


def test_no_two_recipes_share_an_output_folder() -> None:
    outputs = [load_recipe(path).output for path in PATHS]
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
