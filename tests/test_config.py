from pathlib import Path

import pytest

from manyicl.config import Recipe, load_recipe, parse_recipe
from manyicl.errors import RecipeError


def recipe_file(folder: Path, content: str | bytes) -> Path:
    path = folder / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_recipe_with_overrides_applied_in_order(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "model: folder\nepisodes: {max_tokens: 512, num_shots: 3}\ntraining: {learning_rate: 1e-3}\n")
    recipe = load_recipe(
        path,
        [
            "training.num_steps=7",
            "episodes.num_shots=null",
            "training.num_steps=9",
            "training.lora.rank=2",
            "meta_training=[a, b]",
        ],
    )
    assert recipe == Recipe.model_validate(
        {
            "model": "folder",
            "episodes": {"max_tokens": 512, "num_shots": None},
            "training": {"learning_rate": 0.001, "num_steps": 9, "lora": {"rank": 2}},
            "meta_training": ["a", "b"],
        }
    )
    assert load_recipe(str(path)).training.num_steps == 150
    assert "seed=1" not in path.read_text()


def test_overrides_open_sections_that_are_absent_or_empty(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "\ufeffepisodes:\n")
    assert load_recipe(path, ["episodes.max_tokens=64", "objective.name=last_answer"]) == parse_recipe(
        {"episodes": {"max_tokens": 64}, "objective": {"name": "last_answer"}}
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"modle": "x"}, "unknown key 'modle'; the nearest valid one is 'model' (valid here: model, tasks, meta_training,"),
        ({"training": {"num_step": 3}}, "unknown key 'training.num_step'; the nearest valid one is 'num_steps'"),
        ({"training": {"lora": {"rnak": 3}}}, "unknown key 'training.lora.rnak'; the nearest valid one is 'rank'"),
        ({"episodes": {"zzz": 3}}, "unknown key 'episodes.zzz'; the nearest valid one is '"),
        ({"learning_rate": 1.0}, "unknown key 'learning_rate'; the nearest valid one is 'training.learning_rate'"),
        ({"training": {"rank": 4}}, "unknown key 'training.rank'; the nearest valid one is 'training.lora.rank'"),
        ({1: 2}, "unknown key '1'; the nearest valid one is '"),
        ({"episodes": {"max_tokens": 8}}, "episodes.max_tokens = 8: Input should be greater than or equal to 16."),
        ({"training": {"learning_rate": float("inf")}}, "training.learning_rate = inf: Input should be a finite number."),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate = nan: Input should be"),
        ({"training": {"num_steps": 1.5}}, "training.num_steps = 1.5: Input should be a valid integer"),
        ({"objective": {"name": "all"}}, "objective.name = 'all': Input should be 'all_answers', 'last_answer' or 'reweighted'."),
        ({"training": None}, "training = None: Input should be a valid dictionary"),
        ({"seed": -1}, "seed = -1: Input should be greater than or equal to 0."),
    ],
)
def test_wrong_keys_and_values_are_explained(content: dict, message: str) -> None:
    with pytest.raises(RecipeError) as raised:
        parse_recipe(content, where="my.yaml")
    assert str(raised.value).startswith(f"my.yaml: {message}")


def test_every_mistake_is_listed(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "modle: x\nepisodes: {max_tokens: 1, shots: 2}\n")
    with pytest.raises(RecipeError) as raised:
        load_recipe(path)
    lines = str(raised.value).splitlines()
    assert [line.startswith(f"{path}: ") for line in lines] == [True, True, True]
    assert sorted(line.split(": ")[1].split(";")[0] for line in lines) == [
        "episodes.max_tokens = 1",
        "unknown key 'episodes.shots'",
        "unknown key 'modle'",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: \xe9", "byte 7 is not UTF-8. Save the recipe as UTF-8."),
        (b"model: [", "no valid YAML: "),
        (b"model: 2001-99-99", "no valid YAML: month must be in 1..12"),
        (b"[" * 5000, "no valid YAML: "),
        (b"- model", "holds a list; a recipe is a mapping of keys to values."),
        (b"model", "holds a str; a recipe is a mapping of keys to values."),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, content: bytes, message: str) -> None:
    path = recipe_file(tmp_path, content)
    with pytest.raises(RecipeError) as raised:
        load_recipe(path)
    assert str(raised.value).startswith(f"{path}: {message}")


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"absent\.yaml: cannot be read \(No such file or directory\)\. Give the path of a recipe"
    ):
        load_recipe(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.num_steps", "'training.num_steps' is no override. Write key=value, for instance training.num_steps=100."),
        ("=3", "'=3' is no override."),
        ("model.name=3", "'model.name=3': 'model' holds 'folder', not a section. Name a key of the recipe."),
        ("seed=[", "'seed=[': the value is no valid YAML: "),
        ("output=2001-99-99", "'output=2001-99-99': the value is no valid YAML: month must be in 1..12"),
        ("training.stpes=3", "unknown key 'training.stpes'; the nearest valid one is '"),
    ],
)
def test_wrong_overrides_are_explained(tmp_path: Path, override: str, message: str) -> None:
    path = recipe_file(tmp_path, "model: folder")
    with pytest.raises(RecipeError) as raised:
        load_recipe(path, [override])
    assert message in str(raised.value)


def test_a_recipe_survives_being_written_and_read() -> None:
    recipe = parse_recipe({"training": {"lora": {"targets": ["q_proj"]}, "report_to": ["tensorboard"]}, "meta_training": ["a"]})
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe


def test_every_field_is_described() -> None:
    def undescribed(section: type, where: str = "") -> list[str]:
        missing = []
        for name, field in section.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                missing += undescribed(field.annotation, f"{where}{name}.")
            elif not (field.description or "").endswith("."):
                missing.append(where + name)
        return missing

    assert undescribed(Recipe) == []
